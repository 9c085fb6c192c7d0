"""End the process at once on Ctrl-C and SIGTERM, with exit code 130 or 143 and one line of advice.

Sites train in threads, and some of these are inside torch. An interpreter that shuts down while
they run ends with `terminate called without an active exception` and SIGABRT. Everything that a run
writes survives `kill -9`, so nothing has to be unwound: the process ends inside the signal handler,
where a second signal cannot interrupt a shutdown.
"""

import os
import shutil
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\r\x1b[2K\x1b[?25h"
"""Terminal codes that clear the line of a progress bar and show the cursor again."""

_advice: Callable[[], str] = str
_temporary: set[Path] = set()
"""Folders that are removed before the process ends."""


def install() -> None:
    """End the process on SIGINT and SIGTERM, but not on one that the shell ignores."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def set_advice(advice: Callable[[], str]) -> None:
    """Set the function whose line is printed before the process ends; "" prints nothing."""
    global _advice
    _advice = advice


def temporary_folder(owner: object) -> Path:
    """Make a folder that is removed with `owner`, at exit, and when a signal ends the process."""
    path = Path(tempfile.mkdtemp(prefix="fluvial-"))
    _temporary.add(path)
    weakref.finalize(owner, _remove, path)  # at exit too
    return path


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _temporary.discard(path)


def _leave(number: int, _: FrameType | None) -> None:
    for repeated in SIGNALS:
        signal.signal(repeated, signal.SIG_IGN)

    # The signal may have come while a line was being written. Whatever fails here, the exit code
    # stays the same.
    with suppress(Exception):
        line = _advice()
        before = _SHOW_CURSOR if sys.stderr.isatty() else b""
        os.write(2, before + (line + "\n").encode(errors="replace") if line else before)

    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()

    with suppress(Exception):
        for path in tuple(_temporary):
            shutil.rmtree(path, ignore_errors=True)

    os._exit(128 + number)
