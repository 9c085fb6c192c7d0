"""The name of the program in the commands that it prints, and the nearest name of a command."""

import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fluvial.cli import app, console


@pytest.mark.parametrize(
    ("called", "installed", "expected"),
    [
        ("/site/fluvial/cli/__main__.py", True, [sys.executable, "-m", "fluvial.cli"]),
        ("/opt/bin/fluvial", True, ["fluvial"]),
        ("/opt/bin/fluvial", False, ["/opt/bin/fluvial"]),
    ],
)
def test_a_printed_command_has_the_name_of_the_call(
    called: str, installed: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [called, "run"])
    monkeypatch.setattr(shutil, "which", lambda name: str(Path(name)) if installed else None)
    assert console.program_name() == expected


@pytest.mark.parametrize("words", [["chekc"], ["site", "strat"], ["server", "strat"]])
def test_the_nearest_command_is_named_once(words: list[str]) -> None:
    assert CliRunner().invoke(app, words).output.count("Did you mean") == 1
