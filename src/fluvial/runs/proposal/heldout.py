"""Held-out records beside the records of a proposal: of all sites, or of one of several."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluvial.data.faults import Faults
from fluvial.data.files import UTF8
from fluvial.errors import ConfigError
from fluvial.runs.proposal.columns import names_shown
from fluvial.runs.proposal.file_reading import is_ascii, usual_delimiter
from fluvial.runs.proposal.records import (
    DataFacts,
    RecordFiles,
    SeparateFacts,
    facts_about,
    readable_records,
)
from fluvial.runs.proposal.separate import site_of
from fluvial.storage.files import expanded
from fluvial.storage.kinds import kind_of, taken_over

ALL = ""
"""Key of the held-out records of all sites, in tables by site."""


@dataclass(frozen=True)
class Heldout:
    """Held-out records of a source, and how they are read."""

    facts: DataFacts
    reading: Mapping[str, Any]
    """Settings in which its reading differs from that of the records to train on."""

    @property
    def reading_why(self) -> str:
        """The difference in words."""
        parts = []
        if "columns" in self.reading:
            parts.append(
                "our field = its column"
                if self.reading["columns"]
                else "its columns have the names of our fields, so none is renamed"
            )
        found = [key for key in self.reading if key != "columns"]
        if found:
            parts.append(f"{' and '.join(found)} as the file was found")
        return f"the held-out file differs: {'; '.join(parts)}"


def read_heldout(
    options: Sequence[str], sources: Sequence[RecordFiles], faults: Mapping[str, Faults]
) -> dict[str, RecordFiles]:
    """Return the records that each `--heldout` names, by site; those of all sites are under `ALL`.

    `sources` are those of --data. With several, SITE=FILE names the records of one site. What
    cannot be read goes to `faults` of its source; two of one site, and a site that there is not, to
    those of "".
    """
    sites: list[str] = []
    for files in sources if len(sources) > 1 else ():
        with faults[files.source].catch():
            sites.append(site_of(files.source, files.site))

    found: dict[str, RecordFiles] = {}
    for option in options:
        with faults[""].catch():
            site, source = _parted(option, sites)
            if site in found:
                of = f"of site {site!r}" if site else "of all sites"
                raise ConfigError(f"--heldout {option!r}: names the records {of} again; keep one")
            found[site] = readable_records(source, "--heldout", faults[source])

    if sites and found.keys() >= {ALL, *sites}:
        faults[""].add(
            f"--heldout {found[ALL].source!r}: without effect, because each site has one of its "
            "own; remove it"
        )
    return found


def fitted(asked: Mapping[str, RecordFiles], data: DataFacts) -> dict[str, Heldout]:
    """Return the held-out records of each site of `SeparateFacts` that has some, and of any other
    facts under `ALL`.

    Raises `DataError` for records of another task, and for columns that fit no form.
    """
    parts = data.parts if isinstance(data, SeparateFacts) else {ALL: data}
    faults = Faults()
    found = fitted_parts(asked, parts, defaultdict(lambda: faults))
    faults.raise_any()
    return found


def fitted_parts(
    asked: Mapping[str, RecordFiles], parts: Mapping[str, DataFacts], faults: Mapping[str, Faults]
) -> dict[str, Heldout]:
    """Return the held-out records of each of the `parts` that has some; those of another task, and
    those whose columns fit no form, go to `faults` of their source."""
    found: dict[str, Heldout] = {}
    for name, part in parts.items():
        files = asked.get(name, asked.get(ALL))
        if files is not None and files.rows:
            with faults[files.source].catch():
                found[name] = _fitted(files, part)

    return found


def _parted(option: str, sites: Sequence[str]) -> tuple[str, str]:
    """Return the site and the source that an option names; the site is `ALL` where it names none.

    Names may hold the mark "=": the longest one is taken whose source exists, or which is known.
    """
    known = sorted((site for site in sites if option.startswith(f"{site}=")), key=len, reverse=True)
    named = [(site, option.removeprefix(f"{site}=")) for site in known]
    there = [pair for pair in named if expanded(pair[1]).exists()]
    if len(there) > 1:
        raise ConfigError(
            f"--heldout {option!r}: names a file of each of the sites {' and '.join(known)}; name "
            "one of them otherwise, with --data NAME=PATH"
        )
    if named:
        return (there or named)[0]

    if not sites or "=" not in option or expanded(option).exists():
        return ALL, option
    raise ConfigError(
        f"--heldout {option!r}: no --data makes a site {option.partition('=')[0]!r}; they make "
        f"{', '.join(sites)}"
    )


def _fitted(files: RecordFiles, data: DataFacts) -> Heldout:
    """Return the held-out records of `files`, as they are read beside the records of `data`."""
    same = set(data.columns.values()) <= set(files.names)
    try:
        facts = facts_about(files, data.columns if same else {})
    except ConfigError:
        named = [data.columns.get(field, field) for field in data.texts]
        raise ConfigError(
            f"--heldout {files.source!r}: its columns {names_shown(files.names)} fit no form of "
            f"a record; name them {' and '.join(named)}, as in {data.source!r}"
        ) from None

    if (facts.form == "text") != (data.form == "text"):
        one, other = ("is plain text", "have answers")
        if facts.form != "text":
            one, other = ("has answers", "are plain text")
        raise ConfigError(
            f"--heldout {files.source!r}: {one} and the records {other}, which are two tasks; "
            "name held-out records of the same task"
        )

    reading: dict[str, Any] = {}
    if facts.columns != data.columns:
        reading["columns"] = dict(facts.columns)
    return Heldout(facts, reading | _bytes_reading(files, data.files))


def _bytes_reading(files: RecordFiles, beside: RecordFiles) -> dict[str, str]:
    """Return encoding and delimiter where those of the records `beside` do not hold."""
    kind = kind_of(files.source)
    inherited = taken_over(beside.reading, kind_of(beside.source), kind)
    reading = {key: value for key, value in files.reading.items() if inherited.get(key) != value}
    if "encoding" in inherited.keys() - files.reading and not is_ascii(Path(files.source)):
        reading["encoding"] = UTF8
    if "delimiter" in inherited.keys() - files.reading:
        reading["delimiter"] = usual_delimiter(kind)
    return reading
