"""Readers of local files by suffix: JSON lines, JSON, CSV, parquet, plain text.

None of them guesses a type.
"""

from collections.abc import Callable
from pathlib import Path

from fluvial.data.csv_reader import read_delimited
from fluvial.data.faults import DataError, Faults
from fluvial.data.files import read_bytes, read_text
from fluvial.data.json_reader import read_document, read_lines
from fluvial.data.parquet_reader import read_parquet
from fluvial.data.reading import LINE_END, MARK, MARKED, Reading, skipped
from fluvial.data.rows import Place, Row, Table, without_faults
from fluvial.formatting import safe_line


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


def read_json(path: Path) -> Table:
    """Return the rows of a file of JSON lines or, with the suffix .json, of a JSON list, whose form
    no setting changes.

    Raise `DataError` for what cannot be read.
    """
    _check_utf8(path)
    reading = Reading()
    return _filled(
        path,
        read_document(path, reading)
        if path.suffix.lower() == ".json"
        else read_lines(path, reading),
    )


def _check_utf8(path: Path) -> None:
    """Raise `DataError` for a file of another encoding, whose remedy cannot be a setting."""
    data = read_bytes(path)
    try:
        data.decode()
        end = data.find(0)
    except UnicodeDecodeError as error:
        end = error.start
    if end >= 0:
        line = data.count(b"\n", 0, end) + 1
        raise DataError(
            [
                f"{safe_line(str(path))}, line {line} (byte {end + 1} of the file is "
                f"0x{data[end]:02x}): is no text of UTF-8; save it anew as UTF-8"
            ]
        )


def _text(path: Path, reading: Reading) -> Table:
    """Read one record from each line that is not blank."""
    lines = LINE_END.split(read_text(path, reading.encoding))
    blank = sum(not line.strip() for line in lines) - (not lines[-1])
    faults = Faults()
    for number, line in enumerate(lines, start=1):
        if line.startswith(MARK):
            place = Place(str(path), "line", number)
            faults.add(f"{place}: {MARKED}", place)

    rows = [
        Row({"text": line}, Place(str(path), "line", number))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]

    return without_faults(Table(str(path), ".txt", rows, ("text",), skipped(blank)), faults)


READERS: dict[str, Callable[[Path, Reading], Table]] = {
    ".jsonl": read_lines,
    ".json": read_document,
    ".csv": read_delimited,
    ".parquet": read_parquet,
    ".txt": _text,
    ".tsv": read_delimited,
    ".ndjson": read_lines,
}
"""The reader of each suffix."""
