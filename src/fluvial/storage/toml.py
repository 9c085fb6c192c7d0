"""TOML into settings: every fault of a file at once, each with its place, what was found and what
would be right."""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fluvial.errors import ConfigError
from fluvial.settings import Settings
from fluvial.storage.files import refuse_endless
from fluvial.storage.toml_expected import TAGS, show
from fluvial.storage.toml_faults import Fault, explain

__all__ = ["TAGS", "load", "read", "show"]

T = TypeVar("T", bound=Settings)


MOST_DEEP = 40
"""Tables and arrays in each other, at most; settings have fewer than ten."""
DEEP = "tables or arrays lie too deep in each other; no setting is nested so"


def load(path: Path, missing: str) -> dict[str, Any]:
    """Return the table of a TOML file; raises `ConfigError`, with the line `missing` where there is
    no file."""
    refuse_endless(path)
    try:
        return parsed(path.read_text(encoding="utf-8-sig"))
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
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def parsed(text: str) -> dict[str, Any]:
    """Return the table of a text of TOML; raises `tomllib.TOMLDecodeError`, and `ValueError` for an
    integer of thousands of digits and for what is nested deeper than any setting."""
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError(DEEP) from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise ValueError("an integer has thousands of digits, and no setting is so large") from None
    if not _is_shallow(table):
        raise ValueError(DEEP)
    return table


def _is_shallow(table: dict[str, Any]) -> bool:
    """Return whether tables and arrays lie at most `MOST_DEEP` deep in each other."""
    level: list[Any] = [table]
    for _ in range(MOST_DEEP):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list | tuple)
        ]
        if not level:
            return True
    return False


def read(root: type[T], table: dict[str, Any], where: str) -> T:
    """Return the settings that `table` holds; raises `ConfigError` with a line for each fault.

    A fault hides what is checked after it, such as values that cannot stand together. So what is at
    fault is set aside and the rest read again, until nothing new is found; a later fault that
    mentions what was set aside is left out.
    """
    if not _is_shallow(table):
        raise ConfigError(f"{where}: {DEEP}")
    lines = dict[str, None]()
    aside = set[str]()

    while True:
        try:
            settings = root.model_validate(table)
        except ValidationError as error:
            problems = [Fault(each, root) for each in error.errors()]
            lines |= dict.fromkeys(line for line in explain(problems) if not _mentions(line, aside))
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


def _mentions(line: str, keys: set[str]) -> bool:
    """Return whether a line mentions one of these keys.

    A key that is an English word counts where a sign follows it.
    """
    ends = {key: r"(?![\w-])" if len(key) > 5 or "_" in key else r"(?=[=:.])" for key in keys}
    return any(re.search(rf"(?<![\w-]){re.escape(key)}{end}", line) for key, end in ends.items())


def _without(table: dict[Any, Any], paths: Sequence[list[str]]) -> dict[Any, Any]:
    """Return the table without what lies at `paths`; keys of other types count as their text."""
    here = {path[0] for path in paths if len(path) == 1}
    left: dict[Any, Any] = {}

    for key, value in table.items():
        deeper = [path[1:] for path in paths if len(path) > 1 and path[0] == str(key)]
        if str(key) not in here:
            left[key] = _without(value, deeper) if deeper and isinstance(value, dict) else value

    return left
