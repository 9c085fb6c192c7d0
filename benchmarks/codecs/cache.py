"""Runs of earlier benchmarks, in a file of JSON lines under the hash of their configuration."""

import fcntl
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import fluvial
from benchmarks.report import Row
from fluvial.runs.config import RunConfig

# -- what was run before -------------------------------------------------------------------------


def _source_digest() -> str:
    root = Path(fluvial.__file__).parent
    state = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        state.update(f"{path.relative_to(root)};".encode() + path.read_bytes())
    return state.hexdigest()[:8]


SOURCE = _source_digest()
"""Eight digits that change with any line of the package's code, as it was when this process
began."""


class Cache:
    """Results by the hash of what was asked, in a file of JSON lines that several processes append
    to."""

    def __init__(self, path: Path | None) -> None:
        """`path=None` remembers in memory."""
        self.path = path
        self.rows: dict[str, Row] = {}
        self._read = 0

    @staticmethod
    def key(config: RunConfig) -> str:
        """Return the key of a resolved configuration; the number of workers does not count."""
        table = config.resolved()
        del table["fleet"]["workers"]
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]

    def find(self, key: str, *, fresh: bool = False) -> Row | None:
        """Return the newest result, or None; with `fresh` only one of this very state of the
        package."""
        self._catch_up()
        row = self.rows.get(key)
        return None if row is None or (fresh and row["source"] != SOURCE) else row

    def add(self, key: str, row: Row) -> Row:
        """Write a result down, with the state of the package it comes from; returns that."""
        row = {"key": key, "source": SOURCE, **row}
        self.rows[key] = row

        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(row) + "\n")

        return row

    def take(self, rows: Iterable[Row]) -> None:
        """Know results that a report has, without writing them down; newer ones stay."""
        self.rows = {row["key"]: row for row in rows} | self.rows

    def _catch_up(self) -> None:
        """Read the lines that others have added."""
        if self.path is None or not self.path.exists():
            return

        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                row = json.loads(line)
                self.rows[row["key"]] = row
