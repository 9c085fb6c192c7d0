"""Options of a benchmark's command: those that every benchmark has."""

import argparse
from pathlib import Path


def parser_of(command: str, description: str | None, *, quick: str) -> argparse.ArgumentParser:
    """Return the parser of `python -m benchmarks.COMMAND` with `--out` and `--quick`.

    `description` is printed as written, `quick` says what the quick form leaves out.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser
