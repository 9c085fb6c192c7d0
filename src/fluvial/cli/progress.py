"""Progress on standard error: a bar for a run, a spinner for other work, both fed by log messages.

Where standard error is no terminal, a line is printed at the beginning and every ten seconds.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.status import Status

from fluvial.cli.console import err, working
from fluvial.runs.remaining import Pace, Remaining

if TYPE_CHECKING:
    from fluvial.runs.config import RunConfig
    from fluvial.runs.run import Event

LINE_INTERVAL_S = 10.0
"""Seconds between two progress lines where standard error is no terminal."""


class PlainProgress:
    """Progress lines for a standard error that is no terminal, such as a log file."""

    def __init__(self) -> None:
        self._printed_at = time.monotonic()

    def update(self, message: str, left: str = "") -> None:
        """Print `message` and the time `left` if the last line is old enough."""
        now = time.monotonic()
        if err.is_terminal or now - self._printed_at <= LINE_INTERVAL_S:
            return

        self._printed_at = now
        line = f"{message} ({left})" if left else message
        err.print(line, style="dim", markup=False)


def round_bar(quiet: bool) -> Progress:
    """Return a bar over rounds; its tasks have the fields `left` and `doing`. `quiet` hides it."""
    return Progress(
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


class RunProgress(logging.Handler):
    """A progress bar over all rounds of a run, with a line for each finished round.

    As a log handler it shows the newest message of the library beside the bar.
    """

    def __init__(self, settings: "RunConfig", quiet: bool) -> None:
        super().__init__(logging.INFO)
        self.settings = settings
        self.quiet = quiet
        self.bar = round_bar(quiet)
        runs = [(name, settings.rounds) for name in (*settings.compare, settings.method.name)]
        self.remaining = Remaining(runs)
        total = settings.rounds * len(runs)
        self.task = self.bar.add_task("loading the model", total=total, doing="", left="")
        self.method = ""
        self._plain = PlainProgress()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message of the library; warnings have a handler of their own."""
        if record.levelno >= logging.WARNING:
            return

        self.remaining.heard(record)
        left = self.remaining.words()
        self.bar.update(self.task, doing=record.getMessage()[:60], left=left)

        if not self.quiet:
            self._plain.update(record.getMessage(), left)

    def show(self, event: "Event") -> None:
        """Print the lines of a round or of a set-up, and a header above a method's first round."""
        from fluvial.report import round_lines

        if event.kind == "result":
            self.remaining.finished(event.method)
        if self.quiet or event.kind == "result":
            return

        if event.kind == "setup":
            for line in round_lines.setup_lines(event.values):
                self.bar.console.print(line)

        if event.kind == "round":
            if event.method != self.method:
                self.method = event.method
                self.bar.console.print(round_lines.round_header(event.method))
            for line in round_lines.round_lines(event.values):
                self.bar.console.print(line)
            number = event.values["round"]
            seconds = event.values["seconds"]
            self.remaining.round(event.method, number, self.settings.rounds, seconds)
            self.bar.update(
                self.task, advance=1, description=event.method, left=self.remaining.words()
            )


class StatusText(logging.Handler):
    """A log handler that shows the newest message of the library, and the time left, beside a
    spinner."""

    def __init__(self, status: Status) -> None:
        super().__init__(logging.INFO)
        self.status = status
        self._pace = Pace()
        self._plain = PlainProgress()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message of the library; warnings have a handler of their own."""
        if record.levelno < logging.WARNING:
            message = record.getMessage()
            self._pace.heard(record)
            left = self._pace.words()
            self.status.update(escape(f"{message} ({left})" if left else message))
            self._plain.update(message, left)


@contextmanager
def spinner(first: str) -> Iterator[None]:
    """Show a spinner with the newest message of the library, beginning with `first`."""
    with working(first) as status, library_messages(StatusText(status)):
        yield


@contextmanager
def run_progress(settings: "RunConfig", quiet: bool) -> Iterator[RunProgress]:
    """Show the progress of a run; `quiet` shows nothing."""
    progress = RunProgress(settings, quiet)
    with library_messages(progress), progress.bar:
        yield progress


@contextmanager
def library_messages(handler: logging.Handler) -> Iterator[None]:
    """Pass the messages of the library from INFO on to `handler`."""
    library = logging.getLogger("fluvial")
    level = library.level
    library.level = logging.INFO
    library.addHandler(handler)

    try:
        yield
    finally:
        library.removeHandler(handler)
        library.level = level
