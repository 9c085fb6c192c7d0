"""Records in forms that people bring: what `fluvial init` writes for them, or asks."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fluvial.data.faults import DataError
from fluvial.runs.proposal.lengths import measure_lengths
from fluvial.runs.proposal.models import ModelFacts, look_at_model
from fluvial.runs.proposal.records import facts_about, read_records

TURNS = [{"from": "human", "value": "Which ward?"}, {"from": "gpt", "value": "Lungs"}]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def embedded() -> ModelFacts:
    return look_at_model("embedded")


def spreadsheet(cells: list[Any]) -> str:
    """Write a CSV file with a column of conversations, and return its name."""
    with Path("talks.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["clinic", "conversations"])
        rows.writerows(["north", cell] for cell in cells)
    return "talks.csv"


def test_conversations_of_a_spreadsheet_are_json(embedded: ModelFacts) -> None:
    facts = facts_about(read_records(spreadsheet([json.dumps(TURNS)] * 2)), {})
    assert facts.form == "sharegpt"
    assert measure_lengths(facts, embedded).longest > 4


def test_records_none_of_which_can_be_read_are_named(embedded: ModelFacts) -> None:
    """What `str` of Python writes is no JSON."""
    facts = facts_about(read_records(spreadsheet([TURNS] * 3)), {})
    with pytest.raises(DataError, match=r"list of turns as JSON, .*talks.csv, lines 2, 3, 4"):
        measure_lengths(facts, embedded)
