"""Entry of `python -m benchmarks.budget`."""

import os
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.budget import adapters, both, choice
from benchmarks.budget.bed import FULL, QUICK, Bed, Runs
from benchmarks.cgfedllm.bed import CORPORA
from benchmarks.codecs.cache import SOURCE
from benchmarks.options import parser_of
from benchmarks.report import Report

PARTS = {"choice": choice, "both": both, "adapters": adapters}


def main() -> None:
    """Run a part of the benchmark and write its report."""
    parser = parser_of("budget", choice.__doc__, quick="standard library, one seed and short runs")
    parser.add_argument("--part", choices=PARTS, default="choice", help="see its module")
    parser.add_argument("--cell", action="append", choices=list(CORPORA))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--full", action="store_true", help="more ranks, targets and trial rounds")
    parser.add_argument("--cache", type=Path, help="JSON lines: runs to take, and to add to")
    options = parser.parse_args()
    started = os.getloadavg()
    part = PARTS[options.part]
    bed = QUICK if options.quick else FULL if options.full else Bed()
    if options.seeds:
        bed = replace(bed, seeds=options.seeds)
    cells = options.cell or (("stdlib",) if options.quick else part.CELLS)
    settings = {"part": options.part, "share": choice.SHARE, **asdict(bed), "source": SOURCE}
    report = Report("budget", settings)
    done = []
    runs = Runs(options.cache)

    for cell in cells:
        if not CORPORA[cell].present:
            report.skip(f"{cell}: its files are not here")
            continue
        report.rows += part.measure(cell, bed, runs)
        done.append(cell)

    report.claims = part.claims(report.rows, done)
    report.finish(options.out, started)


if __name__ == "__main__":
    main()
