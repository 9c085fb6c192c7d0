"""The glossary lists terms that the documents use, and its links lead to sections that exist."""

import re
from pathlib import Path

import pytest

from tests.support import ROOT

PAGE = ROOT / "docs" / "glossary.md"
OTHERS = [page for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if page != PAGE]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def rows() -> list[tuple[str, str, str]]:
    """Return term, meaning and page of every row of the table."""
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert all(len(row) == 3 for row in cells), "a row has three cells"

    return [(term, meaning, page) for term, meaning, page in cells]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of `page`."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("term", [term for term, _, _ in rows()])
def test_a_term_is_used_in_the_documents(term: str) -> None:
    text = " ".join(page.read_text("utf-8") for page in OTHERS)
    words = [word.removesuffix(" of a codec") for word in term.split(", ")]
    missing = [word for word in words if not re.search(rf"\b{word}s?\b", text, re.IGNORECASE)]
    assert not missing, f"{missing}: used on no page, so remove it from docs/glossary.md"


@pytest.mark.parametrize(("term", "page"), [(term, page) for term, _, page in rows()])
def test_a_term_leads_to_a_page_and_a_section_that_exist(term: str, page: str) -> None:
    (target,) = LINK.findall(page)
    name, _, anchor = target.partition("#")
    path = PAGE.parent / name
    assert path.is_file(), f"{term}: no page {name}"
    assert not anchor or anchor in anchors(path), f"{term}: no section #{anchor} in {name}"


def test_terms_are_in_order_and_listed_once() -> None:
    terms = [term.lower() for term, _, _ in rows()]
    assert terms == sorted(set(terms))


def test_a_meaning_is_one_sentence_or_more() -> None:
    assert all(meaning.endswith(".") for _, meaning, _ in rows())


@pytest.mark.parametrize("page", ["README.md", "docs/README.md"])
def test_the_glossary_is_linked(page: str) -> None:
    path = ROOT / page
    targets = {path.parent / link for link in LINK.findall(path.read_text("utf-8"))}
    assert PAGE in targets
