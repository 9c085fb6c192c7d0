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
from fluvial.runs.proposal.undecided import UndecidedError
from tests.unit.runs.test_proposal import proposed, written

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


def test_the_keys_of_turns_tell_the_form_and_not_the_name_of_the_column(tiny_model: Path) -> None:
    """The file that is written passes check."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [{"site": site, "conversations": turns} for site in "ab" for _ in range(4)]
    config = proposed("--model", str(tiny_model), "--data", written(rows))
    assert config.data.columns == {"messages": "conversations"}

    Path("b.jsonl").write_text(json.dumps({"messages": TURNS}))
    facts = facts_about(read_records("b.jsonl"), {})
    assert (facts.form, facts.columns) == ("sharegpt", {"conversations": "messages"})


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        (TURNS, "conversations"),
        (json.dumps(TURNS), "conversations"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "messages"),
    ],
)
def test_a_column_of_turns_is_proposed_whatever_its_name(turns: object, field: str) -> None:
    """Of the two answers of a preference, the one that was chosen."""
    row = {"rejected": turns, "chosen": turns, "score": 0.5}
    Path("a.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    with pytest.raises(UndecidedError) as raised:
        facts_about(read_records("a.jsonl"), {}, site="oslo")
    assert raised.value.columns == {field: "chosen"}
    assert f"Perhaps a conversation: --column oslo:{field}=chosen; or" in str(raised.value)
    assert facts_about(read_records("a.jsonl"), raised.value.columns).is_conversation


def test_a_folder_of_folders_is_refused_with_a_command_that_names_each() -> None:
    for site in ("north", "south", "west wing"):
        (Path("notes") / site).mkdir(parents=True)
        (Path("notes") / site / "a.txt").write_text("A patient came in.\nA patient left.")
    Path("notes/empty").mkdir()
    words = (
        "file itself, but 'north', 'south', 'west wing' within it do; name such a folder, or each "
        "as a site: fluvial init --data notes/north --data notes/south --data 'notes/west wing'"
    )
    with pytest.raises(DataError, match=words):
        read_records("notes")
