"""The page in the folder of a run, drawn anew while the run goes on."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fluvial.errors import GateError
from fluvial.report.page import page_of
from fluvial.runs.config import RunConfig
from fluvial.runs.run import Event
from fluvial.storage.files import write_atomically
from fluvial.storage.run_files import PAGE, read_run

logger = logging.getLogger(__name__)

COST = 100
"""Ratio of the time between two pages to that of drawing one, at least: pages take at most one
per cent of a run."""
REFRESH_S = 5
"""Seconds after which a browser reads the page of a run that goes on anew, at least."""


def with_page(
    events: Iterator[Event],
    config: RunConfig,
    folder: Path,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Event]:
    """Yield the events of a run, and write the page of its folder after those of `config.page`.

    The last page, which no browser reads anew, is written at the end, also by an error. A run that
    a signal ends leaves the page of its last round.
    """
    begun = False
    due = -float("inf")
    try:
        for event in events:
            begun = True
            if config.page == "rounds" and clock() >= due:
                started = clock()
                _write(folder, refresh=True)
                ended = clock()
                due = ended + COST * (ended - started)
            yield event
    except GateError:
        begun = True
        raise
    finally:
        if begun and config.page != "never":
            _write(folder, refresh=False)


def _write(folder: Path, *, refresh: bool) -> None:
    """Write the page; a page that cannot be written is a warning, as the run is worth more."""
    try:
        run = read_run(folder)
        written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        refresh_s = max(REFRESH_S, _round_s(run["metrics"])) if refresh else 0
        write_atomically(folder / PAGE, page_of(run, written=written, refresh_s=refresh_s))
    except Exception as error:
        logger.warning("%s is not written: %s: %s", folder / PAGE, type(error).__name__, error)


def _round_s(metrics: list[dict[str, float]]) -> int:
    """Return the whole seconds of the last round, at most a minute."""
    return round(min(60.0, metrics[-1]["seconds"])) if metrics else 0
