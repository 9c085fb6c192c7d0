"""Lengths of a plan that leave a site without labels: refused, before a run and in it."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import IGNORE_INDEX, Example
from fluvial.errors import ClientError, ConfigError, RefusalError
from fluvial.methods.fedpipe import tasks
from fluvial.methods.fedpipe.tasks import shortened
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.runs.run import execute

LATE = Example([1, 5, 6, 7], [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 7])
EARLY = Example([1, 5, 6], [IGNORE_INDEX, 5, 6])


def test_sequences_without_a_label_are_left_out() -> None:
    cut = Example([1, 5], [IGNORE_INDEX, 5])
    assert shortened([LATE, EARLY], 2) == [cut]
    assert shortened([LATE, EARLY], 4) == [LATE, EARLY]


def test_a_site_does_not_train_on_longer_sequences_than_planned() -> None:
    with pytest.raises(RefusalError, match=r"method.planner.lengths: .* in its first 3 tokens"):
        shortened([LATE, LATE], 3)


def late_answers(tmp_path: Path) -> dict[str, Any]:
    """Return a table of data of two sites, of which `north` has the longer questions."""
    records = [
        {
            "client": site,
            "prompt": "a long question " * (1 + 4 * (site == "north")),
            "completion": c,
        }
        for site in ("north", "south")
        for c in ("yes", "no", "yes", "no")
    ]
    source = tmp_path / "records.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "source": str(source),
        "max_length": 128,
        "heldout_share": 0.3,
        "partition": {"by": "column", "column": "client"},
    }


def test_check_names_the_site_whose_answers_come_later(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    data = late_answers(tmp_path)

    def table(length: int) -> dict[str, Any]:
        method = {"name": "fedpipe", "planner": {"lengths": [length, 128]}}
        return run_config | {"method": method, "data": data}

    with pytest.raises(ConfigError, match=r"lengths: no sequence of site 'north' has a label"):
        plan(parse(table(8), "test"))
    plan(parse(table(120), "test"))


def test_a_site_that_no_plan_fits_probes_nothing(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its failure is the limit that binds, not a length that nobody set."""
    budgets = [{"site": "north", "memory_mb": 0.2}]
    method = {"name": "fedpipe", "probe_steps": 2, "budgets": budgets}
    table = run_config | {"method": method, "data": late_answers(tmp_path)}
    monkeypatch.setattr(
        tasks, "shortened", lambda *_: pytest.fail("a site without a plan was probed")
    )
    with pytest.raises(ClientError, match="'north' failed: a pass of .* more than its 200 kB"):
        next(execute(parse(table, "test"), tmp_path / "run"))


def test_a_probe_without_room_for_a_label_names_the_memory() -> None:
    with pytest.raises(RefusalError, match="probe: 200,000 B of memory .* first 3 tokens"):
        tasks._with_room([LATE], 3, 200_000)
    assert tasks._with_room([LATE, EARLY], 3, 200_000) == [EARLY]
