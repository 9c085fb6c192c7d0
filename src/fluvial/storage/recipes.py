"""Recipes: configurations that come with the package, named `recipe:NAME` where a file is asked."""

from pathlib import Path
from typing import Any

from fluvial.errors import ConfigError
from fluvial.storage import paths, toml

PREFIX = "recipe:"
"""Beginning of the name of a recipe where a configuration file may stand too."""


def folder() -> Path:
    """Return the folder of the recipes: in the package, or `configs` of the clone."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def names() -> tuple[str, ...]:
    """Return the names of all recipes, sorted."""
    return tuple(sorted(path.stem for path in folder().glob("*.toml")))


def recipe_path(name: str) -> Path:
    """Return the file of a recipe; raises `ConfigError` with the known names."""
    if name not in names():
        raise ConfigError(f"recipe {name!r:.60}: unknown; the recipes are {', '.join(names())}")
    return folder() / f"{name}.toml"


def text(name: str) -> str:
    """Return the TOML text of a recipe."""
    return recipe_path(name).read_text(encoding="utf-8")


def summary(name: str) -> str:
    """Return the first line of a recipe, which says what it is for."""
    return text(name).splitlines()[0].removeprefix("# ")


def recipe_of(path: Path) -> str | None:
    """Return the recipe that stands in the place of a file, None for a file."""
    written = str(path)
    return written.removeprefix(PREFIX) if written.startswith(PREFIX) else None


def stem(path: Path) -> str:
    """Return the name of a configuration without folder and suffix, for what is named after it."""
    return recipe_of(path) or path.stem


def table_of(path: Path, *, as_written: bool = False) -> dict[str, Any]:
    """Return the table of a configuration's file or recipe, its relative paths whole unless
    `as_written`; raises `ConfigError`."""
    recipe = recipe_of(path)
    file = path if recipe is None else recipe_path(recipe)
    table = toml.load(file, f"there is no configuration file {str(path)!r}")
    if as_written:
        return table
    return paths.beside(table, path) if recipe is None else paths.here(table)
