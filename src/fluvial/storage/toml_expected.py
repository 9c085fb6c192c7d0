"""The content that settings expect at a place of a TOML file, in words for messages."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from fluvial.settings import Settings

TAGS = ("name", "by", "form")
"""Keys that choose what the rest of their table may hold."""
_LONGEST = 80
"""Characters of a value in a message."""
_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    Path: "a string with a path",
}
_BOUNDS = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def show(value: Any) -> str:
    """Return a value as TOML writes it, in at most `_LONGEST` characters."""
    text = as_toml(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def as_toml(value: Any) -> str:
    """Write a value as TOML, cut where it is long."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value[: 2 * _LONGEST], ensure_ascii=not value.isprintable())
        case int():
            return str(value) if abs(value) < 2**64 else f"an integer of {value.bit_length()} bits"
        case list() | tuple():
            return f"[{', '.join(as_toml(item) for item in value[:_LONGEST])}]"
        case dict():
            pairs = list(value.items())[:_LONGEST]
            return f"{{{', '.join(f'{key} = {as_toml(item)}' for key, item in pairs)}}}"
        case None:
            return "null"

    return str(value)


@dataclass(frozen=True)
class Expected:
    """The right content of a place: the classes of a table, or the annotation of a value."""

    tables: tuple[type[Settings], ...] = ()
    annotation: Any = None
    bounds: tuple[Any, ...] = ()

    @classmethod
    def of(cls, annotation: Any, metadata: Sequence[Any] = ()) -> "Expected":
        """Return the expected content for an annotation and its constraints."""
        if get_origin(annotation) is Annotated:
            inner, *more = get_args(annotation)
            return cls.of(
                inner, [*metadata, *(each for item in more for each in _constraints(item))]
            )

        return cls(tuple(_tables(annotation)), annotation, tuple(metadata))

    def words(self) -> str:
        """Return what would be right, in TOML's words."""
        if self.tables:
            return "a table"
        return either(list(_kinds(self.annotation, self.bounds)))


def _constraints(item: Any) -> list[Any]:
    return item.metadata if isinstance(item, FieldInfo) else [item]


def _constrained(
    annotation: Any, constraints: Sequence[Any] = ()
) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Yield the alternatives of an annotation, without `None`, each with its own constraints."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        yield from _constrained(
            inner, [*constraints, *(each for item in more for each in _constraints(item))]
        )
    elif get_origin(annotation) in (Union, UnionType):
        for item in get_args(annotation):
            yield from _constrained(item, constraints)
    elif annotation is not NoneType:
        yield annotation, constraints


def _alternatives(annotation: Any) -> list[Any]:
    """Return the alternatives of an annotation, without `None`."""
    return [each for each, _ in _constrained(annotation)]


def _tables(annotation: Any) -> list[type[Settings]]:
    """Return the classes of settings among the alternatives of an annotation."""
    found = _alternatives(annotation)
    return [each for each in found if isinstance(each, type) and issubclass(each, Settings)]


def allows(annotation: Any, kind: type) -> bool:
    """Return whether an annotation allows values of a type."""
    return any((get_origin(each) or each) is kind for each in _alternatives(annotation))


def expected_item(annotation: Any, part: str | int) -> Expected | None:
    """Return what is right at an index of an array or a key of a table of values.

    None if `part` is no such place.
    """
    for each in _alternatives(annotation):
        arguments = get_args(each)
        if get_origin(each) is tuple and isinstance(part, int):
            return Expected.of(
                arguments[0 if arguments[-1] is ... else min(part, len(arguments) - 1)]
            )

        if get_origin(each) is dict:
            return Expected.of(arguments[1])

    return None


def _kinds(annotation: Any, bounds: Sequence[Any]) -> Iterator[str]:
    for each, more in _constrained(annotation):
        origin = get_origin(each)
        if origin is Literal:
            yield either([as_toml(value) for value in get_args(each)])
        elif origin is tuple:
            yield _array(each, bounds)
        elif origin is dict or each is dict:
            yield "a table"
        else:
            limits = _limits([*bounds, *more]) if each in (int, float) else ""
            yield f"{_WORDS.get(each, 'another value')}{limits}"


def _array(annotation: Any, bounds: Sequence[Any]) -> str:
    arguments = get_args(annotation)
    least = next((each.min_length for each in bounds if isinstance(each, MinLen)), 0)
    most = next((each.max_length for each in bounds if isinstance(each, MaxLen)), None)
    inner = Expected.of(arguments[0])
    words = (
        "tables"
        if inner.tables
        else {int: "integers", float: "numbers"}.get(inner.annotation, "strings")
    )

    if get_origin(inner.annotation) is Literal:
        words = f"strings among {', '.join(as_toml(value) for value in get_args(inner.annotation))}"
    if arguments[-1] is not ...:
        return f"an array of {len(arguments)} {words}"

    return (
        "an array of "
        f"{words}{f', at least {least}' if least else ''}{f', at most {most}' if most else ''}"
    )


def _limits(bounds: Sequence[Any]) -> str:
    """Return the bounds of a number in words."""
    limits = dict[str, str]()
    for bound in bounds:
        limits |= {
            name: _short(getattr(bound, name))
            for kind, name in _BOUNDS.items()
            if isinstance(bound, kind)
        }

    if "ge" in limits and "le" in limits:
        return f" from {limits['ge']} to {limits['le']}"

    words = [f"{_LIMITS[name]} {limit}" for name, limit in limits.items()]
    return f", {' and '.join(words)}" if words else ""


def _short(number: float) -> str:
    return (
        str(number)
        if isinstance(number, int)
        else f"{number:.12g}".replace("e-0", "e-").replace("e+0", "e")
    )


def either(words: Sequence[str]) -> str:
    """Join words to a list that ends with "or"."""
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def tags_of(model: type[Settings]) -> list[str]:
    """Return the values that choose this model in a union."""
    return [
        tag
        for key in TAGS
        if key in model.model_fields
        for tag in get_args(model.model_fields[key].annotation)
    ]
