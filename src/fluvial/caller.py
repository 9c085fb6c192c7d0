"""Names of a run's arguments in messages: options of the command, or arguments of `fluvial.api`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_python: ContextVar[bool] = ContextVar("python", default=False)
"""True while a function of `fluvial.api` works."""


@contextmanager
def from_python() -> Iterator[None]:
    """Name arguments as a caller from Python gives them, while this lasts or a function runs."""
    token = _python.set(True)
    try:
        yield
    finally:
        _python.reset(token)


def argument(name: str, value: str | bool | None = None) -> str:
    """Return an argument as the caller writes it: `--out` or `out=`, `--resume` or `resume=True`.

    A text as value follows the name: `--fleet flower` or `fleet='flower'`.
    """
    if _python.get():
        return f"{name}=" if value is None else f"{name}={value!r}"

    return f"--{name} {value}" if isinstance(value, str) else f"--{name}"


def overrides() -> str:
    """Return the name of the argument that changes settings: `--set` or `overrides`."""
    return "overrides" if _python.get() else "--set"


def setting(line: str) -> str:
    """Return the argument that changes a setting by a line of TOML: `--set 'LINE'` or
    `overrides=["LINE"]`."""
    return f"overrides=[{line!r}]" if _python.get() else f"--set '{line}'"


def resume() -> str:
    """Return the argument that continues a run: `--resume` or `resume=True`."""
    return argument("resume", True)


def another_folder() -> str:
    """Return the remedy for a folder that cannot be used."""
    return f"start again in another folder with {argument('out')}"


def another_base() -> str:
    """Return the remedy for a base that is not where a run found it."""
    return "name its folder with " + setting('model.name_or_path="FOLDER"')
