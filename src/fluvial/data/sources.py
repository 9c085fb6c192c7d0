"""Sources of records: a file, a folder of files, a saved data set or a hub id, as tables of
rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fluvial.data.config import ReadingSettings
from fluvial.data.faults import DataError, Faults, shown
from fluvial.data.fields import encodable
from fluvial.data.folder import KNOWN, UNREADABLE, files_within
from fluvial.data.forms import Form, resolve
from fluvial.data.hub import dataset_of
from fluvial.data.parquet_reader import rows_of
from fluvial.data.partition import Drawn, Iid
from fluvial.data.read_as import form_read, read_as
from fluvial.data.readers import READERS, read_file
from fluvial.data.reading import Reading
from fluvial.data.record_reader import RecordReader
from fluvial.data.records import Record, Text
from fluvial.data.rows import FaultyRowsError, Number, Row, Table, columns_of, described
from fluvial.errors import ConfigError
from fluvial.formatting import safe_line
from fluvial.storage.files import exists, expanded

DELIMITED = (".csv", ".tsv")
DICT = "dataset_dict.json"
"""Name of the file that makes a saved folder one with splits."""
SAVED = ("dataset_info.json", DICT)


@dataclass(frozen=True)
class Source:
    """A source of records, as the settings name it."""

    where: str
    """Name of the setting, such as "data.source"."""
    name: str
    split: str
    reading: ReadingSettings
    strict: bool = True
    """True if a setting without effect is a mistake; false where [data] was written for another
    file."""

    @property
    def given(self) -> frozenset[str]:
        """Settings of reading that were written for this source."""
        return self.reading.own | (self.reading.model_fields_set if self.strict else frozenset())


@dataclass(frozen=True)
class Entry:
    """A record and its value in the partition's column."""

    record: Record
    row: Row


@dataclass
class Found:
    """The records of a source."""

    entries: list[Entry]
    notes: list[str]
    forms: list[Form] = field(default_factory=list)
    """Forms of the source's records, as they are read (`data.read_as`)."""
    changed: bool = False
    """True where `data.read_as` reads some records in another form than the file's."""


def is_local(name: str) -> bool:
    """Return true for a name that means a file or folder, be it there or not."""
    path = expanded(name)
    return (
        exists(path)
        or name.startswith((".", "/", "~"))
        or path.suffix.lower() in {*READERS, *UNREADABLE}
    )


def is_saved(path: Path) -> bool:
    """Return true for a folder that `save_to_disk` wrote."""
    return any(exists(path / name) for name in SAVED)


def has_splits(name: str) -> bool:
    """Return true for a hub id and for a saved `DatasetDict`; anything else is read whole."""
    return not is_local(name) or exists(expanded(name) / DICT)


def read_source(source: Source, faults: Faults) -> Found:
    """Return all records of a source; faults of its files go to `faults`."""
    found = _joined(_records(table, source, faults) for table in tables(source, faults))
    if not found.entries and not faults.count:
        raise DataError([f"{source.where}: {source.name!r} holds no record with a text"])
    return found


def read_each(source: Source, faults: Faults) -> dict[str, Found]:
    """Return the records of each file of a folder, by the file's name without its suffix."""
    by_file: dict[str, Found] = {}
    files = _files(source, one_kind=False)
    reading = _reading(source, files)

    for path in files:
        if path.stem in by_file:
            raise ConfigError(
                f"{source.where}: {source.name!r} holds two files for site {shown(path.stem)}; "
                "rename one or join them"
            )

        read = _readable(path, reading, source, faults)
        by_file[path.stem] = _joined(_records(table, source, faults) for table in read)

    return by_file


def _joined(parts: Iterable[Found]) -> Found:
    found = Found([], [])
    for part in parts:
        found.entries += part.entries
        found.notes += part.notes
        found.forms += part.forms
        found.changed |= part.changed

    return found


# -- tables --------------------------------------------------------------------------------------
# -------------------


def tables(source: Source, faults: Faults) -> list[Table]:
    """Return the rows of each file of a source, or of its data set; faults go to `faults`."""
    if not is_local(source.name) or is_saved(expanded(source.name)):
        return [_data_set(source)]

    read = list[Table]()
    files = _files(source)
    reading = _reading(source, files)

    for path in files:
        read += _readable(path, reading, source, faults)

    return read


def _readable(path: Path, reading: Reading, source: Source, faults: Faults) -> list[Table]:
    """Return a file's rows, as far as they can be read, as a table; the rest goes to `faults`."""
    try:
        return [read_file(path, reading)]
    except FaultyRowsError as error:
        faults.include(_placed(error, source), safe_line(str(path)))
        return [error.table] if error.table.rows else []
    except DataError as error:
        faults.include(_placed(error, source), safe_line(str(path)))
        return []


def _placed(error: DataError, source: Source) -> DataError:
    """Return the faults of a file with the settings of its own source in their remedies."""
    own = source.where.removesuffix("_source")
    if own not in ("data.heldout", "data.public"):
        return error
    faults = [
        replace(fault, text=fault.text.replace("data.encoding", f"{own}.encoding"))
        for fault in error.groups
    ]
    return DataError(faults, error.count)


def _files(source: Source, *, one_kind: bool = True) -> list[Path]:
    """Return the files of a source, with `one_kind` all of the same suffix."""
    path = expanded(source.name)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{source.where}: there is no file or folder {source.name!r}") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{source.where}: {shown(source.name)} cannot be read: {why}") from error

    where = f"{source.where}: folder {source.name!r}"
    files = files_within(path, where) if path.is_dir() else [path]
    kinds = {file.suffix.lower() for file in files}
    if (one_kind and len(kinds) != 1) or not kinds <= set(READERS):
        hint = "; unpack it, or save it as CSV" if kinds & UNREADABLE else ""
        if len(kinds & set(READERS)) > 1:
            hint += "; sites with files of other kinds have a source each: data.by_site"
        raise ConfigError(
            f"{source.where}: {source.name!r} must hold files of one kind among {KNOWN}{hint}"
        )

    return files


def _reading(source: Source, files: Sequence[Path]) -> Reading:
    """Return the settings to read the files with; raise `ConfigError` for one without effect."""
    reading = source.reading
    kinds = {path.suffix.lower() for path in files}

    if (
        reading.delimiter is not None
        and kinds.isdisjoint(DELIMITED)
        and "delimiter" in source.given
    ):
        raise ConfigError(
            f"data.delimiter: without effect, because {source.name!r} is no CSV; remove it"
        )

    if reading.encoding != "utf-8" and kinds == {".parquet"} and "encoding" in source.given:
        raise ConfigError(
            f"data.encoding: without effect, because {source.name!r} is parquet; remove it"
        )

    return Reading(reading.encoding, reading.delimiter)


def _data_set(source: Source) -> Table:
    """Return a saved data set, or one of the hub, as a table."""
    found = dataset_of(source.name, source.split, source.where)
    name = source.name
    rows = rows_of(found.with_format("arrow")[:], name, "record")
    if not rows:
        raise ConfigError(f"{source.where}: {name!r} is empty")

    return Table(name, "data set", rows, columns_of(rows))


# -- records -------------------------------------------------------------------------------------
# -------------------


def _records(table: Table, source: Source, faults: Faults) -> Found:
    """Return the records of a table; faults of its rows go to `faults`, empty texts are left
    out."""
    name = safe_line(table.name)
    found = Found([], [f"{name}: {note}" for note in table.notes])

    try:
        reader = _reader(table, source)
    except ConfigError as error:
        faults.include(error, name)
        return found

    wanted = source.reading.read_as
    found.forms.append(form_read(reader.form, wanted))
    found.changed = found.forms[-1] != reader.form
    empty = 0
    own = Faults()
    for row in table.rows:
        try:
            record = read_as(reader.read(row.place, row.cells), wanted)
        except ConfigError as error:
            own.include(error, row.place)
            continue

        if isinstance(record.content, Text) and not record.content.text.strip():
            empty += 1
            continue

        found.entries.append(Entry(record, row))

    faults.include_all(own)
    for (key, unit), count in sorted(reader.unread.items()):
        found.notes.append(
            f"{name}: the field {shown(key)} of {count} {unit} is no part of the text"
        )
    if empty:
        found.notes.append(f"{name}: {empty} records with an empty text were left out")

    return found


def _reader(table: Table, source: Source) -> RecordReader:
    """Return the reader of a table's rows, by the settings of its source."""
    reading = source.reading
    where = f"{safe_line(table.name)} ({source.where})"

    if table.kind == ".txt":
        return RecordReader(_form_of_text(source, where), {})

    columns = reading.columns
    try:
        form = resolve(reading.form, columns, table.columns, where)
    except ConfigError as error:
        if columns and "columns" not in source.given:
            own = source.where.removesuffix("_source")
            remedy = f"set {own} = {{ columns = {{}} }}"
            if own == "data.source":  # of a site with a table of its own
                remedy = "set data.columns = {}"
            if own.startswith("--"):  # an option of a command, beside settings that a run wrote
                remedy = "add --set 'data.columns={}'"
            raise ConfigError(f"{error}. If this file has other columns, {remedy}") from None

        raise

    return RecordReader(form, columns, reading.numbers)


def _form_of_text(source: Source, where: str) -> Form:
    reading = source.reading
    if reading.form not in ("auto", "text") and "form" in source.given:
        raise ConfigError(
            f"{where}: data.form = {reading.form!r}, and a txt file is plain text; remove it"
        )

    if reading.columns and "columns" in source.given:
        raise ConfigError(f"{where}: data.columns: a txt file has no columns; remove it")

    return "text"


# -- sites ---------------------------------------------------------------------------------------
# -------------------


def classes_of(
    entries: Sequence[Entry], partition: Drawn, where: str, faults: Faults
) -> list[str] | None:
    """Return the text of the partition's column for each entry, None without such a column.

    Text stays as it is written, and a number of JSON is its text in the file. Rows without a value
    go to `faults`.
    """
    if isinstance(partition, Iid):
        return None

    column = partition.column
    columns = columns_of([entry.row for entry in entries])
    if column not in columns:
        raise ConfigError(
            f"data.partition.column={column!r}: {where} has the columns "
            f"{', '.join(map(_bare, columns))}"
        )

    classes = []
    for entry in entries:
        try:
            classes.append(_class_of(entry.row, column))
        except ConfigError as error:
            faults.include(error, entry.row.place)

    return classes


def _bare(name: str) -> str:
    return shown(name)[1:-1]


def _class_of(row: Row, column: str) -> str:
    name = f"{row.place}: data.partition.column={shown(column)}"
    if column not in row.cells:
        raise ConfigError(f"{name}: the record has no such field; add it, or remove the record")

    value: Any = row.cells[column]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Number) and value.finite:
        return value.text
    if not isinstance(value, str):
        raise ConfigError(
            f"{name}: must be text or a number, and is {described(value)}; write the site's name"
        )

    if not value.strip():
        raise ConfigError(f"{name}: is empty; write the site's name, or remove the record")
    if value != safe_line(value):
        raise ConfigError(f"{name}: holds a control character; remove it")

    return encodable(row.place, f"column {shown(column)}", value)
