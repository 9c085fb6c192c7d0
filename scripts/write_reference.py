"""Write docs/reference/: the commands with their options, as typer knows them, and the list of
public names, whose text the site of the documents takes from the code.

    python scripts/write_reference.py [--check]

With `--check` nothing is written, and the exit code says whether both pages are up to date.
"""

import argparse
import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import typer
from typer.cli import get_docs_for_click

import fluvial
from fluvial.cli import app

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
COMMANDS = """# Commands

`python scripts/write_reference.py` writes this page from the commands. Do not edit it by
hand. `fluvial COMMAND --help` prints the same.
"""
NAMES = """# Names of the package

`python scripts/write_reference.py` writes this list of the public names. Do not edit it by hand.
In the site of the documents (`make docs`) the signature and the documentation of each name stand
below it, from the code. [Fluvial from Python](../python.md) explains how they are used.
"""
CUT = 45
"""Characters to which click cuts the line of a command."""
LONGEST = 200
"""Characters of such a line on the page, at most."""
USAGE = re.compile(r"\*\*Usage\*\*:\n\n```console\n\$ (.*)\n```")


def commands() -> str:
    """Return the page of the commands: one section each, and a deeper one for each of a group."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="fluvial")
    text = get_docs_for_click(obj=command, ctx=context, name="fluvial")
    _, _, sections = text.partition("\n")  # its own title
    text = USAGE.sub(r"Usage: `\1`", sections).rstrip()
    for short, whole in summaries(command):
        text = text.replace(short, whole)

    return f"{COMMANDS}{text}\n"


def summaries(group: click.Command) -> Iterator[tuple[str, str]]:
    """Yield the line of each command in the list of its group, as typer cuts it and as a whole."""
    for name, command in getattr(group, "commands", {}).items():
        short = html.escape(command.get_short_help_str(CUT))
        whole = html.escape(command.get_short_help_str(LONGEST))
        yield f"* `{name}`: {short}\n", f"* `{name}`: {whole}\n"
        yield from summaries(command)


def names() -> str:
    """Return the page of the public names, each a directive of mkdocstrings."""
    return "\n".join([NAMES, *(f"::: fluvial.{name}\n" for name in fluvial.__all__)])


PAGES = {"commands.md": commands, "api.md": names}


def main() -> int:
    """Write both pages, or return 1 if one is not up to date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    written = {FOLDER / name: page() for name, page in PAGES.items()}

    if parser.parse_args().check:
        stale = [path for path, text in written.items() if not _holds(path, text)]
        return int(bool(stale))

    FOLDER.mkdir(exist_ok=True)
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")

    return 0


def _holds(path: Path, text: str) -> bool:
    """Return True if the file has this text."""
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
