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
LONGEST = 60
"""Largest number of lines of one command; further lines are only counted."""
RESULT = "Greedy answers"
ROUNDS = 11
"""Lines before the tables of the result that are shown."""
COMMANDS = (
    ("check", "configs/quickstart.toml"),
    ("preview", "configs/quickstart.toml", "--site", "except-for", "--count", "2"),
    ("show", "runs/quickstart"),
    ("evaluate", "runs/quickstart/adapter", "--data", "runs/lines.jsonl"),
)
RECORDS = """\
{"prompt": "_ ward in hospital.wards:  # _ is ", "completion": "for"}
{"prompt": "_ free_beds(self, ward):  # _ is ", "completion": "def"}
{"prompt": "_ Ward(Department):  # _ is ", "completion": "class"}
{"prompt": "_ ValueError(f'no ward {name}')  # _ is ", "completion": "raise"}
{"prompt": "_ sum(ward.beds for ward in wards)  # _ is ", "completion": "return"}
"""
"""Records for `evaluate`, written to runs/lines.jsonl."""


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
    if RESULT in lines:  # a few rounds are enough to see their form
        start = lines.index(RESULT)
        lines = [*lines[:ROUNDS], f"... and {start - ROUNDS} more lines", *lines[start - 1 :]]
    more = len(lines) - LONGEST

    return "\n".join(lines[:LONGEST] + ([f"... and {more} more lines"] if more > 0 else []))


def main() -> None:
    """Run the commands and write the section."""
    (ROOT / "runs" / "lines.jsonl").write_text(RECORDS, encoding="utf-8")
    shown = [f"$ fluvial {' '.join(command)}\n{output(command)}" for command in COMMANDS]
    shown[-1] = f"$ cat > runs/lines.jsonl <<'END'\n{RECORDS}END\n{shown[-1]}"
    section = "\n\n".join(f"```text\n{each}\n```" for each in shown)

    page = ROOT / "README.md"
    start = "<!-- outputs: made by scripts/write_outputs.py -->"
    end = "<!-- /outputs -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    text = pattern.sub(lambda _: f"{start}\n\n{section}\n\n{end}", page.read_text("utf-8"))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
