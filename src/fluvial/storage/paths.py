"""Paths in a run's file: relative to the folder of the file that names them, and whole from then
on."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fluvial.errors import ConfigError
from fluvial.storage import toml

BUNDLED = ("stdlib", "stdlib-keywords")
"""Sources that come with Python and bring their own sites, held-out records and public text."""
PLACES = (
    ("model", "name_or_path"),
    ("data", "source"),
    ("data", "heldout_source"),
    ("data", "public_source"),
    ("data", "chat_template"),
    ("evaluate", "include_path"),
)
"""Settings that may name a file or a folder, or something else, such as the id of a hub."""
_OF_SITE = ("source", "heldout_source", "chat_template")
"""Those of a table of a site."""


def beside(table: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the table with whole paths for what lies in the folder of `file`, and all else as it
    is.

    Raises `ConfigError` for a path that leads somewhere only from the working directory.
    """
    folder = file.resolve().parent
    lines = []

    for place, text in _relative(table):
        if exists(folder / text):
            table = whole(table, place, folder)
        elif exists(Path(text)):
            remedy = os.path.relpath(text, folder)
            lines.append(
                f"{file}: {'.'.join(place)} = {toml.show(text)}: lies in the working directory, "
                "and paths in a file are relative to the folder of that file; write "
                f"{toml.show(remedy)}"
            )

    if lines:
        raise ConfigError("\n".join(lines))

    return table


def here(table: dict[str, Any]) -> dict[str, Any]:
    """Return the table of a `--set` line with whole paths for what lies in the working
    directory."""
    for place, text in _relative(table):
        if exists(Path(text)):
            table = whole(table, place, Path.cwd())

    return table


def whole(table: dict[str, Any], place: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Return the table with the path at `place` as seen from `folder`.

    One file has one path, whichever folder names it: `..` is left out, unless a link lies before
    it.
    """
    outer, *inner = place
    if inner:
        return {**table, outer: whole(table[outer], tuple(inner), folder)}
    path = folder / table[outer]
    plain = Path(os.path.normpath(path))
    same = exists(plain) and exists(path) and plain.samefile(path)
    return {**table, outer: str(plain if same else path)}


def exists(path: Path) -> bool:
    """Return whether there is a file or folder; no text, however long, is an error."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def places(table: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the settings of a table that may name a file or a folder."""
    yield from PLACES
    data = table.get("data")
    by_site = data.get("by_site") if isinstance(data, dict) else None
    for name in by_site if isinstance(by_site, dict) else ():
        yield from (("data", "by_site", name, key) for key in _OF_SITE)


def value_at(table: dict[str, Any], place: tuple[str, ...]) -> Any:
    """Return the value at a place of nested tables, None where there is none."""
    value: Any = table
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def without_folders(table: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the last part of each path that begins at the root or at a home, so that
    they tell nothing about the folders of this machine."""
    named = table
    for place in places(named):
        text = value_at(named, place)
        if isinstance(text, str) and "\n" not in text:
            named = _replaced(named, place, last_part(text))
    return named


def last_part(path: str) -> str:
    """Return the last part of a path that begins at the root or at a home, else `path`."""
    return Path(path).name if Path(path).is_absolute() or path.startswith("~") else path


def _replaced(table: dict[str, Any], place: Sequence[str], value: str) -> dict[str, Any]:
    outer, *inner = place
    return {**table, outer: _replaced(table[outer], inner, value) if inner else value}


def _relative(table: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the texts that may be relative paths, each with its place."""
    for place in places(table):
        key = place[-1]
        text = value_at(table, place)
        if (
            not isinstance(text, str)
            or not text
            or Path(text).is_absolute()
            or text.startswith("~")
        ):
            continue

        if text in ("embedded", *BUNDLED) or (
            key == "chat_template" and "." not in text and "/" not in text
        ):
            continue  # names of ours

        yield place, text
