"""The command `fluvial`."""

import json
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from fluvial import __version__, interrupt
from fluvial.errors import ConfigError, FluvialError, MissingWeightsError
from fluvial.formatting import plain
from fluvial.runs.remaining import Remaining

if TYPE_CHECKING:
    from fluvial.runs.config import RunConfig

app = typer.Typer(
    help="Fine-tune one language model over many sites whose data must stay where it is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Format = Annotated[
    Literal["table", "json"], typer.Option("--format", help="For people, or for programs.")
]
ConfigPath = Annotated[Path, typer.Argument(help="A TOML file, such as configs/quickstart.toml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="A line of TOML, such as 'rounds=3'. May be repeated."),
]


def main() -> None:
    """Run the command; a mistake of the user's is one message and exit code 1."""
    interrupt.install()
    try:
        app()
    except FluvialError as error:
        err.print(f"[red]{type(error).__name__}[/]: ", end="")
        err.print(plain(str(error)), markup=False)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log every message to standard error.")
    ] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit

    lines = logging.StreamHandler(sys.stderr)
    # On the handler: a command that follows the library's messages lowers the level of the
    # library's logger.
    lines.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.basicConfig(
        level=lines.level, format="%(asctime)s %(name)s: %(message)s", handlers=[lines]
    )


@app.command()
def run(
    config: ConfigPath,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where the run lies; default runs/NAME.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    fleet: Annotated[
        Literal["process", "flower"],
        typer.Option("--fleet", help="Sites in this process, or Flower's simulation."),
    ] = "process",
    overrides: Overrides = None,
    format: Format = "table",
) -> None:
    """Run a configuration to its result: baselines, rounds, held-out measures, weights."""
    path = folder or Path("runs") / config.stem
    interrupt.advise(partial(_how_to_go_on, path))
    settings = _load(config, overrides)

    with _working(settings, quiet=format == "json") as progress:
        if fleet == "flower":
            from fluvial.flower.simulate import simulate as execute
        else:
            from fluvial.runs.run import execute

        for event in execute(settings, path, resume=resume):
            progress.show(event)

    interrupt.advise(str)
    assert event.kind == "result"
    if format == "json":
        print(json.dumps(event.values, indent=2))  # noqa: T201 - this is the output
        return

    from fluvial.report import show

    found = show.read_run(path)
    out.print(show.result_table(event.values, show.cut_words(found["config"])))
    out.print(show.verdict_line(found))
    out.print()
    out.print(show.closing_words(event.values, path, _command()))


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    time_it: Annotated[
        bool,
        typer.Option("--time", help="Load the model, time an optimizer step, predict a round."),
    ] = False,
    format: Format = "table",
) -> None:
    """Check a configuration and its data, and print parameters, bytes and memory, without
    training."""
    settings = _load(config, overrides)
    with _telling("loading model configuration and data"):
        from fluvial.report.plan_tables import plan_table
        from fluvial.runs.plan import plan

        try:
            planned = plan(settings)
        except MissingWeightsError:
            _print(plan(settings, weights_needed=False), format, plan_table)
            raise

        if time_it:
            from fluvial.runs.timing import timed

            planned = timed(settings, planned)

    _print(planned, format, plan_table)


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
        from fluvial.report.plan_tables import preview_text
        from fluvial.runs.plan import preview as preview_tokens

        found = preview_tokens(settings, site, count)

    _print(found, format, lambda tokens: preview_text(tokens, marks=not out.is_terminal))


@app.command()
def evaluate(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="runs/NAME/adapter or any PEFT folder, runs/NAME/model, a model's folder or hub id, or 'embedded'.",
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Records for loss, perplexity, accuracy, exact match.")
    ] = None,
    choices: Annotated[
        Path | None, typer.Option(help="Multiple-choice questions, JSON lines.")
    ] = None,
    shots: Annotated[
        int, typer.Option(min=0, max=5, help="Solved examples before each question.")
    ] = 0,
    shots_from: Annotated[
        Path | None, typer.Option(help="Questions that the examples are taken from.")
    ] = None,
    scoring: Annotated[
        Literal["letter", "text"],
        typer.Option(help="What is compared: letters, or texts for each byte."),
    ] = "letter",
    language: Annotated[
        Literal["auto", "en", "zh"], typer.Option(help="Wording of the prompt.")
    ] = "auto",
    benchmark: Annotated[
        Literal["auto", "none", "mmlu", "ceval", "cmmlu"],
        typer.Option(help="Whose groups of subjects are reported; by the subjects' names."),
    ] = "auto",
    subject_field: Annotated[
        str, typer.Option(help="The field of a question that names its subject.")
    ] = "subject",
    base: Annotated[
        bool, typer.Option(help="Measure the base model too, where there is one.")
    ] = True,
    overrides: Overrides = None,
    format: Format = "table",
) -> None:
    """Measure an adapter or a tuned model beside its base, or a model alone, on records or
    multiple-choice questions.

    Records are read as the run read its own: form, columns, template, max_length.
    --set 'data.form="text"' overrides.
    """
    with _telling("reading the weights"):
        from fluvial.runs.evaluation import evaluation_settings, how_records_are_read, run_settings
        from fluvial.training.assess import ChoiceConfig, evaluate_adapter, evaluate_model
        from fluvial.training.folders import kind_of, read_adapter_folder

        idle = {
            "--shots": shots,
            "--shots-from": shots_from,
            "--scoring": scoring != "letter",
            "--language": language != "auto",
            "--benchmark": benchmark != "auto",
            "--subject-field": subject_field != "subject",
        }
        named = [option for option, given in idle.items() if given]

        if choices is None and named:
            raise ConfigError(
                f"{', '.join(named)}: without effect, because no questions are named; add --choices"
            )

        asked = None
        if choices is not None:
            asked = ChoiceConfig(
                choices, shots, shots_from, scoring, language, subject_field, benchmark
            )

        kind = kind_of(adapter)
        if kind == "adapter" or (kind == "tuned" and base):
            found = read_adapter_folder(Path(adapter).expanduser())
            told = found.settings(data)
            run = found.run
        else:
            found, (told, run) = None, run_settings(adapter, data)

        settings = evaluation_settings(told, data, overrides or [])
        measuring: dict[str, Any] = {
            "data": settings.data if data else None,
            "choices": asked,
            "max_new_tokens": settings.evaluate.max_new_tokens,
            "seed": settings.seed,
        }
        if found is None:
            measured = evaluate_model(settings.model, **measuring)
        else:
            measured = evaluate_adapter(found, settings.model, **measuring, base=base)

        if data is not None:
            measured["records"] = how_records_are_read(
                settings.data, run, overrides or [], measured["data"]["form"]
            )

    from fluvial.report.evaluation_tables import evaluation_tables

    _print(measured, format, evaluation_tables)


@app.command("show")
def show_run(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write one self-contained page.")
    ] = None,
    format: Format = "table",
) -> None:
    """Print a run: its rounds, result and bytes."""
    from fluvial.report import show

    found = show.read_run(folder)

    with show.drawing(folder):
        _print(found, format, show.run_tables)
    if html is not None:
        with err.status("drawing"), show.drawing(folder):
            from fluvial.report.page import write_page

            write_page(found, html)

        err.print(f"wrote {html}")


server_app = typer.Typer(help="Many machines: the server.", no_args_is_help=True)
site_app = typer.Typer(help="Many machines: a site.", no_args_is_help=True)
app.add_typer(server_app, name="server")
app.add_typer(site_app, name="site")
ServerFolder = Annotated[Path, typer.Argument(help="The server's folder.")]
SiteFolder = Annotated[Path, typer.Argument(help="The site's folder.")]
RunNumber = Annotated[
    int | None, typer.Argument(help="The run's number; default the one submitted last.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="No TLS and no keys: on one machine, to try things.")
]


@server_app.command("init")
def server_init(
    folder: ServerFolder,
    address: Annotated[
        str, typer.Option(help="HOST:PORT under which sites reach it.")
    ] = "127.0.0.1:8000",
    certificate: Annotated[
        Path | None, typer.Option(help="Your own certificate; default, one is made.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The authority that signed it.")] = None,
    insecure: Insecure = False,
) -> None:
    """Make a server's folder: certificate authority, server certificate, settings."""
    from fluvial.flower import server_operator

    made = server_operator.server_init(
        folder, address=address, insecure=insecure, certificate=certificate, key=key, ca=ca
    )

    for line in made:
        out.print(line, markup=False, soft_wrap=True)


@server_app.command("start")
def server_start(folder: ServerFolder) -> None:
    """Run the server until it is stopped."""
    from fluvial.flower import server_operator

    server_operator.server_start(folder)


@server_app.command("renew")
def server_renew(folder: ServerFolder) -> None:
    """Make the server's certificate anew; sites need nothing new."""
    from fluvial.flower import server_operator

    out.print(server_operator.renew(folder), markup=False, soft_wrap=True)


@site_app.command("init")
def site_init(
    folder: SiteFolder,
    name: Annotated[str, typer.Option(help="The site's name in runs and reports.")],
    server: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:8000",
    ca: Annotated[Path | None, typer.Option(help="The server's ca.crt.")] = None,
    insecure: Insecure = False,
) -> None:
    """Make a site's folder: key pair and settings."""
    from fluvial.flower import site_operator

    for line in site_operator.site_init(folder, name=name, server=server, ca=ca, insecure=insecure):
        out.print(line, markup=False, soft_wrap=True)


@site_app.command("register")
def site_register(
    server: ServerFolder, public_key: Annotated[Path, typer.Argument(help="The site's NAME.pub.")]
) -> None:
    """Let a site join; run by the server's operator."""
    from fluvial.flower import server_operator

    out.print(server_operator.register(server, public_key).strip(), markup=False, soft_wrap=True)


@site_app.command("start")
def site_start(
    folder: SiteFolder,
    stock: Annotated[
        bool, typer.Option("--stock", help="Flower's own execution: a new process per message.")
    ] = False,
) -> None:
    """Run a site until it is stopped."""
    from fluvial.flower import site_operator

    raise typer.Exit(site_operator.site_start(folder, warm=not stock))


@app.command()
def submit(
    config: ConfigPath,
    server: Annotated[Path, typer.Option(help="The server's folder.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where the run lies; default SERVER/runs/NAME.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Start a configuration on a server; its sites do the work."""
    settings = _load(config, overrides, as_written=True)
    from fluvial.flower import server_operator

    path = folder or server / "runs" / config.stem
    number = server_operator.submit(settings, server, out=path, resume=resume)
    out.print(f"run {number} in {path}", markup=False, soft_wrap=True)
    out.print(f"follow it:  {_command()} logs {server} {number}", markup=False, soft_wrap=True)


@app.command()
def status(server: ServerFolder, format: Format = "table") -> None:
    """Show a server's runs and sites."""
    from fluvial.flower import server_operator
    from fluvial.report.status_tables import status_tables

    _print(server_operator.status(server), format, status_tables)


@app.command()
def logs(
    server: ServerFolder,
    run: RunNumber = None,
    follow: Annotated[bool, typer.Option(help="Go on until it ends.")] = True,
) -> None:
    """Print what a run says; the exit code is 1 when it has failed or was stopped."""
    from fluvial.flower import server_operator

    server_operator.logs(
        server, server_operator.newest(server) if run is None else run, follow=follow
    )


@app.command()
def stop(server: ServerFolder, run: RunNumber = None) -> None:
    """End a run; `submit --resume` goes on with it."""
    from fluvial.flower import server_operator

    out.print(
        server_operator.stop(
            server, server_operator.newest(server) if run is None else run
        ).strip(),
        markup=False,
    )


def _how_to_go_on(folder: Path) -> str:
    """Return the advice after a run was stopped by a signal."""
    again = [_command(), *sys.argv[1:]]
    if not (folder / "config.json").exists():
        return f"interrupted before anything was written; start again with:  {shlex.join(again)}"
    again += [] if "--resume" in again else ["--resume"]
    return f"interrupted; what was finished is kept, go on with:  {shlex.join(again)}"


def _command() -> str:
    """How this program can be called again from here."""
    return "fluvial" if shutil.which("fluvial") else sys.argv[0]


def _load(path: Path, overrides: list[str] | None, *, as_written: bool = False) -> "RunConfig":
    with err.status("reading the configuration"):
        from fluvial.runs.config import load

        return load(path, overrides or [], as_written=as_written)


def _print(content: dict[str, Any], format: str, table: Any) -> None:
    if format == "json":
        print(json.dumps(content, indent=2))  # noqa: T201 - this is the output
    else:
        out.print(table(content))


class _Watch(logging.Handler):
    """Turns events into lines, and what the library logs into the text beside the bar."""

    def __init__(self, settings: "RunConfig", quiet: bool) -> None:
        super().__init__(logging.INFO)
        self.settings = settings
        self.quiet = quiet
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("[dim]{task.fields[doing]}"),
            console=err,
            transient=True,
            disable=quiet,
        )
        runs = [(name, settings.rounds) for name in (*settings.compare, settings.method.name)]
        self.remaining = Remaining(runs)
        total = settings.rounds * len(runs)
        self.task = self.bar.add_task("loading the model", total=total, doing="", left="")
        self.method = ""

    def emit(self, record: logging.LogRecord) -> None:
        """A log message of the library."""
        if record.levelno < logging.WARNING:
            self.remaining.heard(record)
            left = self.remaining.words()
            self.bar.update(self.task, doing=record.getMessage()[:60], left=left)

            if not self.quiet:
                _now_and_then(record, left)

    def show(self, event: Any) -> None:
        """One line for a round; the header once for each method."""
        from fluvial.report import show

        if event.kind == "result":
            self.remaining.finished(event.method)
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
            number = event.values["round"]
            seconds = event.values["seconds"]
            self.remaining.round(event.method, number, self.settings.rounds, seconds)
            self.bar.update(
                self.task, advance=1, description=event.method, left=self.remaining.words()
            )


class _Line(logging.Handler):
    """Shows the newest message of the library as the text beside a spinner."""

    def __init__(self, status: Any) -> None:
        super().__init__(logging.INFO)
        self.status = status

    def emit(self, record: logging.LogRecord) -> None:
        """A log message of the library."""
        if record.levelno < logging.WARNING:
            self.status.update(escape(record.getMessage()))
            _now_and_then(record)


_told = time.monotonic()


def _now_and_then(record: logging.LogRecord, left: str = "") -> None:
    """Where no bar can move, as in a log file, a line every ten seconds."""
    global _told
    if not err.is_terminal and time.monotonic() - _told > 10:
        _told = time.monotonic()
        words = record.getMessage() + (f" ({left})" if left else "")
        err.print(words, style="dim", markup=False)


@contextmanager
def _telling(first: str) -> Iterator[None]:
    """A spinner that tells what the library is doing, beginning with `first`."""
    with err.status(first) as status, _hearing(_Line(status)):
        yield


@contextmanager
def _hearing(handler: logging.Handler) -> Iterator[None]:
    """Hand the library's messages from INFO on to `handler`."""
    library = logging.getLogger("fluvial")
    level = library.level
    library.level = logging.INFO
    library.addHandler(handler)

    try:
        yield
    finally:
        library.removeHandler(handler)
        library.level = level


@contextmanager
def _working(settings: "RunConfig", quiet: bool) -> Iterator[_Watch]:
    watch = _Watch(settings, quiet)
    with _hearing(watch), watch.bar:
        yield watch
