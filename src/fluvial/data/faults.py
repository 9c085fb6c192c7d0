"""Faults of data files, collected over all files and sites for one message."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, NamedTuple

from fluvial.errors import ConfigError
from fluvial.formatting import safe_line

SHOWN = 20
"""Faults that a message lists; the others are counted."""
PLACES = 10
"""Places that a message names of a fault that is at several; the others are counted."""
NAME_LENGTH = 60
"""Characters of a file, column or site name that a message shows."""
_SITE = "\0"
"""Mark in the text of a fault where the name of the site stands that the fault belongs to."""


class Spot(NamedTuple):
    """A place of a fault: a file with its line, or the beginning of a message; and its site."""

    place: str
    site: str | None = None
    """Site with a table of its own that names the file."""

    def __str__(self) -> str:
        if self.site is None:
            return self.place
        return f"data.by_site.{self.site}" + (f": {self.place}" if self.place else "")


@dataclass(frozen=True)
class Fault:
    """A fault at one place or at several; its text follows the place, as in ": is empty"."""

    text: str
    spots: tuple[Spot, ...]
    """The first places."""
    count: int = 1
    """Number of all places."""

    @classmethod
    def of(cls, line: str, place: str = "") -> "Fault":
        """Return the fault that `line` tells; where it begins with `place`, such as a file, its
        line and a detail in brackets belong to the place too."""
        if not place or not line.startswith(place):
            return cls(line, (Spot(""),))
        rest = re.match(r"(, [a-z]+ \d+)?( \([^()]*\))?", line[len(place) :])
        length = len(place) + (rest.end() if rest else 0)
        return cls(line[length:], (Spot(line[:length]),))

    def at(self, place: str) -> "Fault":
        """Return the same fault with its place, if its text begins with it."""
        has_place = self.count != 1 or any(spot.place for spot in self.spots)
        return self if has_place else Fault.of(self.text, place)

    def __str__(self) -> str:
        """Return the fault as a line, once for all places."""
        if self.count == 1 and self.spots:
            (spot,) = self.spots
            line = f"{spot.place}{self.text}"
            if spot.site is None:
                return line
            line = line.replace(_SITE, spot.site)
            table = str(Spot("", spot.site))
            return line if line.startswith(table) else f"{table}: {line}"

        sites = {spot.site for spot in self.spots}
        name = (sites.pop() if len(sites) == 1 else None) or "NAME"
        text = self.text.lstrip(" :,").replace(_SITE, name)
        more = self.count - len(self.spots)
        places = [*_joined(self.spots), *([f"and {more} more"] if more else [])]
        return f"{self.count} times: {text}: {'; '.join(places)}"


def _joined(spots: Iterable[Spot]) -> list[str]:
    """Return places in words; the lines of a file stand together."""
    lines: dict[str, list[str]] = {}
    for spot in map(str, spots):
        line = re.fullmatch(r"(.*, [a-z]+) (\d+)", spot)
        lines.setdefault(line[1] if line else spot, []).extend([line[2]] if line else [])

    return [
        f"{head}{'s' * (len(numbers) > 1)} {', '.join(sorted(numbers, key=int))}"
        if numbers
        else head
        for head, numbers in lines.items()
    ]


class DataError(ConfigError):
    """One or more faults of data files.

    A fault names file, line, field and remedy, and holds no text of a record. Names of columns and
    sites are quoted.
    """

    def __init__(self, faults: Sequence[str | Fault], count: int | None = None) -> None:
        self.groups = tuple(
            fault if isinstance(fault, Fault) else Fault.of(fault) for fault in faults
        )
        """The faults that are told, each once for all its places."""
        self.faults = tuple(map(str, self.groups))
        listed = sum(fault.count for fault in self.groups)
        self.count = listed if count is None else count
        self.others = self.count - listed
        """Number of the faults that are counted and not told."""
        super().__init__(_message(self.faults, self.count, self.others))

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle builds it from: an exception is rebuilt from its message otherwise."""
        return DataError, (self.groups, self.count)


class Faults:
    """A list of faults that grows while files are read; the same fault at several places is one."""

    def __init__(self) -> None:
        self._groups: dict[str, Fault] = {}
        self._others = 0

    @property
    def groups(self) -> list[Fault]:
        """Return the faults that a message tells."""
        return list(self._groups.values())

    @property
    def first(self) -> list[str]:
        """Return the lines of a message."""
        return list(map(str, self.groups))

    @property
    def count(self) -> int:
        """Return the number of all faults at all places."""
        return sum(fault.count for fault in self.groups) + self._others

    def add(self, fault: str, place: object = "") -> None:
        """Add one fault, once: a file that is read as two sources has each fault twice.

        Faults that differ in their `place` alone, with which they begin, are told once.
        """
        self._add(Fault.of(fault, str(place)))

    def include(self, error: ConfigError, place: object = "") -> None:
        """Add the faults of an error that was caught, see `add`."""
        if isinstance(error, DataError):
            self._extend([fault.at(str(place)) for fault in error.groups], error.others)
        else:
            self.add(str(error), place)

    @contextmanager
    def catch(self, place: object = "") -> Iterator[None]:
        """Add the faults of a `ConfigError` that is raised within, which ends there; see `add`."""
        try:
            yield
        except ConfigError as error:
            self.include(error, place)

    def of_site(self, name: str, settings: Iterable[str]) -> "Faults":
        """Return the same faults for the table of one site, which has `settings` of its own."""
        own = re.compile(rf"\bdata\.({'|'.join(sorted(settings, key=len, reverse=True))})\b")
        mark = rf"data.by_site.{_SITE}.\1"
        placed = Faults()
        for fault in self.groups:
            spots = tuple(Spot(spot.place.removeprefix("data: "), name) for spot in fault.spots)
            text = own.sub(mark, fault.text.removeprefix("data: "))
            placed._add(Fault(text, spots, fault.count))
        placed._others = self._others
        return placed

    def include_all(self, other: "Faults") -> None:
        """Add the faults that were collected elsewhere."""
        self._extend(other.groups, other._others)

    def include_evenly(self, others: Sequence["Faults"]) -> None:
        """Add the faults of several files; where there are too many to tell, some of each, and
        where a fault is at too many places, some of each."""
        single = [_single(other.groups) for other in others]
        for row in zip_longest(*single):
            for fault in filter(None, row):
                self._add(fault)

        for other in others:
            for fault in other.groups:
                self._add(Fault(fault.text, (), fault.count - len(fault.spots)))
            self._others += other._others

    def _extend(self, faults: Sequence[Fault], others: int) -> None:
        before = self.count
        for fault in faults:
            self._add(fault)
        if self.count > before or not faults:
            self._others += others

    def _add(self, fault: Fault) -> None:
        known = self._groups.get(fault.text)
        if known is None and len(self._groups) == SHOWN:
            self._others += fault.count
        elif known is None:
            self._groups[fault.text] = fault
        else:
            self._groups[fault.text] = _together(known, fault)

    def raise_any(self) -> None:
        """Raise `DataError` if there are faults."""
        if self.count:
            raise DataError(self.groups, self.count)


def _together(known: Fault, other: Fault) -> Fault:
    """Return one fault at the places of both; those that are known are of a file read twice."""
    new = tuple(spot for spot in other.spots if spot not in known.spots)
    if other.spots and not new:
        return replace(known, count=max(known.count, other.count))
    count = known.count + other.count - (len(other.spots) - len(new))
    return Fault(known.text, (known.spots + new)[:PLACES], count)


def _single(faults: Iterable[Fault]) -> list[Fault]:
    """Return a fault for each place that is known, those at the first place of each first."""
    rows = zip_longest(*([Fault(fault.text, (spot,)) for spot in fault.spots] for fault in faults))
    return [fault for row in rows for fault in row if fault is not None]


def _message(faults: Sequence[str], count: int, others: int) -> str:
    if count == 1:
        return faults[0]
    more = [f"and {others} more"] if others else []
    return "\n".join([f"{count} faults in the data:", *faults, *more])


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
