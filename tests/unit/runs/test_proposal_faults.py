"""Faults of the files that `fluvial init` is given: all are told at once."""

import copy
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fluvial.data.faults import DataError, Faults
from fluvial.data.readers import read_file
from fluvial.data.reading import Reading
from fluvial.data.rows import FaultyRowsError
from fluvial.errors import ConfigError
from fluvial.runs.proposal.heldout import ALL, fitted
from fluvial.runs.proposal.lengths import include_unfit
from fluvial.runs.proposal.models import look_at_model
from fluvial.runs.proposal.records import facts_about, read_records
from fluvial.runs.proposal.settings import Answers, chat_template
from tests.unit.runs.test_proposal import answers, run_init, written


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines_of(*options: str) -> list[str]:
    """Return the lines of the error that `fluvial init` ends with."""
    with pytest.raises(ConfigError) as caught:
        run_init("--yes", "--model", "embedded", *options)
    return str(caught.value).splitlines()


def fits(lines: list[str], *beginnings: str) -> bool:
    """Return whether each line begins so, in some order."""
    return len(lines) == len(beginnings) and all(
        any(line.startswith(beginning) for line in lines) for beginning in beginnings
    )


def test_faults_of_several_files_of_several_kinds() -> None:
    """A broken line, a wrong type, wrong columns, another encoding, an answer that is missing."""
    good = json.dumps({"prompt": "Who?", "completion": "It"})
    Path("bern.jsonl").write_text(f'{good}\n{{"prompt": "Who?"\n{good}\n{{"prompt": "Who?"}}\n')
    Path("lima.csv").write_text("prompt,completion\nWho?,It\nWho?\nWho?,\n")
    Path("oslo.jsonl").write_text('{"x": "Who?", "y": "It"}\n' * 3)
    Path("rome.json").write_bytes(b"\xff\xfe\x00")
    Path("riga.jsonl").write_text(
        f'{good}\n{{"prompt": 1, "completion": "It"}}\n' + '{"prompt": null, "completion": "It"}\n'
    )
    Path("asked.jsonl").write_text(f"{good}\n[1]\n")
    Path("mine.jsonl").write_text('{"y": "It", "z": "What?"}\n')
    names = ("bern.jsonl", "lima.csv", "oslo.jsonl", "rome.json", "riga.jsonl", "no.jsonl")
    data = [word for name in names for word in ("--data", name)]
    held = ("--heldout", "asked.jsonl", "--heldout", "riga=mine.jsonl", "--heldout", "rom=a.jsonl")
    lines = lines_of(*data, *held)
    assert lines[0] == "11 faults in the data:"
    assert fits(
        lines[1:],
        "bern.jsonl, line 2 (Expecting ',' delimiter at character 18) is not JSON",
        "bern.jsonl, line 4: field 'completion' is missing",
        "lima.csv, line 3: has 1 cells, the header has 2",
        "lima.csv, line 4: the answer is empty",
        "--data 'oslo.jsonl': which of the columns x, y are question and answer",
        "rome.json: begins with the mark of utf-16",
        "riga.jsonl, line 3: field 'prompt' must be text, and is null",
        "--data: there is no file or folder 'no.jsonl'",
        "asked.jsonl, line 2 holds a list",
        "--heldout 'mine.jsonl': its columns y, z fit no form",
        "--heldout 'rom=a.jsonl': no --data makes a site 'rom'",
    )


def test_faults_of_one_source_beside_held_out_and_public_ones() -> None:
    """Sites and answers are decided where all lines can be read."""
    data = written([*answers(4), {"hospital": "north", "question": "Who?"}])
    apart = ("--heldout", "no.jsonl", "--public", "no.txt", "--limit", "slow-links")
    lines = lines_of("--data", data, *apart)
    assert fits(
        lines[1:],
        "records.jsonl, line 13: field 'completion' (column 'answer') is missing",
        "--heldout: there is no file or folder 'no.jsonl'",
        "--public: there is no file or folder 'no.txt'",
    )
    lines = lines_of("--data", data, "--heldout", "no.jsonl", "--site-column", "town")
    assert any(line.startswith("--site-column 'town': ") for line in lines)

    Path(data).write_text(Path(data).read_text() + "\n[]\n")
    lines = lines_of("--data", data, "--site-column", "town")
    assert fits(
        lines[1:],
        "records.jsonl, line 13: field 'completion' (column 'answer') is missing",
        "records.jsonl, line 14 holds a list",
    )


def test_a_model_and_limits_that_are_wrong_are_told_beside_the_records() -> None:
    """Options and model are looked at before anything is raised, also where the records are
    good."""
    data = written([*answers(4), {"hospital": "north", "question": "Who?"}])
    wrong = ("--model", "nowhere/", "--limit", "slow", "--data", data)
    with pytest.raises(ConfigError) as caught:
        run_init("--yes", *wrong)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 faults in the data:"
    assert fits(
        lines[1:],
        "--limit 'slow': choose among",
        "records.jsonl, line 13: field 'completion' (column 'answer') is missing",
        "model.name_or_path='nowhere/' is no folder here",
    )
    good = written(answers(4), "good.jsonl")
    public = ("--public", "good.jsonl", "--site-column", "town")
    assert fits(
        lines_of("--data", good, *public)[1:],
        "--public: without effect on the method of these limits",
        "--site-column 'town': ",
    )


def test_records_that_do_not_fit_the_model_are_told_beside_the_others(tiny_model: Path) -> None:
    """Answers beyond its context, in the records and in those that are held out."""
    long = [
        row | {name: row[name] + " word" * 90 for name in ("question", "answer")}
        for row in answers(4)
    ]
    data, asked = written(long), written(long[:3], "asked.jsonl")
    with pytest.raises(ConfigError) as caught:
        run_init(
            *("--yes", "--model", str(tiny_model), "--data", data, "--heldout", asked),
            *("--limit", "slow-links", "--public", "no.txt"),
        )
    assert fits(
        str(caught.value).splitlines()[1:],
        "12 of 12 records are longer than data.max_length=128, and of their answer no token",
        "3 of 3 records are longer than data.max_length=128",
        "--public: there is no file or folder 'no.txt'",
    )
    assert str(caught.value).count("Raising data.max_length cannot help (the model reads at") == 2


def test_conversations_that_no_template_renders_are_told_beside_the_others(
    tiny_model: Path, tokenizer: Any
) -> None:
    """Held-out conversations alone need the template too."""
    turns = [("user", "Who?"), ("assistant", "It")]
    good = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    bad = [{"messages": [{"role": "tool", "content": "x"}, *good[0]["messages"][1:]]}]
    sources = [written(answers(4), "a.jsonl"), written(good * 3 + bad, "b.jsonl")]
    parts = [facts_about(read_records(source), {}) for source in sources]
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    model = replace(look_at_model(str(tiny_model)), tokenizer=bare)
    for given in ((parts, []), (parts[:1], parts[1:])):
        faults = defaultdict[str, Faults](Faults)
        include_unfit(*given, model, faults)
        (line,) = faults["b.jsonl"].first
        assert line.startswith("b.jsonl, line 4: the chat template refuses the conversation")
        assert faults["a.jsonl"].count == 0

    apart = fitted({ALL: read_records("b.jsonl")}, parts[0])
    for heldout, needed in ((apart, ["plain"]), ({}, [])):
        known = cast(Answers, SimpleNamespace(model=model, template=None, heldout=heldout))
        assert [each.value for each in chat_template(known, parts[0])] == needed


def test_where_there_are_too_many_some_of_each_file_are_listed() -> None:
    good = json.dumps({"prompt": "Who?", "completion": "It"})
    for name, wrong in (("bern", 50), ("oslo", 2), ("rome", 30)):
        Path(f"{name}.jsonl").write_text(f"{good}\n" + "[]\n" * wrong)
    lines = lines_of("--data", "bern.jsonl", "--data", "oslo.jsonl", "--data", "rome.jsonl")
    assert lines[0] == "82 faults in the data:"
    (line,) = lines[1:]
    assert line.startswith("82 times: holds a list; a record is an object with named fields: ")
    assert line.endswith(
        ": bern.jsonl, lines 2, 3, 4, 5; oslo.jsonl, lines 2, 3; rome.jsonl, lines 2, 3, 4, 5; "
        "and 72 more"
    )


def test_a_single_fault_is_no_list() -> None:
    faults = Faults()
    faults.include(ConfigError("one"))
    other = Faults()
    other.include_evenly([faults, faults, Faults()])
    assert (other.first, other.count) == (["one"], 1)


def test_a_broken_row_of_a_csv_is_told_beside_the_rows_before_it() -> None:
    Path("a.csv").write_text('a,b\n1,2\n1\n"x')
    with pytest.raises(FaultyRowsError) as caught:
        read_file(Path("a.csv"), Reading())
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "a.csv, line 3",
        "a.csv",
    ]
    assert "row that begins in line 4 is broken" in caught.value.faults[1]
    assert [row.fields for row in caught.value.table.rows] == [{"a": "1", "b": "2"}]
    assert isinstance(caught.value, DataError)


def test_plain_text_beside_answers_is_refused_with_its_columns() -> None:
    Path("oslo.jsonl").write_text(json.dumps({"prompt": "Who?", "completion": "It"}) + "\n")
    Path("bonn.csv").write_text("job,note,report\n1,a note,a report that was written\n")
    (line,) = lines_of("--data", "oslo.jsonl", "--data", "bonn.csv", "--column", "bonn:text=report")
    assert "the records of 'bonn' are plain text, with the columns 'job', 'note', 'report'" in line
    assert "--column bonn:prompt=COLUMN" in line
