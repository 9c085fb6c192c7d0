"""Thin readers of local files: JSON lines, JSON, CSV, parquet, plain text. None of them guesses a
type.

A value of JSON keeps its type, with numbers as they are written; a value of CSV is always text,
exactly as written.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import Any

from fluvial.data.faults import DataError, Faults, listed, shown
from fluvial.data.files import UTF8, read_bytes, read_text
from fluvial.data.rows import Number, Place, Row, Table, columns_of, typed
from fluvial.formatting import safe_line

LINE_END = re.compile(r"\r\n|\r|\n")
"""Ends of lines; not U+2028 and others, which may stand within a JSON text."""
DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class Reading:
    """Settings by which a file is read."""

    encoding: str = UTF8
    delimiter: str | None = None
    """Delimiter of CSV; None for the comma, in a .tsv file the tab."""


def read_file(path: Path, reading: Reading) -> Table:
    """Return the rows of a file by its suffix, each with its line.

    Raise `DataError` with the file, the lines and the remedy of everything that cannot be read.
    """
    return _filled(path, READERS[path.suffix.lower()](path, reading))


def _filled(path: Path, table: Table) -> Table:
    if not table.rows:
        blank = f" ({table.notes[0]})" if table.notes else ""
        raise DataError([f"{safe_line(str(path))}: holds no record{blank}"])

    return table


def read_json(path: Path, encoding: str = UTF8) -> Table:
    """Return the rows of a file of JSON lines or, with the suffix .json, of a JSON list; raise
    `DataError`."""
    reading = Reading(encoding)
    return _filled(
        path, _json(path, reading) if path.suffix.lower() == ".json" else _jsonl(path, reading)
    )


# -- JSON ----------------------------------------------------------------------------------------
# -------------------


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"has the field {shown(twice)} twice in one object; keep one of the two")

    return found


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=Number, parse_float=Number, parse_constant=Number
)
_STRICT = "; JSON has no comments, no comma after a last element, and texts in double quotes"
_BLANK = re.compile(r"[ \t\r\n]*")


def _jsonl(path: Path, reading: Reading) -> Table:
    text = read_text(path, reading.encoding)
    return _json_lines(path, text)


def _json_lines(path: Path, text: str) -> Table:
    rows = list[Row]()
    faults = Faults()
    blank = 0

    for number, line in enumerate(LINE_END.split(text), start=1):
        place = Place(str(path), "line", number)
        if not line.strip():
            blank += 1
            continue

        try:
            rows.append(Row(_record(_loads(line)), place))
        except ValueError as error:
            faults.add(f"{place} {_why(error)}")

    if faults.count and text.lstrip()[:1] in "[{" and _is_document(text):
        raise DataError(
            [
                f"{safe_line(str(path))}: is one JSON document, not one record on each line; give it the suffix .json"
            ]
        )

    faults.raise_any()
    return Table(
        str(path), ".jsonl", rows, columns_of(rows), _skipped(blank - text.endswith(("\n", "\r")))
    )


def _skipped(blank: int) -> tuple[str, ...]:
    return (f"{blank} blank lines were skipped",) if blank > 0 else ()


def _loads(line: str) -> Any:
    try:
        return _DECODER.decode(line)
    except RecursionError:
        raise ValueError("is nested too deeply for a record") from None


def _is_document(text: str) -> bool:
    try:
        _loads(text)
    except ValueError:
        return False

    return True


def _record(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    kind = "list" if isinstance(value, list) else "single value"
    raise ValueError(f"holds a {kind}; a record is an object with named fields")


def _why(error: ValueError) -> str:
    """Return what is wrong with a text of JSON, without any of the text."""
    if isinstance(error, JSONDecodeError):
        return f"is not JSON ({error.msg} at character {error.colno}); write one record on each line{_STRICT}"
    return str(error)


def _json(path: Path, reading: Reading) -> Table:
    """Read a list of records, or an object with one such list, or JSON lines."""
    text = read_text(path, reading.encoding)
    name = safe_line(str(path))

    try:
        found = list(_document(text))
    except JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _json_lines(path, text)
        place = f"{name}, line {error.lineno}"
        fault = f"{place} is not JSON ({error.msg} at character {error.colno} of the line){_STRICT}"
        raise DataError([fault]) from None
    except ValueError as error:
        raise DataError([f"{name}, {error}"]) from None

    lists = {key: items for key, items in found if items is not None}
    if len(lists) != 1:
        raise DataError([f"{name}: {_no_list(lists, [key for key, _ in found])}"])

    (items,) = lists.values()
    return _table_of_items(path, items)


def _no_list(lists: Mapping[str, Any], keys: Sequence[str]) -> str:
    remedy = "write a list of records, [{...}, {...}], or one record on each line of a .jsonl file"
    if lists:
        names = listed(list(lists))
        return f"has {len(lists)} lists, in the fields {names}, and which one has the records is open; {remedy}"

    if keys:
        return f"is an object without a list of records (fields {listed(keys)}); {remedy}"
    return f"has no list; {remedy}"


def _table_of_items(path: Path, items: Sequence[tuple[int, Any]]) -> Table:
    rows = list[Row]()
    faults = Faults()
    for line, value in items:
        place = Place(str(path), "line", line)
        try:
            rows.append(Row(_record(value), place))
        except ValueError as error:
            faults.add(f"{place} {error}")

    faults.raise_any()
    return Table(str(path), ".json", rows, columns_of(rows))


Items = list[tuple[int, Any]]
"""Line and value of each element of a list."""


def _document(text: str) -> Iterator[tuple[str, Items | None]]:
    """Yield each field of the object that `text` holds, with its items if it is a list; a bare list
    has the name ""."""
    start = _after_blank(text, 0)
    if text[start : start + 1] == "[":
        items, end = _items(text, start)
        yield "", items
    elif text[start : start + 1] == "{":
        end = start + 1
        comma = False
        while text[(end := _after_blank(text, end)) : end + 1] != "}":
            end = _expect(text, end, ",") if comma else end
            key, end = _value(text, _after_blank(text, end))
            if not isinstance(key, str):
                raise JSONDecodeError("Expecting a field's name in double quotes", text, end)

            end = _after_blank(text, _expect(text, _after_blank(text, end), ":"))
            if text[end : end + 1] == "[":
                items, end = _items(text, end)
                yield key, items
            else:
                _, end = _value(text, end)
                yield key, None

            comma = True

        end += 1
    else:
        _, end = _value(text, start)

    if _after_blank(text, end) != len(text):
        raise JSONDecodeError("Extra data", text, _after_blank(text, end))


def _items(text: str, start: int) -> tuple[Items, int]:
    """Return the elements of the list that begins at `start`, with their lines, and where it
    ends."""
    items = Items()
    end = start + 1
    line = text.count("\n", 0, start) + 1
    counted = start

    while text[(end := _after_blank(text, end)) : end + 1] != "]":
        if items:
            end = _after_blank(text, _expect(text, end, ","))
        line = line + text.count("\n", counted, end)
        counted = end
        value, end = _value(text, end)
        items.append((line, value))

    return items, end + 1


def _value(text: str, start: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, start) + 1
        why = "is nested too deeply for a record" if isinstance(error, RecursionError) else error
        raise ValueError(f"line {line} {why}") from None


def _expect(text: str, start: int, character: str) -> int:
    if text[start : start + 1] != character:
        raise JSONDecodeError(f"Expecting '{character}'", text, start)
    return start + 1


def _after_blank(text: str, start: int) -> int:
    blank = _BLANK.match(text, start)
    assert blank is not None, "the pattern fits everywhere"
    return blank.end()


# -- CSV -----------------------------------------------------------------------------------------
# -------------------


def _delimited(path: Path, reading: Reading) -> Table:
    """Read a table with a header line; each value is text exactly as written."""
    text = read_text(path, reading.encoding)
    name = safe_line(str(path))
    delimiter = reading.delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    _refuse_other_text(name, text)
    lines = _csv_rows(name, text, delimiter)

    try:
        header_line, header = next(lines, (0, []))
    except DataError as error:
        raise DataError([f"{error}{_other_delimiter(text, reading)}"]) from None

    columns = _header(f"{name}, line {header_line}", header)
    if reading.delimiter is None:
        _refuse_other_delimiter(f"{name}, line {header_line}", columns, delimiter)

    rows = list[Row]()
    faults = Faults()
    blank = 0

    for number, cells in lines:
        place = Place(str(path), "line", number)
        if not any(cell.strip() for cell in cells):
            blank += 1
        elif len(cells) != len(columns):
            faults.add(
                f"{place}: has {len(cells)} cells, the header has {len(columns)}; put a cell that "
                f"holds {_spoken(delimiter)}, a quote or a line break in double quotes"
            )
        elif any(
            cell.lstrip()[:1] == '"' and cell[:1] in " \t" and cell.rstrip()[-1:] == '"'
            for cell in cells
        ):
            faults.add(f"{place}: a blank stands before the opening quote of a cell; remove it")
        else:
            rows.append(Row(dict(zip(columns, cells, strict=True)), place))

    faults.raise_any()
    return Table(str(path), path.suffix.lower(), rows, columns, _skipped(blank))


def _other_delimiter(text: str, reading: Reading) -> str:
    """Return a hint for a header of quoted names with another delimiter between them."""
    first = LINE_END.split(text.lstrip(), maxsplit=1)[0]
    found = [other for other in DELIMITERS if f'"{other}"' in first]

    if reading.delimiter is not None or not found:
        return ""
    return f"; if {_spoken(found[0])} separates the columns, set data.delimiter = {json.dumps(found[0])}"


def _csv_rows(name: str, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the cells of each row; raise `DataError` for a quote that is not
    closed."""
    before = csv.field_size_limit(max(len(text), 2**17))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1

    try:
        for cells in reader:
            yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        end = "the end of the file" if "unexpected end" in str(error) else f"line {reader.line_num}"
        raise DataError(
            [
                f"{name}: the row that begins in line {start} is broken at {end}: {error}; close "
                "each double quote, and write a double quote within a cell twice"
            ]
        ) from None
    finally:
        csv.field_size_limit(before)


def _refuse_other_text(name: str, text: str) -> None:
    start = text.lstrip()[:200].lower()
    if start.startswith(("{", "[")):
        raise DataError(
            [
                f"{name}: begins as JSON does; give it the suffix .json, or .jsonl for a record on each line"
            ]
        )

    if start.startswith(("<!doctype", "<html", "<?xml")):
        raise DataError([f"{name}: is a page of HTML or XML, not CSV; fetch the file itself"])
    if re.match(r"sep=.[\r\n]", start):
        raise DataError(
            [f"{name}, line 1: is a hint for Excel; remove the line and set data.delimiter instead"]
        )


def _header(place: str, header: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the columns; one without a name is called by its number."""
    if not any(name.strip() for name in header):
        raise DataError([f"{place}: the header is blank; the first line must name the columns"])

    columns = tuple(name or f"column {number}" for number, name in enumerate(header, start=1))
    for name in columns:
        if columns.count(name) > 1:
            raise DataError(
                [f"{place}: the header names {shown(name)} twice; rename one of the two columns"]
            )

    return columns


def _refuse_other_delimiter(place: str, columns: Sequence[str], delimiter: str) -> None:
    """Raise `DataError` for a header of one column that another delimiter would split."""
    if len(columns) > 1:
        return

    for other in DELIMITERS:
        if len([part for part in columns[0].split(other) if part.strip()]) > 1:
            fault = (
                f"{place}: the header has one column, {shown(columns[0])}; if {_spoken(other)} "
                f"separates its columns, set data.delimiter = {json.dumps(other)}; if it is one "
                f"name, set data.delimiter = {json.dumps(delimiter)} to say so"
            )
            raise DataError([fault])


def _spoken(delimiter: str) -> str:
    return {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}.get(
        delimiter, repr(delimiter)
    )


# -- other kinds ---------------------------------------------------------------------------------
# -------------------


def _text(path: Path, reading: Reading) -> Table:
    """Read one record from each line that is not blank."""
    lines = LINE_END.split(read_text(path, reading.encoding))
    blank = sum(not line.strip() for line in lines) - (not lines[-1])
    rows = [
        Row({"text": line}, Place(str(path), "line", number))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]

    return Table(str(path), ".txt", rows, ("text",), _skipped(blank))


def _parquet(path: Path, reading: Reading) -> Table:  # noqa: ARG001 - parquet says its own encoding
    import pyarrow
    from pyarrow import parquet

    data = read_bytes(path)
    name = safe_line(str(path))

    if not data.startswith(b"PAR1"):
        raise DataError([f"{name}: is not a parquet file; give it the suffix of what it is"])

    try:
        table = parquet.read_table(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            [f"{name}: is a damaged parquet file ({type(error).__name__}); copy it again"]
        ) from error

    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(each for each in names if names.count(each) > 1)
        raise DataError([f"{name}: has two columns {shown(twice)}; rename one of them"])

    columns = [_values(name, each, table.column(each)) for each in names]
    found = (dict(zip(names, record, strict=True)) for record in zip(*columns, strict=True))
    rows = [
        Row(record, Place(str(path), "row", number)) for number, record in enumerate(found, start=1)
    ]

    return Table(str(path), ".parquet", rows, tuple(names))


def _short(value: Any, kind: str) -> Any:
    """Return a value of a column of pyarrow's type `kind`, a short float with the digits that its
    type has."""
    import numpy

    if kind not in ("halffloat", "float") or value is None or not math.isfinite(value):
        return value
    return Number(str((numpy.float16 if kind == "halffloat" else numpy.float32)(value)))


def _values(file: str, name: str, column: Any) -> list[Any]:
    """Return the values of a column of pyarrow; raise `DataError` for those that Python has no type
    for."""
    import pyarrow

    try:
        return [typed(_short(value, str(column.type))) for value in column.to_pylist()]
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        fault = (
            f"{file}: column {shown(name)} of type {column.type} holds a value that cannot be read "
            f"({type(error).__name__}); write it as text, or remove the column"
        )
        raise DataError([fault]) from error


READERS: dict[str, Callable[[Path, Reading], Table]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _delimited,
    ".parquet": _parquet,
    ".txt": _text,
    ".tsv": _delimited,
    ".ndjson": _jsonl,
}
"""The reader of each suffix."""
