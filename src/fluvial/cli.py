"""The command `fluvial`."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from fluvial import __version__
from fluvial.errors import FluvialError

if TYPE_CHECKING:
    from fluvial.config import RunConfig

app = typer.Typer(
    help="Fine-tune one language model over many sites whose data must stay where it is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

Format = Annotated[Literal["table", "json"], typer.Option("--format", help="For people, or for programs.")]
ConfigPath = Annotated[Path, typer.Argument(help="A TOML file, such as configs/quickstart.toml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="A line of TOML, such as 'rounds=3'. May be repeated.")
]


def main() -> None:
    """Run the command; a mistake of the user's is one message and exit code 1."""
    try:
        app()
    except FluvialError as error:
        err.print(f"[red]{type(error).__name__}[/]: ", end="")
        err.print(str(error), markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted; go on with --resume")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every message to standard error.")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


@app.command()
def run(
    config: ConfigPath,
    folder: Annotated[Path | None, typer.Option("--out", help="Where the run lies; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overrides: Overrides = None,
    format: Format = "table",
) -> None:
    """Run a configuration to its result: baselines, rounds, held-out measures, adapter."""
    settings = _load(config, overrides)
    path = folder or Path("runs") / config.stem
    with _working(settings, quiet=format == "json") as progress:
        from fluvial.run import execute

        for event in execute(settings, path, resume=resume):
            progress.show(event)
    assert event.kind == "result"
    if format == "json":
        print(json.dumps(event.values, indent=2))  # noqa: T201 - this is the output
        return
    from fluvial import show

    out.print(show.result_table(event.values))
    out.print(show.closing_words(event.values, path))


@app.command()
def check(config: ConfigPath, overrides: Overrides = None, format: Format = "table") -> None:
    """Check a configuration and its data, and print parameters, bytes and memory, without training."""
    settings = _load(config, overrides)
    with err.status("loading model configuration and data"):
        from fluvial import show
        from fluvial.plan import plan

        planned = plan(settings)
    _print(planned, format, show.plan_table)


@app.command()
def preview(
    config: ConfigPath,
    site: Annotated[str | None, typer.Option(help="Which site; default the first.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many sequences.")] = 3,
    overrides: Overrides = None,
    format: Format = "table",
) -> None:
    """Show the tokens that a site trains on; those that carry loss are marked."""
    settings = _load(config, overrides)
    with err.status("reading data"):
        from fluvial import show
        from fluvial.plan import preview as preview_tokens

        found = preview_tokens(settings, site, count)
    _print(found, format, show.preview_text)


@app.command("show")
def show_run(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
    html: Annotated[Path | None, typer.Option("--html", help="Also write one self-contained page.")] = None,
    format: Format = "table",
) -> None:
    """Print a run: its rounds, result and bytes."""
    from fluvial import show

    found = show.read_run(folder)
    _print(found, format, show.run_tables)
    if html is not None:
        with err.status("drawing"):
            from fluvial.page import write_page

            write_page(found, html)
        err.print(f"wrote {html}")


def _load(path: Path, overrides: list[str] | None) -> "RunConfig":
    with err.status("reading the configuration"):
        from fluvial.config import load

        return load(path, overrides or [])


def _print(content: dict[str, Any], format: str, table: Any) -> None:
    if format == "json":
        print(json.dumps(content, indent=2))  # noqa: T201 - this is the output
    else:
        out.print(table(content))


class _Watch(logging.Handler):
    """Turns events into lines, and what the library logs into the text beside the bar."""

    def __init__(self, settings: "RunConfig", quiet: bool) -> None:
        super().__init__(logging.INFO)
        self.settings, self.quiet = settings, quiet
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[doing]}"),
            console=err,
            transient=True,
            disable=quiet,
        )
        total = settings.rounds * (1 + len(settings.compare))
        self.task = self.bar.add_task("loading the model", total=total, doing="")
        self.method = ""

    def emit(self, record: logging.LogRecord) -> None:
        """A log message of the library."""
        if record.levelno < logging.WARNING:
            self.bar.update(self.task, doing=record.getMessage()[:60])

    def show(self, event: Any) -> None:
        """One line for a round; the header once for each method."""
        from fluvial import show

        if self.quiet or event.kind == "result":
            return
        if event.method != self.method:
            self.method = event.method
            self.bar.console.print(show.round_header(event.method))
        if event.kind == "setup":
            for line in show.setup_lines(event.values):
                self.bar.console.print(line)
        if event.kind == "round":
            self.bar.console.print(show.round_line(event.values))
            self.bar.update(self.task, advance=1, description=event.method)


@contextmanager
def _working(settings: "RunConfig", quiet: bool) -> Iterator[_Watch]:
    watch = _Watch(settings, quiet)
    library = logging.getLogger("fluvial")
    level, library.level = library.level, logging.INFO
    library.addHandler(watch)
    try:
        with watch.bar:
            yield watch
    finally:
        library.removeHandler(watch)
        library.level = level


if __name__ == "__main__":
    main()
