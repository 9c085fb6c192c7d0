"""When sites train, written down by the sites' own processes, wherever an engine starts them.

`folder_of_clock` makes a folder for PYTHONPATH. Every Python that finds it there and has
`ENGINE_CLOCK` in its environment puts a clock around `fluvial.training.train.train`, the one
training loop, and appends a line for each call to the file of that name. Nothing else of the
package is touched, so what is timed is what is installed.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

CLOCK = "ENGINE_CLOCK"
_MODULE = "fluvial.training.train"


def folder_of_clock(folder: Path) -> Path:
    """Return a folder whose presence on PYTHONPATH starts the clock."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import benchmarks.engine.clock as clock\n\nclock.install()\n"
    )

    return folder


def install() -> None:
    """Wait for the training loop to be imported, where a clock was asked for."""
    if os.environ.get(CLOCK):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None

        found = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert found is not None
        assert found.origin is not None

        return importlib.util.spec_from_file_location(
            fullname, found.origin, loader=_Loader(fullname, found.origin)
        )


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        inner = vars(module)["train"]

        @wraps(inner)
        def train(*arguments: Any, **options: Any) -> Any:
            since = time.time()
            try:
                return inner(*arguments, **options)
            finally:
                line = f"{since!r} {time.time()!r}\n".encode()
                file = os.open(os.environ[CLOCK], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                os.write(
                    file, line
                )  # one call of the system, so lines of several processes do not mix
                os.close(file)

        vars(module)["train"] = train


def covered_s(spans: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Seconds between `begin` and `end` in which at least one of `spans` runs."""
    total = 0.0
    reached = begin

    for since, until in sorted(spans):
        since = max(since, reached)
        until = min(until, end)
        if until > since:
            total = total + until - since
            reached = until

    return total


def read_clock(path: Path) -> list[tuple[float, float]]:
    """Begin and end of every training, seconds since the epoch."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(float(since), float(until)) for since, until in (line.split() for line in lines)]
