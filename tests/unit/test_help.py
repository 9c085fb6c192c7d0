"""The help of commands: every argument is described."""

import pytest
import typer
from typer.testing import CliRunner

from fluvial.cli import app

RUNNER = CliRunner()


def commands(group: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of all commands of a group."""
    inner = getattr(group, "commands", None)
    if inner is None:
        return [path]
    return [found for name, each in inner.items() for found in commands(each, (*path, name))]


def test_every_argument_of_every_command_is_described() -> None:
    root = typer.main.get_command(app)
    missing = []
    for path in commands(root):
        command = root
        for name in path:
            command = command.commands[name]  # type: ignore[attr-defined]
        missing += [
            (*path, each.name)
            for each in command.params
            if each.param_type_name == "argument" and not getattr(each, "help", None)
        ]
    assert missing == []


@pytest.mark.parametrize(
    ("command", "name", "words"),
    [
        ("evaluate", "target", "hub id, or 'embedded'"),
        ("chat", "run", "hub id, or 'embedded'"),
        ("export", "run", "folder of a finished run"),
    ],
)
def test_the_help_says_what_fits(command: str, name: str, words: str) -> None:
    shown = RUNNER.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    line = next(line for line in shown.splitlines() if line.startswith("│ *"))
    assert line.split()[2] == name
    assert words in line
