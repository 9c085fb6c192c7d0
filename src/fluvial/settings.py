"""Base class of all tables of settings: read-only, strict, without unknown keys.

The docstrings of the fields describe the settings in docs/settings.md; scripts/write_settings.py
alone has them read, since pydantic would parse every module for them at each start.

A value is honoured or refused. Nothing is converted ("2" and 2.0 are no integer, 1 is not true),
numbers are finite, strings are not empty, and a list holds each string once.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticKnownError


def check_text(text: str) -> None:
    """Raise `ValueError` for a string that is empty or that no file can hold."""
    if not text:
        raise ValueError("the string is empty; give a value or remove the key")

    if "\0" in text or (
        not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
    ):
        raise ValueError(
            "the string holds a character that no text may hold (NUL or half of a surrogate pair)"
        )


def _exact(value: object) -> object:
    """Refuse 2.0 and true where 2 and 1 are among the choices."""
    if isinstance(value, bool | float):
        raise PydanticKnownError("int_type")

    return value


def _path_text(value: object) -> object:
    if isinstance(value, str):
        check_text(value)

    return value


FilePath = Annotated[Path, Field(strict=False), BeforeValidator(_path_text)]
"""Type of a path, which is a string in TOML."""
EXACT = BeforeValidator(_exact)
"""Validator for a `Literal` of integers, which would otherwise accept 2.0 for 2."""


class ConflictError(ValueError):
    """Values that are each valid alone but contradict each other, one line for each conflict."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class Settings(BaseModel):
    """A table of settings in a run's configuration, site.toml or server.toml."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
    )

    moved: ClassVar[Mapping[str, str]] = {}
    """Keys of earlier versions, and the setting that each has become."""

    def conflicts(self) -> Iterator[str]:
        """Yield a line for each set of values that are valid alone but contradict each other.

        A line begins with the key, relative to this table: `key: why; remedy`.
        """
        yield from ()

    def differs(self, name: str) -> bool:
        """Return whether a setting has another value than its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def repeated(self, name: str) -> Iterator[str]:
        """Yield a line, as `conflicts` does, for a list of numbers that has one twice."""
        numbers: tuple[float, ...] = getattr(self, name)
        if len(set(numbers)) < len(numbers):
            yield f"{name}: a number stands twice; remove one"

    @model_validator(mode="after")
    def _no_conflict(self) -> Self:
        lines = list(self.conflicts())
        if lines:
            raise ConflictError(lines)

        return self

    @model_validator(mode="before")
    @classmethod
    def _arrays(cls, table: object) -> object:
        """Turn the arrays of TOML and JSON into tuples, which strict fields require."""
        return _frozen(table) if isinstance(table, dict) else table

    @field_validator("*", mode="after")
    @classmethod
    def _readable_strings(cls, value: object) -> object:
        """Refuse empty and unreadable strings, and strings that a list holds twice."""
        strings = list(_strings(value))
        for text in strings:
            check_text(text)

        if isinstance(value, tuple) and len(set(strings)) < len(strings):
            twice = next(text for text in strings if strings.count(text) > 1)
            raise ValueError(f"{twice!r} is listed twice; remove one")

        return value


def _frozen(value: object) -> object:
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)

    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}

    return value


def _strings(value: object) -> Iterator[str]:
    """Yield every string of a value that is no table of settings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *_strings(item))
