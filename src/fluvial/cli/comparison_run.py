"""The process of one run of a comparison (see `fluvial.runs.comparison.child`)."""

import json
import logging
import os
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from fluvial import interrupt
from fluvial.errors import FluvialError
from fluvial.report.live import with_page
from fluvial.runs.config import parse
from fluvial.runs.run import execute

ENDED = 1
"""Exit code of a run that ended with an error of ours, which was its last message."""


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
        folder = Path(task["folder"])
        lent = {name: Path(path) for name, path in task["lent"].items()}
        events = execute(config, folder, resume=task["resume"], lent=lent)
        for event in with_page(events, config, folder):
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
