"""Errors as they leave a site: a text made for the other side, or a place and a reference.

An error's text may quote whatever it met: a record, a path, a line of a file. So only the texts of
`MADE_TO_LEAVE` leave, which are made of constants, names of settings and numbers. Of every other
error the type leaves, the place in Fluvial's code and a reference; the whole text stays in the
site's own log, under the same reference.
"""

import logging
import os
import secrets
import sysconfig
import time
import traceback
from pathlib import Path

from fluvial.errors import CheckpointError, DivergenceError, PrivacyError, RefusalError, type_name
from fluvial.storage.files import append

logger = logging.getLogger(__name__)

ERRORS = "errors.log"
"""Name of a site's log of its own errors."""
MADE_TO_LEAVE = (RefusalError, DivergenceError, PrivacyError)
"""Errors whose texts are made of constants, names of settings and numbers."""
_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = tuple(
    Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)
"""Folders of Python and of installed packages."""
_MOST_TEXT = 2**16
"""Characters of one error that the site's log keeps."""
_MOST_LOG = 2**24
"""Bytes from which on a log is put aside, in the place of the one put aside before it."""


def outward(problem: BaseException, log: Path | None, **about: object) -> str:
    """Return the text about `problem` for the other end, after all of it was written to `log`.

    `about` says in the log what was done: the site, the run, the round, the task. Without a log the
    whole text goes to this process's logging.
    """
    reference = secrets.token_hex(4)
    whole = "".join(traceback.format_exception(problem))[-_MOST_TEXT:]
    where = "this process's log" if log is None else str(log)

    if log is None:
        logger.error("reference %s, %s:\n%s", reference, about, whole)
    else:
        try:
            _write(log, f"{_now()} reference {reference} {about}\n{whole}\n")
        except (OSError, CheckpointError) as full:
            where = f"nowhere, because the log cannot be written ({type(full).__name__})"

        logger.error(
            "site %s: %s; the whole error is in %s", about.get("site", ""), _short(problem), where
        )

    if isinstance(problem, MADE_TO_LEAVE):
        return f"{type(problem).__name__}: {problem}"[:2000]

    there = "in the log of the site's process" if log is None else f"in the site's own {ERRORS}"
    return f"{kind(problem)} at {place(problem)} (reference {reference} {there})"


def kind(problem: BaseException) -> str:
    """Return the name of an error's type, and for one of the operating system what its number
    means."""
    shown = type_name(problem) or "an error"
    if isinstance(problem, OSError) and isinstance(problem.errno, int):
        return f"{shown} ({os.strerror(problem.errno)})"
    return shown


def place(problem: BaseException) -> str:
    """Return file and line of the last frame of an error that is in code of the user's own, or else
    in Fluvial's.

    Libraries are neither. A file of the user's own is given by its name alone, because its folders
    may name a person or a customer.
    """
    frames = traceback.extract_tb(problem.__traceback__)
    for frame in reversed(frames):
        path = Path(frame.filename)
        if not path.is_relative_to(_PACKAGE) and not _of_library(frame.filename):
            return f"{path.name}:{frame.lineno}"

    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(_PACKAGE.parent)}:{frame.lineno}"

    return "a place outside Fluvial"


def _of_library(filename: str) -> bool:
    """Return whether a file belongs to Python or to an installed package."""
    if filename.startswith("<frozen "):
        return True
    return any(Path(filename).is_relative_to(folder) for folder in _LIBRARIES)


def _short(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {problem}"[:1000]


def _write(log: Path, text: str) -> None:
    if log.exists() and log.stat().st_size > _MOST_LOG:
        log.replace(log.with_suffix(".old"))
    append(log, text)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
