"""The sites that records belong to, and the columns that are neither text nor owner."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluvial.data.faults import listed, shown
from fluvial.data.forms import fields_of
from fluvial.errors import ConfigError
from fluvial.runs.proposal.columns import (
    is_usual_owner,
    kinds,
    may_be_answers,
    names_shown,
    owner_columns,
    value_of,
)
from fluvial.runs.proposal.records import DataFacts, SeparateFacts


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


def unused_words(facts: DataFacts, sites: Sites) -> str:
    """Return the columns that are neither text nor owner of a record, with their sites where each
    has a source; "" for none."""
    if not isinstance(facts, SeparateFacts):
        return listed(unused_columns(facts, sites))
    owners: dict[str, list[str]] = {}
    for name, part in facts.parts.items():
        if unused := listed(unused_columns(part, sites)):
            owners.setdefault(unused, []).append(name)
    return "; ".join(f"{unused} at {listed(names)}" for unused, names in owners.items())


def unused_columns(facts: DataFacts, sites: Sites) -> list[str]:
    """Return the columns of a source that are neither text nor owner of a record."""
    used = {facts.columns.get(field, field) for field in fields_of(facts.form)}
    used.add(sites.partition.get("column", ""))
    within = tuple(f"{name}." for name in used if name)
    return [name for name in facts.names if name not in used and not name.startswith(within)]


def answer_pairs(facts: DataFacts, sites: Sites) -> list[tuple[str, str]]:
    """Return the column of plain text with each unused column that may hold the answers to it,
    words before numbers, and those of few values first."""
    if facts.form != "text" or isinstance(facts, SeparateFacts):
        return []
    text = facts.columns.get("text", "text")
    unused = unused_columns(facts, sites)
    fitting = [name for name in unused if may_be_answers(facts.rows, name)]
    return [(text, name) for name in sorted(fitting, key=lambda name: kinds(facts.rows, name))]
