"""docs/README.md lists every decision."""

from tests.support import ROOT


def test_every_decision_is_listed() -> None:
    listed = (ROOT / "docs" / "README.md").read_text("utf-8")
    pages = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    assert pages
    assert [page for page in pages if f"(decisions/{page})" not in listed] == []
