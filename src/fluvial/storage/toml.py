"""TOML into settings: every fault of a file at once, each with its place, what was found and what
would be right."""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fluvial.errors import ConfigError
from fluvial.settings import ConflictError, Settings

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

T = TypeVar("T", bound=Settings)


def load(path: Path, missing: str) -> dict[str, Any]:
    """Return the table of a TOML file; raises `ConfigError`, with the line `missing` where there is
    no file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(missing) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # an integer of thousands of digits; arrays nested as deep
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def read(root: type[T], table: dict[str, Any], where: str) -> T:
    """Return the settings that `table` holds; raises `ConfigError` with a line for each fault.

    A fault hides what is checked after it, such as values that cannot stand together. So what is at
    fault is set aside and the rest read again, until nothing new is found; a later fault that
    speaks of what was set aside is left out.
    """
    lines = dict[str, None]()
    aside = set[str]()

    while True:
        try:
            settings = root.model_validate(table)
        except ValidationError as error:
            problems = [_Problem(each, root) for each in error.errors()]
            lines |= dict.fromkeys(
                line for line in _explain(problems) if not _mentions(line, aside)
            )
            paths = [problem.aside() for problem in problems]
            aside |= {path[-1] for path in paths if path}
            smaller = _without(table, [path for path in paths if path])

            if not all(paths) or smaller == table:
                break

            table = smaller
        else:
            break

    if lines:
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines))

    return settings


def show(value: Any) -> str:
    """Return a value as TOML writes it, in at most `_LONGEST` characters."""
    text = _toml(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value[: 2 * _LONGEST], ensure_ascii=not value.isprintable())
        case int():
            return str(value) if abs(value) < 2**64 else f"an integer of {value.bit_length()} bits"
        case list() | tuple():
            return f"[{', '.join(_toml(item) for item in value[:_LONGEST])}]"
        case dict():
            pairs = list(value.items())[:_LONGEST]
            return f"{{{', '.join(f'{key} = {_toml(item)}' for key, item in pairs)}}}"
        case None:
            return "null"

    return str(value)


@dataclass(frozen=True)
class _Right:
    """The right content of a place: the classes of a table, or the annotation of a value."""

    tables: tuple[type[Settings], ...] = ()
    annotation: Any = None
    bounds: tuple[Any, ...] = ()

    @classmethod
    def of(cls, annotation: Any, metadata: Sequence[Any] = ()) -> "_Right":
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
        return _or(list(_kinds(self.annotation, self.bounds)))


class _Problem:
    """A pydantic problem, with its place in the TOML file."""

    def __init__(self, problem: Any, root: type[Settings]) -> None:
        self.kind: str = problem["type"]
        self.input = problem["input"]
        self.context: dict[str, Any] = problem.get("ctx", {})
        self.path = list[str | int]()
        self.right = _Right((root,))
        loc = list(problem["loc"])
        self.key = str(loc.pop()) if self.kind == "extra_forbidden" else ""

        for part in loc:
            self._enter(part)

    def _enter(self, part: str | int) -> None:
        """Follow one part of pydantic's location, which also names the alternatives of a union."""
        if len(self.right.tables) > 1:  # the tag of a union, such as the method's name, is no key
            self.right = _Right(tuple(each for each in self.right.tables if part in _tags(each)))
            return

        if self.right.tables:
            field = self.right.tables[0].model_fields.get(str(part))
            self.path.append(part)
            self.right = _Right.of(field.annotation, field.metadata) if field else _Right()
            return

        item = _item(self.right.annotation, part)
        if item is not None:
            self.path.append(part)
            self.right = item

    @property
    def place(self) -> str:
        """The dotted place."""
        return ".".join(map(str, self.path))

    def holds(self, other: "_Problem") -> bool:
        """Return whether the other problem is one of an item here."""
        return len(other.path) > len(self.path) and other.path[: len(self.path)] == self.path

    def aside(self) -> list[str]:
        """Return the keys to what must be set aside for the rest to be read; empty if that is
        everything."""
        keys = [str(part) for part in self.path if isinstance(part, str)]
        if self.kind == "extra_forbidden":
            return [*keys, self.key]
        return keys[:-1] if self.kind == "missing" else keys

    def lines(self) -> Iterator[str]:
        """Yield one line for each fault."""
        if self.kind == "extra_forbidden":
            known = list(self.right.tables[0].model_fields) if self.right.tables else []
            yield f"{_dotted(self.place, self.key)}: unknown key; {_nearest(self.key, known, 'known keys: ')}"
        elif self.kind == "missing":
            yield f"{self.place}: missing, and has no default; it must be {self.right.words()}"
        elif self.kind == "value_error":
            yield from self._conflicts()
        elif self.kind == "union_tag_invalid":
            yield self._unknown_tag()
        elif self.kind == "union_tag_not_found":
            tags = [tag for each in self.right.tables for tag in _tags(each)]
            key = self.context["discriminator"].strip("'")
            yield f"{self.place}: {key} is missing; choose one of {', '.join(tags)}"
        else:
            yield f"{self.place} = {show(self.input)}: {self._rule()}{self._hint()}"

    def _conflicts(self) -> Iterator[str]:
        error = self.context["error"]
        if isinstance(error, ConflictError):
            yield from (_dotted(self.place, line) for line in error.lines)
        elif self.right.tables:
            yield _dotted(self.place, str(error))
        else:
            yield f"{self.place} = {show(self.input)}: {error}"

    def _rule(self) -> str:
        """Return what a value must be."""
        if self.kind == "string_pattern_mismatch":
            return f"must match {self.context['pattern']}"
        if self.kind == "string_too_short":
            return "the string is empty; give a value or remove the key"
        if self.kind == "string_too_long":
            return f"must have at most {self.context['max_length']} characters"
        return f"must be {self.right.words()}"

    def _unknown_tag(self) -> str:
        known = self.context["expected_tags"].replace("'", "").split(", ")
        key = self.context["discriminator"].strip("'")
        found = self.input.get(key) if isinstance(self.input, dict) else self.context["tag"]
        nearest = _nearest(str(found), known, "choose one of ")
        return f"{self.place}: unknown {key} {show(found)}; {nearest}"

    def _hint(self) -> str:
        found = self.input
        annotation = self.right.annotation
        if self.right.tables:
            tag = next((key for key in TAGS if key in self.right.tables[0].model_fields), None)
            chooses = tag is not None and len(self.right.tables) > 1 and isinstance(found, str)
            return f"; write {{{tag} = {show(found)}}}" if chooses else ""

        if isinstance(found, str) and _allows(annotation, tuple):
            return f"; write [{show(found)}]"

        number = _number(found)
        if number is not None and any(_allows(annotation, kind) for kind in (int, float)):
            return f"; write {number} without quotes"

        return ""


def _number(found: Any) -> str | None:
    """The number that a string holds, as TOML writes it."""
    if isinstance(found, str) and re.fullmatch(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", found.strip()):
        return found.strip()
    return None


def _explain(problems: Sequence[_Problem]) -> Iterator[str]:
    """Yield the lines of all problems; the alternatives of one value are one fault."""
    seen = set[str]()
    for problem in problems:
        if problem.kind == "too_short" and any(problem.holds(other) for other in problems):
            continue  # the items are at fault, not their number

        for line in problem.lines():
            if line not in seen:
                seen.add(line)
                yield line


def _mentions(line: str, keys: set[str]) -> bool:
    """Return whether a line speaks of one of these keys.

    A key that is an English word counts where a sign follows it.
    """
    ends = {key: r"(?![\w-])" if len(key) > 5 or "_" in key else r"(?=[=:.])" for key in keys}
    return any(re.search(rf"(?<![\w-]){re.escape(key)}{end}", line) for key, end in ends.items())


def _without(table: Any, paths: Sequence[list[str]]) -> Any:
    """Return the table without what lies at `paths`."""
    here = {path[0] for path in paths if len(path) == 1}
    left = {}

    for key, value in table.items():
        deeper = [path[1:] for path in paths if len(path) > 1 and path[0] == key]
        if key not in here:
            left[key] = _without(value, deeper) if deeper and isinstance(value, dict) else value

    return left


def _dotted(place: str, rest: str) -> str:
    return f"{place}.{rest}" if place else rest


def _nearest(found: str, known: Sequence[str], otherwise: str) -> str:
    close = difflib.get_close_matches(found, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise}{', '.join(known) or 'none'}"


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
    """The alternatives of an annotation, without `None`."""
    return [each for each, _ in _constrained(annotation)]


def _tables(annotation: Any) -> list[type[Settings]]:
    """The classes of settings among the alternatives of an annotation."""
    found = _alternatives(annotation)
    return [each for each in found if isinstance(each, type) and issubclass(each, Settings)]


def _allows(annotation: Any, kind: type) -> bool:
    return any((get_origin(each) or each) is kind for each in _alternatives(annotation))


def _item(annotation: Any, part: str | int) -> _Right | None:
    """Return what is right at an index of an array or a key of a table of values.

    None if `part` is no such place.
    """
    for each in _alternatives(annotation):
        arguments = get_args(each)
        if get_origin(each) is tuple and isinstance(part, int):
            return _Right.of(
                arguments[0 if arguments[-1] is ... else min(part, len(arguments) - 1)]
            )

        if get_origin(each) is dict:
            return _Right.of(arguments[1])

    return None


def _kinds(annotation: Any, bounds: Sequence[Any]) -> Iterator[str]:
    for each, more in _constrained(annotation):
        origin = get_origin(each)
        if origin is Literal:
            yield _or([_toml(value) for value in get_args(each)])
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
    inner = _Right.of(arguments[0])
    words = (
        "tables"
        if inner.tables
        else {int: "integers", float: "numbers"}.get(inner.annotation, "strings")
    )

    if get_origin(inner.annotation) is Literal:
        words = f"strings among {', '.join(_toml(value) for value in get_args(inner.annotation))}"
    if arguments[-1] is not ...:
        return f"an array of {len(arguments)} {words}"

    return f"an array of {words}{f', at least {least}' if least else ''}{f', at most {most}' if most else ''}"


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


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _tags(model: type[Settings]) -> list[str]:
    """Values that choose this model in a union."""
    return [
        tag
        for key in TAGS
        if key in model.model_fields
        for tag in get_args(model.model_fields[key].annotation)
    ]
