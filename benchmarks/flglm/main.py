"""Split learning measured in this process, over the real bytes.

    python -m benchmarks.flglm [--part modes|codecs] [--source FILE] [--quick] [--out FILE.json]

The text is that of `--source`, a file of records with "text"; by default pieces of Python's
standard library.
"""

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.flglm import codecs, modes
from benchmarks.flglm.bed import standard_library
from benchmarks.report import Report

PARTS = ("modes", "codecs")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flglm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=PARTS, help="one part; all by default")
    parser.add_argument("--source", type=Path, help='JSON lines with "text"')
    parser.add_argument("--quick", action="store_true", help="few steps, one repetition")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    load = os.getloadavg()
    repeats, steps, rounds, seeds = (1, 4, 2, 1) if options.quick else (5, 16, 6, 3)

    with tempfile.TemporaryDirectory() as folder:
        source = str(options.source or standard_library(Path(folder) / "text.jsonl"))
        report = Report(
            "flglm",
            {
                "model": "embedded",
                "source": options.source.name if options.source else "standard library",
                "repeats": repeats,
                "steps": steps,
                "seeds": seeds,
                "devices": f"{os.cpu_count()} CPU cores for all of a job",
            },
        )
        if options.part in (None, "modes"):
            modes.measure(report, source=source, length=64, steps=steps, repeats=repeats)
        if options.part in (None, "codecs"):
            codecs.measure(report, source=source, length=64, steps=8, rounds=rounds, seeds=seeds)

        report.finish(options.out, load)
