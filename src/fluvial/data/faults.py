"""Faults of data files, collected over all files and sites for one message."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fluvial.errors import ConfigError
from fluvial.formatting import safe_line

SHOWN = 20
"""Faults that a message lists; the others are counted."""
NAME_LENGTH = 60
"""Characters of a file, column or site name that a message shows."""


class DataError(ConfigError):
    """One or more faults of data files.

    A fault names file, line, field and remedy, and holds no text of a record. Names of columns and
    sites are quoted.
    """

    def __init__(self, faults: Sequence[str], count: int | None = None) -> None:
        self.faults = tuple(faults)
        self.count = len(faults) if count is None else count
        super().__init__(_message(self.faults, self.count))

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle builds it from: an exception is rebuilt from its message otherwise."""
        return DataError, (self.faults, self.count)


class Faults:
    """A list of faults that grows while files are read."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = 0

    def add(self, fault: str) -> None:
        """Add one fault, once: a file that is read as two sources has each fault twice."""
        if fault in self.first:
            return
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(fault)

    def include(self, error: ConfigError) -> None:
        """Add the faults of an error that was caught."""
        if isinstance(error, DataError):
            self._extend(error.faults, error.count)
        else:
            self.add(str(error))

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Add the faults of a `ConfigError` that is raised within, which ends there."""
        try:
            yield
        except ConfigError as error:
            self.include(error)

    def of_site(self, name: str, settings: Iterable[str]) -> "Faults":
        """Return the same faults for the table of one site, which has `settings` of its own."""
        table = f"data.by_site.{name}"
        own = re.compile(rf"\bdata\.({'|'.join(sorted(settings, key=len, reverse=True))})\b")
        placed = Faults()
        for fault in self.first:
            line = own.sub(rf"{table}.\1", fault.removeprefix("data: "))
            placed.first.append(line if line.startswith(table) else f"{table}: {line}")
        placed.count = self.count
        return placed

    def include_all(self, other: "Faults") -> None:
        """Add the faults that were collected elsewhere."""
        self._extend(other.first, other.count)

    def include_evenly(self, others: Sequence["Faults"]) -> None:
        """Add the faults of several files; where there are too many to list, some of each."""
        listed = [0] * len(others)
        for place in range(SHOWN):
            for number, other in enumerate(others):
                if place < len(other.first) and sum(listed) < SHOWN - len(self.first):
                    listed[number] += 1

        for other, most in zip(others, listed, strict=True):
            self._extend(other.first[:most], other.count)

    def _extend(self, faults: Sequence[str], count: int) -> None:
        new = [fault for fault in faults if fault not in self.first]
        if new:
            self.first += new[: SHOWN - len(self.first)]
            self.count += count - (len(faults) - len(new))

    def raise_any(self) -> None:
        """Raise `DataError` if there are faults."""
        if self.count:
            raise DataError(self.first, self.count)


def _message(faults: Sequence[str], count: int) -> str:
    if count == 1:
        return faults[0]
    lines = [f"{count} faults in the data:", *faults[:SHOWN]]
    if count > len(lines) - 1:
        lines.append(f"and {count - len(lines) + 1} more")
    return "\n".join(lines)


def are(count: int) -> str:
    """Return the verb for a count: "1 of 9 records is", "2 of 9 records are"."""
    return "is" if count == 1 else "are"


def shown(name: str) -> str:
    """Return a name in quotes, safe for a terminal: control characters escaped, long names cut."""
    cut = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 3] + "..."
    return repr(safe_line(cut)) if cut == safe_line(cut) else f"'{safe_line(cut)}'"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return names as a short list in quotes."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more
