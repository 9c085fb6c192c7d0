"""Rows of docs/reliability.md, which the tests of faults leave."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

Row = Callable[..., None]
"""Keep what was observed of a fault: its name, what must follow, what did, and seconds."""


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    """Keep what was observed in the file $FLUVIAL_FAULTS, under the test's name."""

    def keep(fault: str, expected: str, observed: str, seconds: float | None) -> None:
        if name := os.environ.get("FLUVIAL_FAULTS"):
            path = Path(name)
            rows = json.loads(path.read_text()) if path.exists() else {}
            found = {"fault": fault, "expected": expected, "observed": observed}
            rows[request.node.name] = found | {
                "seconds": None if seconds is None else round(seconds, 1)
            }
            path.write_text(json.dumps(rows, indent=2) + "\n")

    return keep
