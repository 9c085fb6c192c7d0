"""Write into README what the commands print, from commands that are run now.

    fluvial run configs/quickstart.toml --out runs/quickstart
    python scripts/write_outputs.py

The text stands between `<!-- outputs: ... -->` and `<!-- /outputs -->`. It depends on the Python
version, since the embedded text is the standard library, so only its commands are tested.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = 96
LONGEST = 34
"""Largest number of lines of one command; further lines are only counted."""
COMMANDS = (
    ("check", "configs/quickstart.toml"),
    ("preview", "configs/quickstart.toml", "--site", "except-for", "--count", "2"),
    ("show", "runs/quickstart"),
    ("evaluate", "runs/quickstart/adapter", "--data", "runs/story.txt"),
)
STORY = "The river rose in the night.\nIn the morning the bridge was gone.\n"
"""Records for `evaluate`, written to runs/story.txt."""


def output(command: tuple[str, ...]) -> str:
    """Return what `fluvial` prints for `command`, at most `LONGEST` lines."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "NO_COLOR": "1"}
    program = (sys.executable, "-c", "from fluvial.cli import main; main()")
    done = subprocess.run(
        (*program, *command),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )

    lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines()]
    more = len(lines) - LONGEST

    return "\n".join(lines[:LONGEST] + ([f"... and {more} more lines"] if more > 0 else []))


def main() -> None:
    """Run the commands and write the section."""
    (ROOT / "runs" / "story.txt").write_text(STORY, encoding="utf-8")
    shown = [f"$ fluvial {' '.join(command)}\n{output(command)}" for command in COMMANDS]
    section = "\n\n".join(f"```text\n{each}\n```" for each in shown)

    page = ROOT / "README.md"
    start = "<!-- outputs: made by scripts/write_outputs.py -->"
    end = "<!-- /outputs -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    text = pattern.sub(lambda _: f"{start}\n\n{section}\n\n{end}", page.read_text("utf-8"))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
