"""Rows of a file as they were read, each with its place; no type of a value is guessed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from fluvial.data.faults import DataError, Faults, shown
from fluvial.formatting import safe_line


@dataclass(frozen=True, slots=True)
class Number:
    """A number as a file writes it, such as `1.0`; it is never converted."""

    text: str

    @property
    def finite(self) -> bool:
        """True for a finite number."""
        return not self.text.lstrip("-").lower().startswith(("nan", "inf"))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A value that Python has no type for; it is a fault only where it is needed."""

    kind: str
    """Type of the value as its file names it."""


@dataclass(frozen=True, slots=True)
class Within:
    """A place that a dotted name leads to, within a value that is no object."""

    name: str
    """Dotted name of the value."""
    value: Any


class Cells(Mapping[str, Any]):
    """The values of a record by name: fields of the record, and `outer.inner` within objects.

    A field whose own name has the dot comes first. What is within null is null, and what is within
    any other value that is no object is `Within`.

    >>> Cells({"dialog": {"question": "Why?"}})["dialog.question"]
    'Why?'
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    def __getitem__(self, name: str) -> Any:
        fields, path, rest = self.fields, "", name
        while rest not in fields:
            outer = _outer(rest, fields)
            value = fields[outer]
            path = f"{path}.{outer}" if path else outer
            rest = rest[len(outer) + 1 :]
            if value is None:
                return None
            if not isinstance(value, Mapping):
                return Within(path, value)
            fields = value

        return fields[rest]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


def _outer(name: str, fields: Mapping[str, Any]) -> str:
    """Return the longest beginning of a dotted name that is a field; raise `KeyError` if none."""
    outer = name
    while "." in outer:
        outer = outer.rpartition(".")[0]
        if outer in fields:
            return outer

    raise KeyError(name)


class Place(NamedTuple):
    """The place of a row."""

    file: str
    unit: str
    """Unit of the number: "line", or "row" in a file without lines."""
    number: int
    """Number of the line or row, from 1."""

    def __str__(self) -> str:
        return f"{safe_line(self.file)}, {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file, by the file's own names of columns."""

    fields: Mapping[str, Any]
    place: Place

    @property
    def cells(self) -> Cells:
        """Return the values by name, those of fields within objects too."""
        return Cells(self.fields)


@dataclass(frozen=True)
class Table:
    """The rows of one file or data set."""

    name: str
    """Name of the file for messages."""
    kind: str
    """Suffix of the file, such as ".csv", or "data set"."""
    rows: Sequence[Row]
    columns: tuple[str, ...]
    """Names of the columns, in the order of the file; see `columns_of`."""
    notes: tuple[str, ...] = field(default=())
    """Remarks for the person who runs it, such as the number of blank lines."""


class FaultyRowsError(DataError):
    """Faults of some rows of a file."""

    def __init__(self, faults: Faults, table: Table) -> None:
        super().__init__(faults.groups, faults.count)
        self.table = table
        """The other rows, so that their faults can be told too."""


def without_faults(table: Table, faults: Faults) -> Table:
    """Return a table; raise `FaultyRowsError` with it if there are faults."""
    if faults.count:
        raise FaultyRowsError(faults, table)
    return table


def columns_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the names of all fields, in the order in which they appear first.

    The fields of an object are named `outer.inner` in its place, at any depth, as `flatten` of
    Hugging Face's `datasets` names them.
    """
    filled: dict[str, bool] = {}
    objects = set[str]()
    for row in rows:
        for name, value in _leaves(row.fields, objects):
            filled[name] = filled.get(name, False) or value is not None

    return tuple(name for name, has_value in filled.items() if has_value or name not in objects)


def _leaves(fields: Mapping[str, Any], objects: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield names and values of what is no object; the names of objects go to `objects`."""
    waiting = list(fields.items())[::-1]
    while waiting:  # no recursion: a record may be as deep as a JSON reader allows
        name, value = waiting.pop()
        if isinstance(value, Mapping) and value:
            objects.add(name)
            waiting += [(f"{name}.{inner}", each) for inner, each in value.items()][::-1]
        else:
            yield name, value


def typed(value: Any) -> Any:
    """Return a value of pyarrow as our readers give it: numbers as `Number`, all else as it is."""
    if isinstance(value, bool) or value is None or isinstance(value, str | Number):
        return value
    if isinstance(value, int):
        return Number(str(value))
    if isinstance(value, Decimal):
        return Number(format(value, "f"))
    if isinstance(value, float):
        return Number(repr(value) if math.isfinite(value) else str(value))
    if isinstance(value, Mapping):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [typed(inner) for inner in value]

    return value


def described(value: Any) -> str:
    """Return the kind of a value in words, without its content."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, Number):
        return "a number" if value.finite else f"{value.text}, which stands for a missing value"
    if isinstance(value, Unreadable):
        return f"a value of type {safe_line(value.kind)}, which cannot be read"
    if isinstance(value, Within):
        return f"within {shown(value.name)}, which is {described(value.value)} and no object"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return "text"

    return f"of type {type(value).__name__}"
