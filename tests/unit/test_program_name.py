"""The name of the program in the commands that it prints, the nearest name of a command, and paths
that the machine refuses."""

import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fluvial import interrupt
from fluvial.cli import app, console, main


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


def test_a_path_that_the_machine_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a folder of another user; a name that is too long fails for root too."""
    monkeypatch.setattr(interrupt, "install", lambda: None)
    monkeypatch.setattr(sys, "argv", ["fluvial", "show", "x" * 300])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err.replace("\n", "")
    assert left.value.code == 1
    assert "Traceback" not in said
    assert said.endswith("x: File name too long")
