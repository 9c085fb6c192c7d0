"""The two consoles, the options that several commands share, and printing in their formats."""

import json
import logging
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import typer
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.status import Status
from typer.core import TyperArgument

from fluvial.formatting import safe_text
from fluvial.storage.recipes import table_of
from fluvial.storage.run_files import JsonObject

if TYPE_CHECKING:
    from fluvial.runs.config import RunConfig


class Argument(TyperArgument):
    """Argument that keeps its help text.

    The base class of click 8.5 has a help text too, and typer 0.20, which Flower asks for, sets its
    own before that of the base, which is none.
    """

    def __init__(self, *, help: str | None = None, **given: Any) -> None:
        super().__init__(help=help, **given)
        self.help = help


typer.main.TyperArgument = Argument  # type: ignore[attr-defined]

out = Console(highlight=False)
"""Console of results: standard output."""
err = Console(stderr=True, highlight=False)
"""Console of progress, warnings and errors: standard error."""
WIDEST = 1000
"""Columns of a pipe or a file, at most."""
NOTES = "fluvial.runs.run"
"""Logger whose warnings are notes on a configuration and its data, given before the first round."""
CLICK_SUGGESTS = hasattr(click.exceptions, "NoSuchCommand")
"""True where click (8.4 and later) names the nearest command, so that typer must not do it too."""


def finite(value: float | None) -> float | None:
    """Return a number of the command line; raises `BadParameter` for nan, which is in each range of
    click's, and for infinity."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


Format = Annotated[
    Literal["table", "json"],
    typer.Option("--format", help="Tables for people, or JSON for programs."),
]
ConfigPath = Annotated[
    Path, typer.Argument(help="A TOML file, or a recipe, such as recipe:quickstart.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting as a line of TOML, such as 'rounds=3'; may be repeated."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")]
ServerFolder = Annotated[Path, typer.Argument(help="The server's folder.")]
SiteFolder = Annotated[Path, typer.Argument(help="The site's folder.")]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="No TLS and no keys: for trials on one machine."),
]


class LogFormat(logging.Formatter):
    """Format of the log: time, logger and message, and the message alone of a note."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a message, that of a note as `fluvial check` prints it."""
        if record.name == NOTES and record.levelno == logging.WARNING:
            return f"• {safe_text(record.getMessage())}"
        return super().format(record)


@contextmanager
def working(text: str) -> Iterator[Status]:
    """Show a spinner with `text` on standard error, and where that is no terminal, a line."""
    if not err.is_terminal:
        err.print(f"{text} ...", style="dim", markup=False)
    with err.status(text) as status:
        yield status


def load_config(
    path: Path, overrides: list[str] | None, *, as_written: bool = False
) -> "RunConfig":
    """Read a configuration and its overrides; raise `ConfigError`.

    With `as_written`, paths stay as they are in the file.
    """
    table_of(path, as_written=as_written)  # a file that cannot be read needs no library
    with working("reading the configuration"):
        from fluvial.runs.config import load

        return load(path, overrides or [], as_written=as_written)


def print_content(
    content: JsonObject, format: str, table: Callable[[JsonObject], RenderableType]
) -> None:
    """Print `content` as JSON, or as the `table` that is made of it."""
    if format == "json":
        print_json(content)
    else:
        print_whole(table(content))


def print_whole(content: RenderableType) -> None:
    """Print tables; to a pipe or a file without cutting a line at the width of a terminal."""
    needed = Measurement.get(out, out.options.update(width=WIDEST), content).minimum
    whole = out.is_terminal or needed <= out.width
    (out if whole else Console(file=out.file, width=needed, highlight=False)).print(content)


def print_json(content: JsonObject) -> None:
    """Print JSON values to standard output, indented by two."""
    print(json.dumps(content, indent=2))  # noqa: T201 - this is the output


def print_line_of_json(content: JsonObject) -> None:
    """Print JSON values to standard output as one line of JSON Lines, at once."""
    print(json.dumps(content), flush=True)  # noqa: T201 - this is the output


def print_line(text: str) -> None:
    """Print one line without markup and without a break at the width of the terminal."""
    out.print(safe_text(text), markup=False, soft_wrap=True)


def program_name() -> list[str]:
    """Return the words with which this program was called, to call it again."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return [sys.executable, "-m", "fluvial.cli"]
    return [called.name if shutil.which(called.name) else str(called)]


def repeated_command(options: Sequence[str]) -> str:
    """Return the command with which this program was called, and more options, for a shell."""
    return shlex.join([*program_name(), *sys.argv[1:], *options])


def print_error(kind: str, message: str) -> None:
    """Print an error to standard error; an indented line, such as a command, is not broken at the
    width of the terminal, so that it can be copied."""
    err.print(f"[red]{kind}[/]: ", end="")
    for line in safe_text(message).split("\n"):
        err.print(line, markup=False, soft_wrap=line.startswith("  "))
