"""Facts about records: how their files are read, their form, and the sites they belong to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fluvial.data.config import DataConfig
from fluvial.data.faults import Faults
from fluvial.data.forms import CONVERSATIONS, REQUIRED_FIELDS, Form
from fluvial.data.read_as import ReadAs, form_read, read_as
from fluvial.data.record_reader import RecordReader
from fluvial.data.records import Record
from fluvial.data.rows import Number, Row, Table, columns_of
from fluvial.data.sources import Source, is_local, tables
from fluvial.errors import ConfigError
from fluvial.runs.proposal.columns import form_of, guessed_columns
from fluvial.runs.proposal.file_reading import usual_reading
from fluvial.runs.proposal.undecided import TURNS, has_turns, unknown_columns
from fluvial.storage import toml
from fluvial.storage.files import expanded
from fluvial.storage.paths import BUNDLED

Ask = Callable[["RecordFiles"], Mapping[str, str]]
"""Question for the columns to rename: our field = the file's column."""
SAMPLE = 2000
"""Records that are tokenised to know their lengths."""


@dataclass(frozen=True)
class RecordFiles:
    """The rows of a source, as they were read."""

    source: str
    local: bool
    """True for a file or folder, whose path is relative to the file that names it."""
    reading: Mapping[str, str]
    """Settings of [data] that its files need: encoding, delimiter."""
    tables: tuple[Table, ...]
    site: str | None = None
    """Name of the site whose source this is, where the caller gives one."""

    @cached_property
    def rows(self) -> list[Row]:
        """Return the rows of all files."""
        return [row for table in self.tables for row in table.rows]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Return the names of all columns."""
        return columns_of([row for table in self.tables for row in table.rows[:1000]])


@dataclass(frozen=True)
class DataFacts:
    """Facts about the records of a source."""

    files: RecordFiles
    form: Form
    columns: Mapping[str, str]
    """Columns to rename: our field = the file's column."""
    numbers: bool
    """True where a text is a JSON number or boolean."""
    read_as: ReadAs | None = field(default=None, kw_only=True)
    """Form that the records are read as, where it is not their own."""

    @property
    def source(self) -> str:
        """Return the name of the source."""
        return self.files.source

    @property
    def rows(self) -> list[Row]:
        """Return the rows of all files."""
        return self.files.rows

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all columns."""
        return self.files.names

    @property
    def forms(self) -> str:
        """Return the forms of the records in words."""
        return self.form

    @property
    def is_conversation(self) -> bool:
        """True where a chat template renders the records."""
        return form_read(self.form, self.read_as) in CONVERSATIONS

    @property
    def texts(self) -> Sequence[str]:
        """Return the fields that a record of this form must have."""
        return REQUIRED_FIELDS[self.form]

    @property
    def other_columns(self) -> list[str]:
        """Return the columns that are no text of a record."""
        used = {self.columns.get(field, field) for field in self.texts}
        return [name for name in self.names if name not in used]

    def sample(self) -> list[Record]:
        """Return at most `SAMPLE` records, evenly spaced; faulty ones are left to `check`."""
        return self._records(self.rows[:: max(1, len(self.rows) // SAMPLE)], Faults())

    def records(self) -> list[Record]:
        """Return all records that can be read."""
        return self._records(self.rows, Faults())

    def include_faults(self, faults: Faults) -> None:
        """Add the faults of all records to `faults`."""
        self._records(self.rows, faults)

    def _records(self, rows: Sequence[Row], faults: Faults) -> list[Record]:
        reader = RecordReader(self.form, self.columns, "text" if self.numbers else "refuse")
        records = []
        for row in rows:
            with faults.catch(row.place):
                records.append(read_as(reader.read(row.place, row.cells), self.read_as))

        return records


@dataclass(frozen=True)
class SeparateFacts(DataFacts):
    """Facts about records of which each site has a source of its own."""

    parts: Mapping[str, DataFacts]
    """Facts about the source of each site, by its name."""

    @property
    def forms(self) -> str:
        """Return the forms of the records in words."""
        return ", ".join(sorted({part.form for part in self.parts.values()}))

    @property
    def is_conversation(self) -> bool:
        """True where a chat template renders records of a site."""
        return any(part.is_conversation for part in self.parts.values())

    def sample(self) -> list[Record]:
        """Return a sample of the records of each site."""
        return [record for part in self.parts.values() for record in part.sample()]


def read_records(source: str, option: str = "--data") -> RecordFiles:
    """Return the rows of a source that `option` names; raises `ConfigError` for what cannot be
    read."""
    faults = Faults()
    files = readable_records(source, option, faults)
    faults.raise_any()
    return files


def readable_records(source: str, option: str, faults: Faults) -> RecordFiles:
    """Return the rows of a source that can be read; the faults of the others go to `faults`."""
    local = is_local(source)
    reading: Mapping[str, str] = {}
    found = list[Table]()
    with faults.catch():
        if source in BUNDLED:
            raise ConfigError(
                f"{option} {source!r}: is text of this machine that has sites of its own; run it "
                "as it is with `fluvial run recipe:quickstart` or recipe:stdlib"
            )
        reading = usual_reading(expanded(source)) if local else {}
        config = toml.read(DataConfig, {"source": source, **reading}, option)
        found = tables(Source(option, source, config.split, config.reading()), faults)

    return RecordFiles(source, local, reading, tuple(found))


def facts_about(
    files: RecordFiles,
    columns: Mapping[str, str],
    ask: Ask | None = None,
    site: str = "",
) -> DataFacts:
    """Return the facts about records; `columns` are those that the caller renames.

    Where no form fits the columns, `ask` returns those to rename. Raises `ConfigError` where no
    form fits, `UndecidedError` where nothing is renamed; it names the columns for `site` alone.
    """
    names = files.names
    try:
        form, renamed = (
            (form_of(names, columns), dict(columns)) if columns else _guessed(files, site)
        )
    except ConfigError:
        if ask is None:
            raise
        renamed = dict(ask(files))
        form = form_of(names, renamed)

    texts = [renamed.get(field, field) for field in REQUIRED_FIELDS[form] if field != "answer"]
    numbers = any(
        isinstance(row.cells.get(name), Number | bool) for row in files.rows for name in texts
    )
    changed = {field: column for field, column in renamed.items() if field != column}
    return DataFacts(files, form, changed, numbers)


def _guessed(files: RecordFiles, site: str) -> tuple[Form, dict[str, str]]:
    guessed = guessed_columns(files.names, files.rows)
    if guessed is None:
        raise unknown_columns(files.source, files.names, files.rows, site)
    form, renamed = guessed
    return _by_turns(files, form, renamed) if form in CONVERSATIONS else guessed


def _by_turns(
    files: RecordFiles, form: Form, renamed: dict[str, str]
) -> tuple[Form, dict[str, str]]:
    """Return the form of conversations that the keys of their turns tell, whatever the name of the
    column suggests."""
    (field,) = REQUIRED_FIELDS[form]
    column = renamed.get(field, field)
    other: Form = "sharegpt" if form == "messages" else "messages"
    (own,) = REQUIRED_FIELDS[other]
    if all(has_turns(row, column, TURNS[own]) for row in files.rows):
        return other, {own: column}
    return form, renamed
