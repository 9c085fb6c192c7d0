"""One run in a process of its own, so that its peak of memory is its own.

    python -m fluvial.runs.comparison.child

The first line of standard input is the task; each line of standard output is a message. When
standard input ends, the process that started this one has ended, and this one ends too.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from fluvial import interrupt
from fluvial.errors import FluvialError
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import Event, execute

Message = Event | logging.LogRecord
"""An event of the run, or a message of the library from it."""
ENDED = 1
"""Exit code of a run that ended with an error of ours, which was its last message."""


class RunFailedError(Exception):
    """A run that ended with an error; the text has the type of the error and its message."""


def in_own_process(config: RunConfig, folder: Path, *, resume: bool) -> Iterator[Message]:
    """Run `config` in a process of its own and yield its events and messages.

    Raises `RunFailedError` where it ends without a result.
    """
    task = {
        "config": config.model_dump(mode="json", exclude_unset=True),
        "folder": str(folder),
        "resume": resume,
    }
    failure = ""

    with (
        tempfile.TemporaryFile() as words,
        subprocess.Popen(
            [sys.executable, "-m", "fluvial.runs.comparison.child"],
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


class _Messages(logging.Handler):
    """Messages to the process that started this one."""

    def __init__(self, pipe: IO[str]) -> None:
        super().__init__()
        self._pipe = pipe

    def send(self, kind: str, content: Any) -> None:
        """Write one message."""
        line = json.dumps([kind, content]) + "\n"
        with self.lock or threading.RLock():
            self._pipe.write(line)
            self._pipe.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a message of the library, or a warning of another one."""
        if not record.name.startswith("fluvial") and record.levelno < logging.WARNING:
            return

        plain = isinstance(record.args, tuple) and all(
            isinstance(value, str | int | float) for value in record.args
        )
        self.send(
            "log",
            {
                "name": record.name,
                "levelno": record.levelno,
                "levelname": record.levelname,
                "msg": str(record.msg) if plain else record.getMessage().replace("%", "%%"),
                "args": record.args if plain else [],
            },
        )


def main() -> int:
    """Do the task of standard input; return the exit code."""
    interrupt.install()
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    # What a library prints must not get among the messages.
    messages = _Messages(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    logging.getLogger().addHandler(messages)
    logging.getLogger("fluvial").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as `fluvial.cli` does

    try:
        config = parse(task["config"], "the configuration of the comparison")
        for event in execute(config, Path(task["folder"]), resume=task["resume"]):
            messages.send("event", asdict(event))
    except FluvialError as error:
        messages.send("error", f"{type(error).__name__}: {error}")
        return ENDED

    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(143)


if __name__ == "__main__":
    sys.exit(main())
