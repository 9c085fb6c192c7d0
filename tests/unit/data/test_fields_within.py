"""Fields within objects: `outer.inner` names one, in each kind of file and of data set."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fluvial.data.config import DataConfig
from fluvial.data.faults import DataError, Faults
from fluvial.data.partition import Natural
from fluvial.data.records import Answered, Chat
from fluvial.data.rows import Cells, Place, Row, Within, columns_of
from fluvial.data.site_records import SiteRecords
from fluvial.data.sources import Found, Source, classes_of, read_source
from fluvial.errors import ConfigError

COLUMNS = {"prompt": "dialog.question", "completion": "dialog.reply.text"}
PLACE = Place("a.jsonl", "line", 1)


def records(number: int = 6) -> list[dict[str, Any]]:
    """Records whose question, answer and clinic are within objects."""
    return [
        {
            "id": n,
            "dialog": {"question": f"Question {n}?", "reply": {"text": f"Answer {n}."}},
            "from": {"clinic": "north" if n % 2 else "south"},
        }
        for n in range(number)
    ]


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(path: Path, columns: dict[str, str]) -> Source:
    config = DataConfig(source=str(path), columns=columns)
    return Source("data.source", config.source, "train", config.reading())


def read(path: Path, columns: dict[str, str]) -> Found:
    faults = Faults()
    found = read_source(source(path, columns), faults)
    faults.raise_any()
    return found


def saved(kind: str, folder: Path) -> Path:
    """Return the records as a file or data set of this kind."""
    path = folder / f"records.{kind}"
    if kind == "jsonl":
        return lines(path, records())
    if kind == "json":
        path.write_text(json.dumps({"data": records()}))
        return path

    import datasets

    made = datasets.Dataset.from_list(records())
    if kind == "parquet":
        made.to_parquet(path)
    else:
        made.save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved"])
def test_each_source_gives_fields_at_any_depth(kind: str, tmp_path: Path) -> None:
    found = read(saved(kind, tmp_path), COLUMNS)
    assert [entry.record.content for entry in found.entries] == [
        Answered(f"Question {n}?", f"Answer {n}.") for n in range(6)
    ]
    partition = Natural(column="from.clinic")
    assert classes_of(found.entries, partition, "here", Faults()) == ["south", "north"] * 3


def test_a_column_whose_own_name_has_the_dot_comes_first() -> None:
    inner = {"a": {"b": "inner", "d.e": {"f": "deep"}}}
    assert Cells(inner)["a.b"] == "inner"
    assert Cells(inner)["a.d.e.f"] == "deep"
    assert Cells(inner | {"a.b": "own"})["a.b"] == "own"
    assert Cells(inner | {"a.b": {"c": "own"}})["a.b.c"] == "own"
    assert "a.c" not in Cells(inner)
    assert "c.b" not in Cells(inner)
    assert list(Cells(inner)) == ["a"]
    assert len(Cells(inner)) == 1


def test_what_is_within_null_is_null_and_within_a_list_nothing() -> None:
    assert Cells({"a": None})["a.b.c"] is None
    assert Cells({"a": {"b": [1]}})["a.b.c"] == Within("a.b", [1])
    assert Cells({"a": "text"})["a.b.c"] == Within("a", "text")


def test_columns_name_the_inner_fields_of_objects() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    made: list[dict[str, Any]] = [
        {"a": None, "b": {"c": {"d": 1}, "e": []}},
        {"a": {"x": 1}, "b": {"f": {}}, "g": None},
    ]
    rows = [Row(fields, PLACE) for fields in made]
    assert columns_of(rows) == ("b.c.d", "b.e", "a.x", "b.f", "g")
    assert columns_of([Row({"a": "text"}, PLACE), *rows])[:2] == ("a", "b.c.d")

    flat = pyarrow.Table.from_pylist([{"a": {"b": {"c": 1}, "d": 2}}]).flatten().flatten()
    assert columns_of([Row({"a": {"b": {"c": 1}, "d": 2}}, PLACE)]) == tuple(flat.column_names)


def test_all_records_without_the_field_are_named_at_once(tmp_path: Path) -> None:
    good = records(2)
    wrong = [
        {"dialog": {"reply": {"text": "A."}}},
        {"dialog": {"question": "Q?", "reply": ["A."]}},
        {"dialog": None},
        {"dialog": "Q?"},
        {"id": 5},
    ]
    path = lines(tmp_path / "a.jsonl", [*good, *wrong])
    with pytest.raises(DataError) as caught:
        read(path, COLUMNS)

    name = "field 'prompt' (column 'dialog.question')"
    remedy = "write a text, or remove the record"
    missing = "is missing; form 'prompt_completion' needs it; add it, or remove the record"
    assert caught.value.faults == (
        f"2 times: {name} {missing}: {path}, lines 3, 7",
        f"{path}, line 4: field 'completion' (column 'dialog.reply.text') must be text, and is "
        f"within 'dialog.reply', which is a list and no object; {remedy}",
        f"{path}, line 5: {name} must be text, and is null; {remedy}",
        f"{path}, line 6: {name} must be text, and is within 'dialog', which is text and no "
        f"object; {remedy}",
    )


def test_a_record_without_an_owner_within_its_object_is_named(tmp_path: Path) -> None:
    rows = [*records(2), records(1)[0] | {"from": {}}, records(1)[0] | {"from": ["north"]}]
    found = read(lines(tmp_path / "a.jsonl", rows), COLUMNS)
    faults = Faults()
    classes_of(found.entries, Natural(column="from.clinic"), "here", faults)
    assert "line 3: data.partition.column='from.clinic': the record has no such" in faults.first[0]
    assert "line 4: data.partition.column='from.clinic': must be text or a" in faults.first[1]
    assert "is within 'from', which is a list and no object" in faults.first[1]


def test_turns_of_a_conversation_may_be_within_an_object(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    path = lines(tmp_path / "a.jsonl", [{"dialog": {"turns": turns}}])
    (entry,) = read(path, {"messages": "dialog.turns"}).entries
    assert entry.record.content == Chat(turns)


def test_messages_about_columns_name_the_inner_ones(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", records())
    listed = "'id', 'dialog.question', 'dialog.reply.text', 'from.clinic'"
    with pytest.raises(ConfigError, match=f"prompt = 'dialog.query', but the data has .* {listed}"):
        read(path, COLUMNS | {"prompt": "dialog.query"})
    with pytest.raises(ConfigError, match=r"fields \['dialog.question', .* fit no form"):
        read(path, {})
    found = read(path, COLUMNS)
    with pytest.raises(ConfigError, match=r"has the columns id, dialog.question, .*from.clinic$"):
        classes_of(found.entries, Natural(column="from.town"), "here", Faults())


def test_a_csv_has_no_fields_within(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('dialog,a.b\n"{""question"": 1}",x\n')
    with pytest.raises(ConfigError, match="text = 'dialog.question', but .* 'dialog', 'a.b'"):
        read(path, {"text": "dialog.question"})
    assert len(read(path, {"text": "a.b"}).entries) == 1


def test_each_site_has_dotted_names_of_its_own(tmp_path: Path) -> None:
    lines(tmp_path / "oslo.jsonl", records())
    lines(tmp_path / "rome.jsonl", [{"q": {"x": f"Q{n}?"}, "a": f"A{n}"} for n in range(6)])
    tables: dict[str, Any] = {
        "oslo": {"source": str(tmp_path / "oslo.jsonl"), "columns": COLUMNS},
        "rome": {
            "source": str(tmp_path / "rome.jsonl"),
            "columns": {"prompt": "q.x", "completion": "a"},
        },
    }
    faults = Faults()
    parts = SiteRecords(DataConfig(by_site=tables), 0, None).read(faults)
    faults.raise_any()
    contents = [record.content for name in ("oslo", "rome") for record in parts[name][0]]
    assert Answered("Q0?", "A0") in contents or Answered("Q1?", "A1") in contents
    assert sum(isinstance(each, Answered) for each in contents) == len(contents) == 10


def test_two_fields_may_not_name_one_inner_column() -> None:
    with pytest.raises(ValidationError, match="prompt and completion name one column, 'a.b'"):
        DataConfig(source="x.jsonl", columns={"prompt": "a.b", "completion": "a.b"})


def test_a_record_may_be_as_deep_as_json_is_read() -> None:
    record: Any = "leaf"
    for _ in range(2000):
        record = {"a": record}

    (name,) = columns_of([Row(record, Place("deep.jsonl", "line", 1))])
    assert name == ".".join(["a"] * 2000)
    assert Cells(record)[name] == "leaf"
