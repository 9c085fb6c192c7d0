"""Progress of a comparison on standard error: a bar over the rounds of all runs, with a line for
each run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fluvial.cli.progress import PlainProgress, library_messages, round_bar
from fluvial.formatting import figure, human_bytes, human_seconds, safe_text
from fluvial.runs.remaining import Remaining

if TYPE_CHECKING:
    from fluvial.runs.comparison.contenders import Comparison
    from fluvial.runs.comparison.execute import Step
    from fluvial.runs.run import Event


class ComparisonProgress(logging.Handler):
    """A bar over the rounds of all runs, baselines included, with the time left.

    As a log handler it shows what is checked before the first run.
    """

    def __init__(self, comparison: "Comparison", quiet: bool) -> None:
        super().__init__(logging.INFO)
        self.quiet = quiet
        self.bar = round_bar(quiet)
        self._methods = {
            each.name: (*each.config.compare, each.config.method.name)
            for each in comparison.contenders
        }
        self._rounds = {each.name: each.config.rounds for each in comparison.contenders}
        self._seeds = comparison.seeds
        self.total = sum(
            self._rounds[name] * len(methods) * len(self._seeds)
            for name, methods in self._methods.items()
        )
        # The rounds of all seeds of a contender are one run, so that one seed tells of the next.
        self.remaining = Remaining(
            [
                (f"{name} {method}", self._rounds[name] * len(self._seeds))
                for name, methods in self._methods.items()
                for method in methods
            ]
        )
        self.task = self.bar.add_task("comparing", total=self.total, doing="", left="")
        self._done: dict[tuple[str, int], int] = {}
        self._warned: set[str] = set()
        self._plain = PlainProgress()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message of this process; warnings have a handler of their own."""
        if record.levelno < logging.WARNING:
            self._update("before the first run", safe_text(record.getMessage()))

    def show(self, step: "Step") -> None:
        """Show a step of the comparison."""
        run = safe_text(f"{step.contender}, seed {step.seed}")
        if isinstance(step.message, logging.LogRecord):
            self._hear(run, step.message)
        elif step.message is not None:
            self._event(step, run, step.message)
        elif step.kind == "finished":
            self._end(step)
        else:
            self._print(f"{run}: failed, {safe_text(step.reason)}", style="red")
            self._end(step)

    def _hear(self, run: str, record: logging.LogRecord) -> None:
        """Show a message of a run; a warning once, whichever run it is from."""
        text = safe_text(record.getMessage())
        if record.levelno >= logging.WARNING:
            if text not in self._warned:
                self._warned.add(text)
                self._print(f"{run}: {text}", style="yellow")
            return

        self.remaining.heard(record)
        self._update(run, text)

    def _event(self, step: "Step", run: str, event: "Event") -> None:
        if event.kind == "round":
            number = event.values["round"]
            rounds = self._rounds[step.contender]
            before = rounds * self._seeds.index(step.seed)
            self.remaining.round(
                f"{step.contender} {event.method}",
                before + number,
                rounds * len(self._seeds),
                event.values["seconds"],
            )
            place = self._methods[step.contender].index(event.method)
            self._set(step, rounds * place + number)
            self._update(run, f"{event.method}, round {number} of {rounds}")
        elif event.kind == "result" and event.method == self._methods[step.contender][-1]:
            loss = ((event.values.get("heldout") or {}).get("final") or {}).get("loss")
            sent = event.values["bytes"]
            both_ways = human_bytes(sent["up"] + sent["down"] + sent["setup"])
            self._print(
                f"{run}: held-out loss {figure(loss)}, "
                f"{both_ways} up and down at all sites, "
                f"{human_seconds(event.values['wall_s'])}"
            )

    def _end(self, step: "Step") -> None:
        """Count all rounds of a run as done."""
        methods = self._methods[step.contender]
        rounds = self._rounds[step.contender]
        for method in methods:
            left = rounds * (len(self._seeds) - self._seeds.index(step.seed) - 1)
            self.remaining.finished(f"{step.contender} {method}", left)
        self._set(step, rounds * len(methods))
        self.bar.update(self.task, left=self.remaining.words())

    def _set(self, step: "Step", rounds: int) -> None:
        self._done[step.contender, step.seed] = rounds
        self.bar.update(self.task, completed=sum(self._done.values()))

    def _update(self, run: str, text: str) -> None:
        left = self.remaining.words()
        self.bar.update(self.task, description=run, doing=text[:60], left=left)
        if not self.quiet:
            self._plain.update(f"{run}: {text}", left)

    def _print(self, text: str, style: str = "") -> None:
        if not self.quiet or style:
            self.bar.console.print(text, style=style, markup=False)


@contextmanager
def comparison_progress(comparison: "Comparison", quiet: bool) -> Iterator[ComparisonProgress]:
    """Show the progress of a comparison; `quiet` shows failures and warnings only."""
    progress = ComparisonProgress(comparison, quiet)
    with library_messages(progress), progress.bar:
        yield progress
