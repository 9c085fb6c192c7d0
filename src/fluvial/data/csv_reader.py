"""The reader of CSV and its kin; a value is text, exactly as written."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fluvial.data.faults import DataError, Faults, shown
from fluvial.data.files import read_text
from fluvial.data.reading import LINE_END, MARK, MARKED, Reading, skipped
from fluvial.data.rows import Place, Row, Table, without_faults
from fluvial.formatting import safe_line

DELIMITERS = ",;\t|"
JSON = re.compile(r"\{\s*[\"}]|\[\s*[\[{\]]")
"""Begin of an object, or of a list of objects or lists."""


def read_delimited(path: Path, reading: Reading) -> Table:
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

    with faults.catch():  # a broken row ends the table
        for number, cells in lines:
            place = Place(str(path), "line", number)
            if not any(cell.strip() for cell in cells):
                blank += 1
                continue

            fault = _fault_of(cells, header, delimiter)
            if fault is None:
                rows.append(Row(dict(zip(columns, cells, strict=True)), place))
            else:
                faults.add(f"{place}: {fault}", place)

    table = Table(str(path), path.suffix.lower(), rows, columns, skipped(blank))
    return without_faults(table, faults)


def _fault_of(cells: Sequence[str], header: Sequence[str], delimiter: str) -> str | None:
    """Return what is wrong with a row, None for a good one."""
    if _names(cells) == _names(header):
        return "repeats the header, as in files that were joined; remove it"
    if cells[0].startswith(MARK):
        return MARKED
    if len(cells) != len(header):
        return (
            f"has {len(cells)} cells, the header has {len(header)}; put a cell that holds "
            f"{_spoken(delimiter)}, a quote or a line break in double quotes"
        )
    if any(
        cell.lstrip()[:1] == '"' and cell[:1] in " \t" and cell.rstrip()[-1:] == '"'
        for cell in cells
    ):
        return "a blank stands before the opening quote of a cell; remove it"

    return None


def _names(cells: Sequence[str]) -> list[str]:
    """Return the names that `cells` hold as a header, in an order of their own."""
    return sorted(cell.removeprefix(MARK).strip() for cell in cells)


def _other_delimiter(text: str, reading: Reading) -> str:
    """Return a hint for a header of quoted names with another delimiter between them."""
    first = LINE_END.split(text.lstrip(), maxsplit=1)[0]
    others = [other for other in DELIMITERS if f'"{other}"' in first]

    if reading.delimiter is not None or not others:
        return ""
    return (
        f"; if {_spoken(others[0])} separates the columns, set data.delimiter = "
        f"{json.dumps(others[0])}"
    )


def _csv_rows(name: str, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the cells of each row; raise `DataError` for an open quote."""
    before = csv.field_size_limit(max(len(text), 2**17))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1

    try:
        for cells in reader:
            yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        end = "the end of the file" if "unexpected end" in str(error) else f"line {reader.line_num}"
        why = str(error).replace(f"'{delimiter}'", _spoken(delimiter))
        raise DataError(
            [
                f"{name}: the row that begins in line {start} is broken at {end}: {why}; close "
                "each double quote, and write a double quote within a cell twice"
            ]
        ) from None
    finally:
        csv.field_size_limit(before)


def _refuse_other_text(name: str, text: str) -> None:
    start = text.lstrip()[:200].lower()
    if JSON.match(start):
        raise DataError(
            [
                f"{name}: begins as JSON does; give it the suffix .json, or .jsonl for a record on "
                "each line"
            ]
        )

    if start.startswith(("<!doctype", "<html", "<?xml")):
        raise DataError([f"{name}: is a page of HTML or XML, not CSV; fetch the file itself"])
    if re.match(r"sep=.[\r\n]", start):
        raise DataError(
            [f"{name}, line 1: is a hint for Excel; remove the line and set data.delimiter instead"]
        )


def _header(place: str, header: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the columns; a column without a name gets its number."""
    if not any(name.strip() for name in header):
        raise DataError([f"{place}: the header is blank; the first line must name the columns"])

    columns = tuple(name or _unnamed(number, header) for number, name in enumerate(header, start=1))
    for name in columns:
        if columns.count(name) > 1:
            raise DataError(
                [f"{place}: the header names {shown(name)} twice; rename one of the two columns"]
            )

    return columns


def _unnamed(number: int, header: Sequence[str]) -> str:
    """Return the name of a column without one, which none of the header has."""
    name = f"column {number}"
    while name in header:
        name += " (no name)"
    return name


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
