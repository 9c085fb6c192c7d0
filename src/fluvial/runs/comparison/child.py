"""One run in a process of its own, so that its peak of memory is its own.

The program is `fluvial.cli.comparison_run`. The first line of its standard input is the task; each
line of its standard output is a message. When its standard input ends, the process that started it
has ended, and it ends too.
"""

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from fluvial.runs.config import RunConfig
from fluvial.runs.run import Event

Message = Event | logging.LogRecord
"""An event of the run, or a message of the library from it."""
PROGRAM = "fluvial.cli.comparison_run"
"""Module that is the process of a run."""


class RunFailedError(Exception):
    """A run that ended with an error; the text has the type of the error and its message."""


def in_own_process(
    config: RunConfig, folder: Path, *, resume: bool, lent: Mapping[str, Path] | None = None
) -> Iterator[Message]:
    """Run `config` in a process of its own and yield its events and messages; `lent` has the
    folders of its baselines that other runs have finished.

    Raises `RunFailedError` where it ends without a result.
    """
    task = {
        "config": config.model_dump(mode="json", exclude_unset=True),
        "folder": str(folder),
        "resume": resume,
        "lent": {name: str(path) for name, path in (lent or {}).items()},
    }
    failure = ""

    with (
        tempfile.TemporaryFile() as words,
        subprocess.Popen(
            [sys.executable, "-m", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it may have ended before it read its task
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()

        for line in process.stdout:
            if not line.endswith("\n"):  # it was killed while it wrote
                break
            kind, content = json.loads(line)
            if kind == "event":
                yield Event(**content)
            elif kind == "log":
                yield logging.makeLogRecord({**content, "args": tuple(content["args"])})
            else:
                failure = content

        # Standard input stays open until it has ended: at its end it stops at once.
        code = process.wait()
        if code:
            raise RunFailedError(failure or f"exit code {code}: {_last_line(words)}")


def _last_line(words: IO[bytes]) -> str:
    """Return the last line of what a process wrote to standard error."""
    words.seek(0)
    lines = words.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
