"""Ctrl-C and SIGTERM: end the process at once, with 130 or 143 and one line about how to go on.

Sites work in threads, and some of them are inside torch. An interpreter that is taken down around
them ends with `terminate called without an active exception` and SIGABRT. Everything a run writes
survives `kill -9`, so nothing has to be unwound: the process leaves from the signal handler itself,
and a second signal cannot meet it half-way.
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
"""Clear the line of a progress bar and show the cursor that it hid."""

_advice: Callable[[], str] = str
_temporary: set[Path] = set()
"""Folders that are removed before the process leaves."""


def install() -> None:
    """Leave at once on SIGINT and SIGTERM; one that the caller's shell ignores stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def set_advice(words: Callable[[], str]) -> None:
    """Set what is printed before the process leaves: one line, or nothing, known only then."""
    global _advice
    _advice = words


def temporary_folder(owner: object) -> Path:
    """Make a folder that is removed with `owner`, at exit, and before the process leaves."""
    path = Path(tempfile.mkdtemp(prefix="fluvial-"))
    _temporary.add(path)
    weakref.finalize(owner, _remove, path)  # at exit too
    return path


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _temporary.discard(path)


def _leave(number: int, _: FrameType | None) -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    # The signal may have come while a line was being written: whatever fails here, the exit code
    # stands.
    with suppress(Exception):
        words = _advice()
        before = _SHOW_CURSOR if sys.stderr.isatty() else b""
        os.write(2, before + (words + "\n").encode(errors="replace") if words else before)

    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()

    with suppress(Exception):
        for path in tuple(_temporary):
            shutil.rmtree(path, ignore_errors=True)

    os._exit(128 + number)
