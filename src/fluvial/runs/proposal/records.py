"""Facts about records: how their files are read, their form, and the sites they belong to."""

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fluvial.data.config import BUNDLED, DataConfig
from fluvial.data.faults import Faults, shown
from fluvial.data.forms import CONVERSATIONS, REQUIRED_FIELDS, Form, fields_of
from fluvial.data.records import Record, RecordReader
from fluvial.data.rows import Number, Row, Table, columns_of
from fluvial.data.site_names import fault_of
from fluvial.data.sources import Source, is_local, tables
from fluvial.errors import ConfigError
from fluvial.runs.proposal.columns import (
    as_options,
    form_of,
    guessed_columns,
    is_usual_owner,
    kinds,
    may_be_answers,
    names_shown,
    owner_columns,
    value_of,
)
from fluvial.runs.proposal.file_reading import usual_reading
from fluvial.storage import toml

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
        return self.form in CONVERSATIONS

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
        reader = RecordReader(self.form, self.columns, "text" if self.numbers else "refuse")
        rows = self.rows
        records = []
        for row in rows[:: max(1, len(rows) // SAMPLE)]:
            try:
                records.append(reader.read(row.place, row.cells))
            except ConfigError:
                continue

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


@dataclass(frozen=True)
class Sites:
    """The partition of records into sites."""

    partition: Mapping[str, Any]
    """Table `data.partition`."""
    counts: Mapping[str, int]
    """Records of each site."""
    why: str

    def words(self) -> str:
        """Return the largest sites with their counts, and how many there are."""
        largest = sorted(self.counts, key=lambda name: (-self.counts[name], name))
        first = ", ".join(f"{shown(name)} {self.counts[name]:,}" for name in largest[:8])
        return f"{len(largest)} sites ({first}{', ...' if len(largest) > 8 else ''})"


def read_records(source: str, option: str = "--data") -> RecordFiles:
    """Return the rows of a source that `option` names; raises `ConfigError` for what cannot be
    read."""
    if source in BUNDLED:
        raise ConfigError(
            f"{option} {source!r}: is text of this machine that has sites of its own; run it as it "
            "is with `fluvial run recipe:quickstart` or recipe:stdlib"
        )

    local = is_local(source)
    reading = usual_reading(Path(source).expanduser()) if local else {}
    config = toml.read(DataConfig, {"source": source, **reading}, option)
    faults = Faults()
    found = tables(Source(option, source, config.split, config.reading()), faults)
    faults.raise_any()
    return RecordFiles(source, local, reading, tuple(found))


def facts_about(
    files: RecordFiles,
    columns: Mapping[str, str],
    ask: Callable[[Sequence[str]], Mapping[str, str]] | None = None,
) -> DataFacts:
    """Return the facts about records; `columns` are those that the caller renames.

    Where no form fits the columns, `ask` returns those to rename. Raises `ConfigError` where no
    form fits.
    """
    names = files.names
    try:
        form, renamed = (
            (form_of(names, columns), dict(columns))
            if columns
            else guessed_columns(names, files.rows)
        )
    except ConfigError:
        if ask is None:
            raise
        renamed = dict(ask(names))
        form = form_of(names, renamed)

    texts = [renamed.get(field, field) for field in REQUIRED_FIELDS[form]]
    numbers = any(
        isinstance(row.cells.get(name), Number | bool) for row in files.rows for name in texts
    )
    changed = {field: column for field, column in renamed.items() if field != column}
    return DataFacts(files, form, changed, numbers)


def separate(
    sources: Sequence[str],
    columns: Mapping[str, Mapping[str, str]],
    ask: Callable[[str, Sequence[str]], Mapping[str, str]] | None = None,
) -> SeparateFacts:
    """Return the facts about several sources, each of them a site's, which is named after it.

    `columns` has those that the caller renames by site, and under "" those of all sites. `ask`
    takes a source and its columns, also where a text may have its answer beside it. Raises
    `ConfigError` for two sources of one name, `DataError` with the faults of all sources, and
    `ConfigError` for plain text beside questions with answers.
    """
    names = list(map(site_of, sources))
    for name in columns.keys() - {"", *names}:
        raise ConfigError(
            f"--column {name}:...: no --data makes a site {name!r}; they make {', '.join(names)}"
        )

    parts: dict[str, DataFacts] = {}
    faults = Faults()
    for name, source in zip(names, sources, strict=True):
        if name in parts:
            raise ConfigError(
                f"--data {source!r}: another source makes the site {name!r} too; rename one"
            )
        try:
            parts[name] = _part(name, source, {**columns.get("", {}), **columns.get(name, {})}, ask)
        except ConfigError as error:
            faults.include(error)

    faults.raise_any()

    forms = {part.form: name for name, part in parts.items()}
    if len(forms) > 1 and "text" in forms:
        other = next(name for form, name in forms.items() if form != "text")
        raise ConfigError(
            f"--data: the records of {forms['text']!r} are plain text and those of {other!r} have "
            f"answers, which are two tasks; name the columns with "
            f"{as_options('COLUMN', 'COLUMN', forms['text'])}, or leave one out"
        )
    every = [part.files for part in parts.values()]
    files = RecordFiles(
        ", ".join(each.source for each in every),
        all(each.local for each in every),
        {},
        tuple(table for each in every for table in each.tables),
    )
    return SeparateFacts(files, next(iter(forms)), {}, False, parts)


def site_of(source: str) -> str:
    """Return the name of a source's site: that of its file without suffix, or of its folder.

    Raises `ConfigError` for one that can be no site's.
    """
    path = Path(source).expanduser()
    name = path.resolve().name if path.is_dir() else path.stem
    fault = fault_of(name)
    if fault is not None:
        raise ConfigError(
            f"--data {source!r}: its site would be named after it, but {fault}; rename the file or "
            "folder"
        )
    return name


def _part(
    name: str,
    source: str,
    columns: Mapping[str, str],
    ask: Callable[[str, Sequence[str]], Mapping[str, str]] | None,
) -> DataFacts:
    """Return the facts about the source of one of several sites."""
    files = read_records(source)
    try:
        part = facts_about(files, columns, None if ask is None else partial(ask, source))
    except ConfigError as error:
        options = as_options("COLUMN", "COLUMN", name)
        fault = str(error).removeprefix("--data: ")
        raise ConfigError(f"--data {source!r}: {fault}; for this site alone, {options}") from None

    pairs = [] if columns else answer_pairs(part, Sites({}, {}, ""))
    if pairs and ask is not None:
        return facts_about(files, ask(source, files.names))
    if pairs:
        text, answer = pairs[0]
        names = " or ".join(repr(each) for _, each in pairs)
        alone = shlex.quote(f"{name}:text={text}")
        raise ConfigError(
            f"--data {source!r}: {names} may be the answer to the text {text!r}. To learn it: "
            f"{as_options(text, answer, name)}. To learn the text alone: --column {alone}"
        )
    return part


def sites_by_source(facts: SeparateFacts) -> Sites:
    """Return a site for each source."""
    counts = {name: len(part.rows) for name, part in facts.parts.items()}
    return Sites({}, counts, "each --data is a site")


def sites_by_file(facts: DataFacts) -> Sites:
    """Return a site for each file of a folder; raises `ConfigError` for a single file."""
    if len(facts.files.tables) < 2:
        raise ConfigError(
            f"--site-column file: {facts.source!r} is one file, and a file would be a site; name a "
            "folder with a file for each site, or the column with the owner's name"
        )
    counts = {Path(table.name).stem: len(table.rows) for table in facts.files.tables}
    return Sites({"by": "file"}, counts, "each file of the folder is a site")


def sites_by_column(facts: DataFacts, column: str) -> Sites:
    """Return a site for each value of a column; raises `ConfigError` where it has not two."""
    if column not in facts.names:
        raise ConfigError(
            f"--site-column {column!r}: {facts.source!r} has the columns {names_shown(facts.names)}"
        )
    counts = Counter(value_of(row, column) for row in facts.rows)
    if None in counts:
        raise ConfigError(
            f"--site-column {column!r}: {counts[None]} records name no owner; write the site's "
            "name, or remove these records"
        )
    if len(counts) < 2:
        raise ConfigError(
            f"--site-column {column!r}: all records have the value {shown(str(next(iter(counts))))}"
            ", and two sites are needed; name another column, or a number of equal shares"
        )

    known = {name: count for name, count in counts.items() if name is not None}
    single = sum(count == 1 for count in known.values())
    if 2 * single > len(known):
        others = [name for name in likely_columns(facts) if name != column]
        perhaps = f" (perhaps {' or '.join(others[:3])})" if others else ""
        raise ConfigError(
            f"--site-column {column!r}: has {len(known)} values in {len(facts.rows)} records, "
            f"{single} of them in one record only, so it names no owners; name another column"
            f"{perhaps}, or a number of equal shares"
        )
    return Sites(
        {"by": "column", "column": column}, known, f"column {column!r} names the owner of a record"
    )


def equal_sites(facts: DataFacts, number: int) -> Sites:
    """Return equal shares of the shuffled records; raises `ConfigError` for too few records."""
    records = len(facts.rows)
    if not 2 <= number <= records // 2:
        raise ConfigError(
            f"--sites {number}: choose from 2 to {records // 2}, since each site needs two of the "
            f"{records} records"
        )
    width = len(str(number - 1))
    counts = {
        f"site-{n:0{width}}": records // number + (n < records % number) for n in range(number)
    }
    why = "equal shares of the shuffled records: a simulation, since no record names its owner"
    return Sites({"by": "iid", "sites": number}, counts, why)


def found_sites(facts: DataFacts) -> Sites | None:
    """Return the partition that the records suggest, None where none is certain."""
    owners = owner_columns(facts.rows, facts.other_columns)
    if owners and is_usual_owner(owners[0]):
        return sites_by_column(facts, owners[0])
    return sites_by_file(facts) if len(facts.files.tables) > 1 else None


def likely_columns(facts: DataFacts) -> Sequence[str]:
    """Return the columns that may name the owner of a record."""
    return owner_columns(facts.rows, facts.other_columns)


def unused_columns(facts: DataFacts, sites: Sites) -> list[str]:
    """Return the columns that are neither text nor owner of a record."""
    if isinstance(facts, SeparateFacts):
        each = [unused_columns(part, sites) for part in facts.parts.values()]
        return list(dict.fromkeys(name for names in each for name in names))
    used = {facts.columns.get(field, field) for field in fields_of(facts.form)}
    used.add(sites.partition.get("column", ""))
    return [name for name in facts.names if name not in used]


def answer_pairs(facts: DataFacts, sites: Sites) -> list[tuple[str, str]]:
    """Return the column of plain text with each unused column that may hold the answers to it,
    words before numbers, and those of few values first."""
    if facts.form != "text" or isinstance(facts, SeparateFacts):
        return []
    text = facts.columns.get("text", "text")
    unused = unused_columns(facts, sites)
    fitting = [name for name in unused if may_be_answers(facts.rows, name)]
    return [(text, name) for name in sorted(fitting, key=lambda name: kinds(facts.rows, name))]
