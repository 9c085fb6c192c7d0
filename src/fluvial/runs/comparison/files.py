"""Files of a comparison.

NAME/seed-N/      a run: contender NAME with seed N
NAME/check.json   what `fluvial check --format json` says about contender NAME
compare.json      the comparison, written anew after each run
compare.html      the same as a page
"""

from pathlib import Path

CHECK = "check.json"
"""Figures of a contender that were predicted without training."""
PAGE = "compare.html"
"""The page of the comparison."""


def run_folder(out: Path, contender: str, seed: int) -> Path:
    """Return the folder of one run."""
    return out / contender / f"seed-{seed}"
