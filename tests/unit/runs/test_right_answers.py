"""Which held-out answers of a run were right, where its sites are in this process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fluvial.runs.right_answers import answers_of, measured
from fluvial.storage.run_files import read_result
from fluvial.training.wilson import correlation, share_difference
from tests.support.questions import with_questions
from tests.support.runs import run_table


def test_a_run_and_its_baseline_are_paired_by_question(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The base model is measured once for both, and its answers are known to both."""
    table = with_questions(run_config | {"rounds": 1, "compare": ["local"]}, tmp_path)
    result = run_table(table, tmp_path / "run")
    local = read_result(tmp_path / "run" / "compare" / "local")
    assert local is not None
    for found in (result, local):
        for site, row in found["heldout_by_site"].items():
            for which in ("base", "final"):
                marks = found["right_answers"][which][site]
                assert marks.count("1") / len(marks) == row[which]["exact_match"]
    assert result["right_answers"]["base"] == local["right_answers"]["base"]

    shares = [each["heldout_pooled"]["final"]["exact_match"] for each in (result, local)]
    ours, theirs = (
        "".join(marks for _, marks in sorted(each["right_answers"]["final"].items()))
        for each in (result, local)
    )
    known = result["overlap"]["independent_questions"] or result["questions"]
    ends = share_difference(shares[0], shares[1], known, correlation(ours, theirs, known))
    interval = result["verdict"]["answers"]["local"]
    assert (interval["low"], interval["high"]) == pytest.approx(ends)


def test_marks_that_are_not_of_this_measure_are_left_out() -> None:
    """Those of a site that answered late, and of sites elsewhere, of which there are none."""
    pool = SimpleNamespace(right_answers={"a": "11", "b": "10", "c": "1111"})
    rows = {
        "a": {"exact_match": 0.5},
        "b": {"exact_match": 0.5},
        "d": {"exact_match": 0.5},
        "e": {"loss": 1.0},
    }

    def measure(*_: object, **asked: object) -> Any:
        assert pool.right_answers == {}
        assert asked == {"round": 3, "which": "final"}
        pool.right_answers |= {"a": "11", "b": "10", "e": None}
        return SimpleNamespace(by_site=rows)

    server, reporting = SimpleNamespace(measure=measure), SimpleNamespace(pool=pool, rounds=3)
    _, right = measured(cast(Any, server), cast(Any, None), cast(Any, reporting), "final")
    assert right == {"b": "10"}
    assert answers_of({}, right) is None
    assert answers_of(right, right) == {"base": right, "final": right}
