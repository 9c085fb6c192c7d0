"""The table of each site's measures on a terminal."""

from typing import Any

from fluvial.report.site_tables import site_table
from tests.unit.report.test_show import text_of


def run(sites: int, *, local: bool = True, answers: bool = True) -> dict[str, Any]:
    """A finished run: losses 3, 2 and 1 of base, local and federated, and exact match 0 to 0.8."""

    def measures(loss: float, score: float) -> dict[str, float]:
        return {"loss": loss, "accuracy": 0.5} | ({"exact_match": score} if answers else {})

    names = [f"site{n:02}" for n in range(sites)]
    rows = {name: {"base": measures(3.0, 0.0), "final": measures(1.0, 0.8)} for name in names}
    alone = {name: {"base": measures(3.0, 0.0), "final": measures(2.0, 0.25)} for name in names}
    compare = {"local": {"result": {"heldout_by_site": alone}}} if local else {}
    return {"result": {"heldout_by_site": rows, "sends_updates": True}, "compare": compare}


def lines_of(made: dict[str, Any]) -> list[list[str]]:
    table = site_table(made)
    assert table is not None
    return [line.split() for line in text_of(table).splitlines() if line.strip()]


def test_each_site_has_losses_and_answers_of_all_three_models() -> None:
    title, first, second, _, row, *_ = lines_of(run(3))
    assert title == ["Held-out,", "by", "site"]
    assert first == ["base", "local", "federated", "base", "local", "federated"]
    assert second == ["site", *["loss"] * 3, *["exact", "match"] * 3]
    assert " ".join(row) == "site00 3.0000 2.0000 1.0000 0.00 % 25.00 % 80.00 %"


def test_what_was_not_run_has_no_column() -> None:
    """Without answers the share of right next tokens stands in their place."""
    _, first, second, _, row, *_ = lines_of(run(3, local=False, answers=False))
    assert first == ["base", "federated", "base", "federated"]
    assert second == ["site", "loss", "loss", *["next-token", "acc."] * 2]
    assert row == ["site00", "3.0000", "1.0000", *["50.00", "%"] * 2]
    unmeasured = run(2)
    unmeasured["result"]["heldout_by_site"]["site00"]["final"] = None
    assert lines_of(unmeasured)[4][3] == "not"  # measured


def test_twenty_sites_are_listed_and_one_has_no_table() -> None:
    lines = lines_of(run(23))
    assert lines[-2][0] == "site19"
    assert lines[-1][:3] == ["3", "more", "sites:"]
    assert len(lines_of(run(20))) == 4 + 20
    assert site_table(run(1)) is None


def test_measures_on_one_shared_set_are_not_repeated_without_a_word() -> None:
    """Local models differ there; without them one row says all."""
    shared = run(23)
    shared["result"]["overlap"] = {"one_set": True}
    words = [" ".join(line) for line in lines_of(shared)]
    note = "all sites share one held-out set, on which each has the same base and federated model"
    assert " ".join(words[4 + 20 :]).startswith(f"{note}; 3 more sites")

    alone = run(23, local=False)
    alone["result"]["overlap"] = {"one_set": True}
    *_, row = lines_of(alone)
    assert " ".join(row).startswith("all 23 sites (one shared held-out set) 3.0000 1.0000")
    assert len(lines_of(alone)) == 4 + 1

    own = run(3, local=False)
    own["result"]["overlap"] = {"one_set": True}
    own["result"]["heldout_by_site"]["site01"]["final"] = {}  # a personal model of one site
    assert len(lines_of(own)) == 4 + 3
