"""FedPipe beside other LoRA methods on unequal sites, its planner's value, predictions and limits.

    python -m benchmarks.fedpipe [--part losses|value|predictions|enforced] [--tasks NAME ...]
                                 [--seeds N] [--cache FILE.jsonl] [--known REPORT.json]
                                 [--minutes N] [--quick] [--out FILE.json]

Tasks other than the embedded one name files below the working directory. Runs are written to the
file of `--cache` and taken from there, so that a benchmark that was stopped goes on. Runs of an
earlier report are taken from `--known`, where their settings are the same; each has the state of
the package (`source`) that made it.
"""

import json
import os
from pathlib import Path

from benchmarks.codecs.cache import Cache
from benchmarks.fedpipe import enforced, losses, predictions, value
from benchmarks.fedpipe.bed import TASKS, Bed
from benchmarks.fedpipe.contenders import CONTENDERS, FEDPIPE, UNIFORM
from benchmarks.options import parser_of
from benchmarks.report import Report

PARTS = ("losses", "value", "predictions", "enforced")
QUICK = [UNIFORM, FEDPIPE]
"""Contenders of the quick form."""


def main() -> None:
    """See the module."""
    names = sorted(path.stem for path in TASKS.glob("*.toml"))
    parser = parser_of("fedpipe", __doc__, quick="two contenders and rounds, one seed")
    parser.add_argument("--part", choices=PARTS, help="one part; all by default")
    parser.add_argument("--tasks", nargs="+", choices=names, default=["embedded"])
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="file of runs, which is added to")
    parser.add_argument("--known", type=Path, help="JSON file of an earlier report of losses")
    parser.add_argument(
        "--minutes", type=float, default=600.0, help="time for new runs; 0 reports old ones"
    )
    options = parser.parse_args()
    load = os.getloadavg()
    seeds = 1 if options.quick else options.seeds
    cache = Cache(options.cache)
    if options.known is not None:
        rows = json.loads(options.known.read_text(encoding="utf-8"))["rows"]
        cache.take(run for row in rows for run in row.get("runs", ()))
    bed = Bed(cache)
    report = Report("fedpipe", {"seeds": seeds, "tasks": options.tasks, "quick": options.quick})

    if options.part in (None, "losses"):
        losses.measure(
            report,
            bed,
            tasks=options.tasks,
            names=options.contenders or (QUICK if options.quick else list(CONTENDERS)),
            seeds=seeds,
            minutes=options.minutes,
            quick=options.quick,
        )

    if options.part in (None, "value"):
        draws = 4 if options.quick else 20
        value.measure(report, tasks=options.tasks, draws=draws, seeds=seeds, quick=options.quick)

    if options.part in (None, "predictions"):
        predictions.measure(report, quick=options.quick)

    if options.part in (None, "enforced"):
        enforced.measure(report, quick=options.quick)

    report.finish(options.out, load)
