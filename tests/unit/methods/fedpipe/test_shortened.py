"""Lengths of a plan that leave a site without labels: refused, before a run and in it."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import IGNORE_INDEX, Example
from fluvial.errors import ConfigError, RefusalError
from fluvial.methods.fedpipe.tasks import shortened
from fluvial.runs.config import parse
from fluvial.runs.plan import plan

LATE = Example([1, 5, 6, 7], [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 7])
EARLY = Example([1, 5, 6], [IGNORE_INDEX, 5, 6])


def test_sequences_without_a_label_are_left_out() -> None:
    cut = Example([1, 5], [IGNORE_INDEX, 5])
    assert shortened([LATE, EARLY], 2) == [cut]
    assert shortened([LATE, EARLY], 4) == [LATE, EARLY]


def test_a_site_does_not_train_on_longer_sequences_than_planned() -> None:
    with pytest.raises(RefusalError, match=r"method.planner.lengths: .* in its first 3 tokens"):
        shortened([LATE, LATE], 3)


def test_check_names_the_site_whose_answers_come_later(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
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
    data = {
        "source": str(source),
        "max_length": 128,
        "heldout_share": 0.3,
        "partition": {"by": "column", "column": "client"},
    }

    def table(length: int) -> dict[str, Any]:
        method = {"name": "fedpipe", "planner": {"lengths": [length, 128]}}
        return run_config | {"method": method, "data": data}

    with pytest.raises(ConfigError, match=r"lengths: no sequence of site 'north' has a label"):
        plan(parse(table(8), "test"))
    plan(parse(table(120), "test"))
