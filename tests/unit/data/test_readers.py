"""Local files as records: values as written, places kept, and an honest answer for what cannot be
read."""

import codecs
import gzip
import io
import json
import os
import pickle
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import DataError
from fluvial.data.files import known_encoding
from fluvial.data.readers import read_file
from fluvial.data.reading import Reading
from fluvial.data.record_reader import RecordReader
from fluvial.data.records import Text
from fluvial.data.rows import Number
from fluvial.errors import ConfigError

HEAD = "prompt,completion\n"


def read(
    folder: Path,
    name: str,
    content: str | bytes,
    encoding: str = "utf-8",
    delimiter: str | None = None,
) -> Any:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_file(path, Reading(encoding, delimiter))


def values(table: Any, column: str) -> list[Any]:
    return [row.fields[column] for row in table.rows]


def lines(table: Any) -> list[int]:
    return [row.place.number for row in table.rows]


# -- values --------------------------------------------------------------------------------------

WRITTEN = [
    "NA",
    "null",
    "None",
    "nan",
    "",
    "01",
    "1e3",
    "1.0",
    "2021-03-01",
    "TRUE",
    " x ",
    "-",
    "#N/A",
    "∞",
]


def test_every_value_of_csv_is_text_as_written(tmp_path: Path) -> None:
    table = read(tmp_path, "a.csv", "site,text\n" + "".join(f"s,{value}\n" for value in WRITTEN))
    assert values(table, "text") == WRITTEN
    assert lines(table) == list(range(2, 2 + len(WRITTEN)))


def test_every_string_of_json_is_text_as_written(tmp_path: Path) -> None:
    content = "\n".join(json.dumps({"text": value}) for value in WRITTEN)
    assert values(read(tmp_path, "a.jsonl", content), "text") == WRITTEN
    whole = json.dumps([{"text": value} for value in WRITTEN])
    assert values(read(tmp_path, "a.json", whole), "text") == WRITTEN


def test_a_number_of_json_keeps_its_text(tmp_path: Path) -> None:
    written = ["1", "1.0", "1e3", "-0", "0.10", "9" * 5000]
    table = read(tmp_path, "a.jsonl", "\n".join(f'{{"n": {number}}}' for number in written))
    assert values(table, "n") == [Number(number) for number in written]
    assert values(
        read(tmp_path, "b.jsonl", '{"n": true}\n{"n": null}\n{"n": {"a": [1]}}'), "n"
    ) == [
        True,
        None,
        {"a": [Number("1")]},
    ]


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, Any] = {
        "s": ["NA", "01", None],
        "n": [1, 2, None],
        "f": [0.5, float("nan"), 1.0],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    table = read_file(tmp_path / "a.parquet", Reading())
    assert values(table, "s") == ["NA", "01", None]
    assert values(table, "n") == [Number("1"), Number("2"), None]
    assert values(table, "f") == [Number("0.5"), Number("nan"), Number("1.0")]
    assert [str(row.place).rpartition("/")[2] for row in table.rows] == [
        f"a.parquet, row {n}" for n in (1, 2, 3)
    ]


def test_two_equal_columns_of_parquet_are_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = [pyarrow.array(["x"]), pyarrow.array(["y"])]
    parquet.write_table(pyarrow.table(columns, names=["q", "q"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has two columns 'q'; rename one of them"):
        read_file(tmp_path / "a.parquet", Reading())


def test_parquet_numbers_have_the_digits_of_their_type(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {
        "decimal": pyarrow.array([Decimal("1.50"), Decimal("-0.10"), None]),
        "float32": pyarrow.array([0.1, float("nan"), None], type=pyarrow.float32()),
        "float16": pyarrow.array([0.1, 2.0, None], type=pyarrow.float16()),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    table = read_file(tmp_path / "a.parquet", Reading())
    assert values(table, "decimal") == [Number("1.50"), Number("-0.10"), None]
    assert values(table, "float32") == [Number("0.1"), Number("nan"), None]
    assert values(table, "float16") == [Number("0.1"), Number("2.0"), None]


def test_nested_parquet_numbers_have_the_digits_of_their_type(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    small = pyarrow.float32()
    types = {
        "list": (pyarrow.list_(small), [0.1, None]),
        "fixed": (pyarrow.list_(pyarrow.float16(), 1), [0.1]),
        "struct": (pyarrow.struct({"a": small, "b": pyarrow.float64()}), {"a": 0.1, "b": 0.1}),
        "map": (pyarrow.map_(pyarrow.string(), small), [("k", 0.1)]),
        "deep": (pyarrow.list_(pyarrow.struct({"a": pyarrow.large_list(small)})), [{"a": [0.1]}]),
    }
    columns = {
        name: pyarrow.array([value, None], type=kind) for name, (kind, value) in types.items()
    }
    columns["shared"] = pyarrow.array([0.1, None], type=small).dictionary_encode()
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    first, second = read_file(tmp_path / "a.parquet", Reading()).rows

    tenth = Number("0.1")
    assert first.fields == {
        "list": [tenth, None],
        "fixed": [tenth],
        "struct": {"a": tenth, "b": tenth},
        "map": [["k", tenth]],
        "deep": [{"a": [tenth]}],
        "shared": tenth,
    }
    assert set(second.fields.values()) == {None}


def test_parquet_values_that_python_has_no_type_for_are_refused_where_they_are_needed(
    tmp_path: Path,
) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {
        "text": ["x", "y"],
        "when": pyarrow.array([2**60, 1], type=pyarrow.timestamp("us")),
        "seen": pyarrow.array([1, 2], type=pyarrow.timestamp("us", "Mars/X")),
        "many": pyarrow.array([[1], None], type=pyarrow.list_(pyarrow.timestamp("us", "Mars/X"))),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    table = read_file(tmp_path / "a.parquet", Reading())
    assert values(table, "text") == ["x", "y"]

    row = table.rows[0]
    assert RecordReader("text", {}).read(row.place, row.fields).content == Text("x")
    for column, kind in (("when", r"timestamp\[us\]"), ("seen", r"timestamp\[us, tz=Mars/X\]")):
        with pytest.raises(
            ConfigError, match=f"a.parquet, row 1: .*'{column}'.* is a value of type {kind}, which"
        ):
            RecordReader("text", {"text": column}).read(row.place, row.fields)


def test_a_json_document_may_be_one_record(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for record in (
        {"messages": turns},
        {"site": "x", "messages": turns, "tags": ["a"], "scores": []},
        {"conversations": shared},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b", "references": ["c"]},
    ):
        table = read(tmp_path, "a.json", "\n" + json.dumps(record, indent=1))
        assert [row.fields for row in table.rows] == [record]
        assert lines(table) == [2]
        assert table.columns == tuple(record)

    for several in ({"messages": [{"text": "a"}]}, {"conversations": [{"messages": turns}]}):
        (records,) = several.values()
        table = read(tmp_path, "a.json", json.dumps(several))
        assert [row.fields for row in table.rows] == records


def test_a_header_may_begin_with_a_bracket_or_have_the_name_of_a_number(tmp_path: Path) -> None:
    assert read(tmp_path, "a.csv", "[site],{x}\n1,2\n").columns == ("[site]", "{x}")
    table = read(tmp_path, "a.csv", ",column 1,column 1 (no name)\n1,2,3\n")
    assert dict(table.rows[0].fields) == {
        "column 1 (no name) (no name)": "1",
        "column 1": "2",
        "column 1 (no name)": "3",
    }


def test_quotes_and_line_breaks_of_csv(tmp_path: Path) -> None:
    content = (
        HEAD + '"a ""b"" c","one\r\ntwo\nthree"\n"x,y",5" pipe\n' + "long," + "z" * 300_000 + "\n"
    )
    table = read(tmp_path, "a.csv", content)
    assert values(table, "prompt") == ['a "b" c', "x,y", "long"]
    assert values(table, "completion") == ["one\r\ntwo\nthree", '5" pipe', "z" * 300_000]
    assert lines(table) == [2, 5, 6]


def test_ends_of_lines_are_those_of_files_only(tmp_path: Path) -> None:
    content = '{"text": "a\u2028b\u0085c"}\r\n\r\n{"text": "d"}\r{"text": "e"}\n\n'
    table = read(tmp_path, "a.jsonl", content)
    assert values(table, "text") == ["a\u2028b\u0085c", "d", "e"]
    assert lines(table) == [1, 3, 4]
    assert table.notes == ("2 blank lines were skipped",)
    table = read(tmp_path, "a.txt", "one\r\n \r\ntwo\u2028x\rthree\n")
    assert values(table, "text") == ["one", "two\u2028x", "three"]
    assert lines(table) == [1, 3, 4]
    assert table.notes == ("1 blank line was skipped",)


def test_a_json_list_is_found_with_its_lines(tmp_path: Path) -> None:
    content = '{"version": 1, "data": [\n {"a": "[,"},\n\n {"a": "}"}\n], "more": {"x": [1, 2]}}\n'
    table = read(tmp_path, "a.json", content)
    assert (values(table, "a"), lines(table)) == (["[,", "}"], [2, 4])
    assert values(read(tmp_path, "b.json", '{"a": "x"}\n{"a": "y"}\n'), "a") == ["x", "y"]


def test_rows_of_empty_cells_and_columns_without_a_name(tmp_path: Path) -> None:
    table = read(tmp_path, "a.csv", ",prompt,completion,\n0,a,b,\n,,,\n\n1,c,d,\n")
    assert values(table, "prompt") == ["a", "c"]
    assert values(table, "column 1") == ["0", "1"]
    assert table.notes == ("2 blank lines were skipped",)
    assert lines(table) == [2, 5]


def test_delimiters_are_those_that_are_set(tmp_path: Path) -> None:
    for name, content, delimiter in (
        ("a.csv", "prompt;completion\na,b;c\n", ";"),
        ("a.tsv", "prompt\tcompletion\na,b\tc\n", None),
        ("b.csv", "prompt|completion\na,b|c\n", "|"),
    ):
        table = read(tmp_path, name, content, delimiter=delimiter)
        assert (values(table, "prompt"), values(table, "completion")) == (["a,b"], ["c"])

    assert values(read(tmp_path, "c.csv", "a;b\nx\n", delimiter=","), "a;b") == ["x"]


# -- encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "cp1252", "latin-1", "utf-16", "utf-16-le", "utf-32"]
)
def test_an_encoding_that_is_set_reads_the_text(name: str, encoding: str, tmp_path: Path) -> None:
    text = "caf\u00e9 \u00fc"
    content = {
        "a.csv": f"text\n{text}\n",
        "a.jsonl": f'{{"text": "{text}"}}\n',
        "a.json": f'[{{"text": "{text}"}}]',
        "a.txt": f"{text}\n",
    }[name]
    data = content.encode(encoding)
    assert values(
        read(tmp_path, name, data, "utf-8" if encoding == "utf-8-sig" else encoding), "text"
    ) == [text]


@pytest.mark.parametrize(
    ("data", "encoding", "message"),
    [
        (
            '{"t": "a"}\n{"t": "caf\u00e9"}\n'.encode("cp1252"),
            "utf-8",
            r'a.jsonl, line 2 \(byte 22 of the file is 0xe9: .*\): is no text of utf-8; .*"cp1252" '
            r'\(or "latin-1"\)',
        ),
        ('{"t": "\u4f60\u597d"}'.encode("gb18030"), "utf-8", '"gb18030" .or "shift_jis"'),
        (
            '{"t": "a"}'.encode("utf-16"),
            "utf-8",
            'begins with the mark of utf-16-le, not utf-8; set data.encoding = "utf-16"',
        ),
        *(
            (
                mark + '{"t": "a"}'.encode(name),
                other,
                f'the mark of {name}, not {other}; set data.encoding = "{name[:6]}"',
            )
            for mark, name, other in (
                (codecs.BOM_UTF16_LE, "utf-16-le", "utf-16-be"),
                (codecs.BOM_UTF16_BE, "utf-16-be", "utf-16-le"),
                (codecs.BOM_UTF32_LE, "utf-32-le", "utf-32-be"),
                (codecs.BOM_UTF32_BE, "utf-32-be", "utf-32-le"),
                (codecs.BOM_UTF32_LE, "utf-32-le", "utf-16-le"),
                (codecs.BOM_UTF16_LE, "utf-16-le", "utf-8-sig"),
            )
        ),
        ('{"t": "a"}'.encode("utf-16-be"), "utf-16", 'set data.encoding = "utf-16-be"'),
        ('{"t": "a"}'.encode("utf-16-le"), "utf-16-be", 'set data.encoding = "utf-16-le"'),
        ('{"t": "a"}'.encode("utf-32-le"), "utf-16", 'set data.encoding = "utf-32-le"'),
        ('{"t": "a"}'.encode("utf-32-be"), "utf-8", 'set data.encoding = "utf-32-be"'),
        (
            '{"t": "a"}'.encode("utf-8-sig"),
            "latin-1",
            'begins with the mark of utf-8, .* data.encoding = "utf-8"',
        ),
        (
            '{"t": "a"}'.encode("utf-16-le"),
            "utf-8",
            'line 1: holds a NUL .* data.encoding = "utf-16-le"',
        ),
        (
            '{"t": "\u201ca\u201d"}'.encode("cp1252"),
            "latin-1",
            'byte 0x93 is no character .* = "cp1252"',
        ),
        (b'{"t": "a"}\n{"t": "\0"}', "utf-8", "line 2: holds a NUL character"),
        ('{"t": "\u00fc'.encode()[:-1], "utf-8", "unexpected end of data"),
    ],
)
def test_bytes_that_do_not_fit_are_named_with_a_proposal(
    data: bytes, encoding: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, "a.jsonl", data, encoding)


def test_an_encoding_of_bytes_is_no_encoding_of_text() -> None:
    assert all(
        known_encoding(name)
        for name in ("utf-8", "UTF8", "cp1252", "shift_jis", "utf-16", "koi8-r")
    )
    assert not any(
        known_encoding(name)
        for name in ("base64", "rot13", "idna", "unicode_escape", "x", "", "a\0")
    )


# -- what cannot be read -------------------------------------------------------------------------


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("xl/workbook.xml", "x")
    return buffer.getvalue()


REFUSED: list[tuple[str, str | bytes, str]] = [
    ("a.csv", "", "a.csv: is empty"),
    ("a.csv", "\n \n\n", "the header is blank"),
    ("a.jsonl", "\n\n  \n", "a.jsonl: holds no record .3 blank lines"),
    ("a.txt", "\n\n", "a.txt: holds no record .2 blank lines"),
    ("a.csv", HEAD, "a.csv: holds no record"),
    ("a.csv", zipped(), "is a zip archive, such as an Excel file .*: save it as CSV"),
    ("a.jsonl", gzip.compress(b"{}"), "is compressed by gzip, not text: unpack it"),
    ("a.csv", b"PAR1....", "is a parquet file, not text: give it the suffix .parquet"),
    ("a.csv", b"\xd0\xcf\x11\xe0\xa1", "is an old Office file"),
    ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ("a.csv", "<!DOCTYPE html><html>", "is a page of HTML"),
    ("a.csv", ' {\n "a": 1}', "begins as JSON does; give it the suffix .json"),
    ("a.csv", '[{"a": 1}]', "begins as JSON does; give it the suffix .json"),
    (
        "a.csv",
        "sep=;\na;b\n1;2\n",
        "line 1: is a hint for Excel; remove the line and set data.delimiter",
    ),
    (
        "a.csv",
        "prompt;completion\na;b\n",
        'line 1: .*if a semicolon separates its columns, set data.delimiter = ";"',
    ),
    ("a.csv", "a\tb\n1\t2\n", r'if a tab separates its columns, set data.delimiter = "\\t"'),
    (
        "a.csv",
        '"a";"b"\n"1";"2"\n',
        'line 1: .*if a semicolon separates the columns, set data.delimiter = ";"',
    ),
    ("a.csv", "a,b,a\n1,2,3\n", "line 1: the header names 'a' twice"),
    ("a.csv", HEAD + "a,b\nc\n", "a.csv, line 3: has 1 cells, the header has 2"),
    ("a.csv", HEAD + "a,b,c\n", "a.csv, line 2: has 3 cells, the header has 2"),
    (
        "a.csv",
        HEAD + 'a,b\nc,"d\ne,f\n',
        "row that begins in line 3 is broken at the end of the file",
    ),
    ("a.csv", HEAD + 'a,"b"c\n', "row that begins in line 2 is broken at line 2: a comma expected"),
    ("a.csv", HEAD + 'a, "b"\n', "line 2: a blank stands before the opening quote"),
    (
        "a.csv",
        HEAD + "a,b\n" + HEAD + "c,d\n\ufeffcompletion, prompt\n",
        "2 times: repeats the header, .* remove it: .*a.csv, lines 3, 5",
    ),
    ("a.tsv", "text\na\ntext\nb\n", "a.tsv, line 3: repeats the header"),
    ("a.csv", ",b\n1,2\n,b\n", "a.csv, line 3: repeats the header"),
    *(
        (name, content, f"{name}, line {line}: begins with a byte order mark, .* remove the mark")
        for name, content, line in (
            ("a.csv", HEAD + "a,b\n\ufeffc,d\n", 3),
            ("a.txt", "one\n\ufefftwo\n", 2),
            ("a.txt", b"\xef\xbb\xbf\xef\xbb\xbfone\n", 1),
            ("a.jsonl", '{"a": 1}\n\ufeff{"a": 2}\n', 2),
        )
    ),
    (
        "a.jsonl",
        '{"a": 1}\n{"a" 1}\n',
        r"a.jsonl, line 2 \(Expecting ':' delimiter at character 6\) is not JSON",
    ),
    ("a.jsonl", '{"a": 1}{"a": 2}\n', r"line 1 \(Extra data at character 9\) is not JSON"),
    ("a.jsonl", '{"a": "b\tc"}\n', r"line 1 \(Invalid control character .*\) is not JSON"),
    ("a.jsonl", '{"a": 1, "b": 2, "a": 3}\n', "line 1 has the field 'a' twice in one object"),
    ("a.jsonl", '{"a": {"b": 1, "b": 2}}\n', "line 1 has the field 'b' twice"),
    ("a.jsonl", "[1, 2]\n{}\n", "line 1 holds a list; a record is an object"),
    ("a.jsonl", '"text"\n', "line 1 holds a single value"),
    (
        "a.jsonl",
        '[{"a": 1},\n{"a": 2}]\n',
        "is one JSON document, .*; write it so, or give it the suffix .json",
    ),
    ("a.jsonl", '{\n "a": 1\n}\n', "is one JSON document"),
    ("a.jsonl", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is nested too deeply"),
    ("a.json", '{"train": [{}], "test": [{}]}', "has 2 lists, in the fields 'train', 'test'"),
    ("a.json", "{}", "has no list"),
    ("a.json", '{"prompt": ["a"], "completion": ["b"]}', "has 2 lists, in the fields 'prompt'"),
    ("a.json", "[]", "holds no record"),
    ("a.json", "7", "has no list"),
    ("a.json", '[{"a": 1},\n 5]', "a.json, line 2 holds a single value"),
    (
        "a.json",
        '[{"a": 1},\n]',
        "a.json, line 2 .Expecting value at character 1 of the line. is not",
    ),
    (
        "a.json",
        '[{"a": 1}\n{"a": 1}]',
        "a.json, line 2 .Expecting ',' at character 1 of the line. is not",
    ),
    ("a.json", '[\n{"a": 1, "a": 1}]', "a.json, line 2 has the field 'a' twice"),
    ("a.json", "[" * 100_000, "line 1 is nested too deeply"),
    ("a.parquet", b"abc", "is not a parquet file"),
    ("a.parquet", b"PAR1abc", "is a damaged parquet file"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), REFUSED, ids=[f"{n}-{m[:30]}" for n, _, m in REFUSED]
)
def test_what_cannot_be_read_is_said_with_place_and_remedy(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, name, content)


def test_an_object_without_a_list_is_one_record(tmp_path: Path) -> None:
    """Whatever its fields are called, and whether they hold objects."""
    table = read(tmp_path, "a.json", '{"frage": "x", "meta": {"clinic": "n"}}')
    assert [row.fields for row in table.rows] == [{"frage": "x", "meta": {"clinic": "n"}}]


def test_all_broken_lines_are_told_and_counted_beyond_twenty(tmp_path: Path) -> None:
    rows = "".join("1," * (3 + number) + "secret\n" for number in range(30))
    with pytest.raises(DataError) as caught:
        read(tmp_path, "a.csv", f"a,b\n{rows}")
    told = str(caught.value).splitlines()
    assert told[0] == "30 faults in the data:"
    assert [line.partition(", ")[2].split()[1] for line in told[1:21]] == [
        f"{number}:" for number in range(2, 22)
    ]
    assert told[21:] == ["and 10 more"]
    assert "secret" not in str(caught.value)


def test_a_name_that_could_drive_a_terminal_is_escaped(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, "\x1b[31ma.csv", "a\x1b[2J,a\x1b[2J\n1,2\n")
    assert "\x1b" not in str(caught.value)
    assert r"\x1b[2J" in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_a_pipe_is_refused_at_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: is no regular file but a pipe"):
        read_file(tmp_path / name, Reading())


def test_faults_are_the_same_in_another_process() -> None:
    error = DataError(["a.csv, line 2: is wrong", "b.csv, line 3: is wrong"], 7)
    again = pickle.loads(pickle.dumps(error))
    assert (again.faults, again.count, str(again)) == (error.faults, 7, str(error))
