"""Library code logs by its module's name; only a process's entry point configures logging."""

import ast
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluvial.cli.console import LogFormat
from fluvial.runs.config import parse
from fluvial.runs.run import execute

SOURCE = Path(__file__).parents[2] / "src" / "fluvial"
ENTRY_POINTS = ("cli/__init__.py", "flower/server.py")
"""The command line, and the process that Flower's SuperLink starts for a run."""


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield file and node of every call of `logging.NAME` in the library."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"logging.{name}":
                yield path.relative_to(SOURCE).as_posix(), node


def test_a_module_logs_by_its_name() -> None:
    names = {
        (path, ast.unparse(call.args[0]) if call.args else "root")
        for path, call in calls("getLogger")
    }
    others = {(path, name) for path, name in names if name != "__name__"}
    assert others == {
        ("cli/progress.py", "'fluvial'"),  # all messages of the library, for the progress bar
        ("cli/__init__.py", "'bitsandbytes'"),
        ("cli/comparison_run.py", "root"),  # a run of a comparison hands its messages on
        ("cli/comparison_run.py", "'fluvial'"),
        ("cli/comparison_run.py", "'bitsandbytes'"),
        ("training/harness_model.py", "'lm_eval'"),
        ("flower/server.py", "'httpx'"),
        ("flower/server.py", "'flwr'"),  # its tracebacks of errors of ours
        ("flower/simulate.py", "name"),  # of flwr and ray, whose levels are raised
    }
    assert len(list(calls("getLogger"))) > 10


def test_only_entry_points_configure_logging() -> None:
    assert sorted(path for path, _ in calls("basicConfig")) == list(ENTRY_POINTS)


def test_a_note_on_a_configuration_has_no_time(
    run_config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """FedAvg reads no public text, which is known before the first round."""
    next(iter(execute(parse(run_config, "test"), tmp_path / "run")))
    (note,) = (each for each in caplog.records if "data.public_source" in each.getMessage())
    line = LogFormat().format(note)
    assert line.startswith("• ")
    assert line.endswith(note.getMessage())
    failure = logging.LogRecord(
        "fluvial.federation.fleet", logging.WARNING, "", 0, "site north is skipped", (), None
    )
    words = LogFormat().format(failure)
    assert words.endswith(" fluvial.federation.fleet: site north is skipped")
    assert words[:2] == "20"
