"""The file of a comparison: one base configuration, a grid of settings, and named contenders."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from fluvial.errors import ConfigError
from fluvial.runs.comparison.files import PAGE
from fluvial.runs.config import merge, override
from fluvial.settings import FilePath, Settings
from fluvial.storage import paths, toml
from fluvial.storage.run_files import COMPARED

KEYS = frozenset({"base", "grid", "contender"})
"""Keys that a comparison's file has, and the configuration of a run has not."""
LONGEST = 120
"""Bytes of a contender's name; a file system takes 255, with what stands around it."""
MOST = 1000
"""Contenders of a comparison, at most; more are a mistake in a grid."""


class ContenderConfig(Settings):
    """A contender of its own, beside those of the grid."""

    name: str
    """Name of the contender in tables and of its folder."""
    set: tuple[str, ...] = ()
    """Settings over those of the base, each a line of TOML such as `"method.fraction = 0.5"`."""
    unset: tuple[str, ...] = ()
    """Settings or tables of the base that the contender leaves out, such as `"codec"`."""

    def conflicts(self) -> Iterator[str]:
        """Yield a name that no folder should have."""
        if folder_name(self.name) != self.name:
            yield (
                f"name: {toml.show(self.name)} names a folder too; use letters, digits and _ . + = "
                f"- only, at most {LONGEST} bytes, such as {toml.show(folder_name(self.name))}"
            )
        elif self.name in (COMPARED, PAGE):
            yield f"name: {self.name} is a file of the comparison; give another name"


class ExcludeConfig(Settings):
    """Values of the grid that are not combined, by setting."""

    model_config = ConfigDict(extra="allow")


class SweepConfig(Settings):
    """The file of a comparison."""

    base: FilePath
    """Configuration of a run that all contenders begin with."""
    seeds: tuple[int, ...] = ()
    """Seeds of each contender's runs; unset, the seed of the base."""
    baseline: str | None = None
    """Name of the contender that the others are compared with; unset, the first."""
    grid: dict[str, tuple[Any, ...]] = Field({})
    """Values by setting, such as `"lora.r" = [4, 8]`; each combination is a contender."""
    exclude: tuple[ExcludeConfig, ...] = ()
    """Combinations of the grid that are left out."""
    contender: tuple[ContenderConfig, ...] = ()
    """Contenders of their own, beside those of the grid."""

    def conflicts(self) -> Iterator[str]:
        """Yield what is missing or means nothing."""
        if not self.grid and not self.contender:
            yield "grid: there is no contender; give a [grid] of settings, or a [[contender]]"

        yield from repeated(self.seeds)
        for key, values in self.grid.items():
            if not values:
                yield f"grid.{key}: the list is empty; give a value or remove the key"
            elif key == "seed":
                yield "grid.seed: seeds are no contenders; write seeds = [...] above the tables"

        for excluded in self.exclude:
            for key, value in (excluded.model_extra or {}).items():
                if value not in self.grid.get(key, ()):
                    yield (
                        f"exclude: {key} = {toml.show(value)} is no value of the grid; remove it, "
                        "or correct the grid"
                    )


def repeated(seeds: Sequence[int]) -> Iterator[str]:
    """Yield a line for a seed that is listed twice, which would count once."""
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if twice is not None:
        yield f"seeds: {twice} is listed twice; remove one"


Changes = dict[str, Any]
"""Table of settings that are put over those of a base."""


def is_sweep(table: Mapping[str, Any]) -> bool:
    """Return whether the table of a file is that of a comparison."""
    return bool(KEYS & table.keys())


def variants(sweep: SweepConfig, path: Path) -> Iterator[tuple[str, Changes, Sequence[str]]]:
    """Yield name, changes and keys to leave out of each contender, those of the grid first.

    Raises `ConfigError` for lines that are no TOML and for a grid of too many combinations.
    """
    for cell in cells(sweep, path):
        changes: Changes = {}
        for key, value in cell.items():
            changes = _joined(changes, _nested(key, value))
        yield name_of(cell), paths.beside(changes, path), ()

    for entry in sweep.contender:
        changes = {}
        for line in entry.set:
            try:
                changes = merge(changes, override(line))
            except ConfigError as error:
                raise ConfigError(f"{path}: contender {entry.name!r}: {error}") from None
        yield entry.name, paths.beside(changes, path), entry.unset


def cells(sweep: SweepConfig, path: Path) -> list[Changes]:
    """Return the combinations of the grid that are not excluded, each as value by setting."""
    if not sweep.grid:
        return []

    count = 1
    for values in sweep.grid.values():
        count *= len(values)
    if count > MOST:
        raise ConfigError(
            f"{path}: grid: has {count} combinations, and a comparison takes at most {MOST}; "
            "shorten its lists"
        )

    excluded = [each.model_extra or {} for each in sweep.exclude]
    combined = [
        dict(zip(sweep.grid, values, strict=True)) for values in product(*sweep.grid.values())
    ]
    return [
        cell
        for cell in combined
        if not any(all(cell[key] == value for key, value in each.items()) for each in excluded)
    ]


def name_of(cell: Mapping[str, Any]) -> str:
    """Return the name of a combination: its values, joined by "+", those of `name` keys alone and
    others behind the last word of their key."""
    words = []
    for key, value in cell.items():
        last = key.rpartition(".")[2]
        named = last in ("name", "name_or_path") or isinstance(value, dict)
        words.append(_word(value) if named else f"{last}={_word(value)}")
    return folder_name("+".join(words))


def folder_name(text: str) -> str:
    """Return a text as the name of a contender, which is that of its folder too; a long one ends in
    a digest."""
    name = re.sub(r"[^\w.+=,-]+", "-", text).strip("-.") or "contender"
    if len(name.encode()) <= LONGEST:
        return name
    start = name.encode()[: LONGEST - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _word(value: Any) -> str:
    """Return a value of the grid in a few characters."""
    if isinstance(value, dict):
        rest = [f"{key}={_word(each)}" for key, each in value.items() if key != "name"]
        return ",".join([str(value["name"])] * ("name" in value) + rest)
    if isinstance(value, tuple):
        return ",".join(map(_word, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()

    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _nested(key: str, value: Any) -> Changes:
    """Return the table that a dotted key and its value stand for."""
    for name in reversed(key.split(".")):
        value = {name: value}
    table: Changes = value
    return table


def _joined(left: Changes, right: Changes) -> Changes:
    """Return two tables of one combination as one, whatever the order of their keys."""
    both = dict(left)
    for key, value in right.items():
        old = both.get(key)
        inner = isinstance(old, dict) and isinstance(value, dict)
        both[key] = _joined(old, value) if inner else value  # type: ignore[arg-type]
    return both


def without(table: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return a table without the settings at some dotted keys, and without tables that are empty
    then; raises `KeyError` for one that is not there."""
    for key in keys:
        first, _, rest = key.partition(".")
        inner = table[first]
        if rest and not isinstance(inner, dict):
            raise KeyError(key)

        table = {name: value for name, value in table.items() if name != first}
        if rest and (kept := without(inner, [rest])):
            table[first] = kept
    return table
