"""Split learning measured in this process, over the real bytes.

    python -m benchmarks.flglm [--part modes|codecs|pipeline|thousand|memory] [--config FILE.toml]
                               [--codecs NAME ...] [--cloze FIELD] [--quick] [--out FILE.json]

Modes are timed on pieces of Python's standard library. Codecs are compared on a run of `--config`,
which sets data.max_length, train.max_steps and train.per_device_train_batch_size; by default on
the data of configs/stdlib.toml.
"""

import os
import tempfile
import tomllib
from pathlib import Path

from benchmarks.flglm import codecs, memory, modes, pipeline, thousand
from benchmarks.flglm.bed import quickstart, standard_library
from benchmarks.options import parser_of
from benchmarks.report import Report

PARTS = ("modes", "codecs", "pipeline", "thousand", "memory")


def main() -> None:
    """See the module."""
    parser = parser_of("flglm", __doc__, quick="few steps, one repetition")
    parser.add_argument("--part", choices=PARTS, help="one part; all by default")
    parser.add_argument("--config", type=Path, help="configuration of the codecs' runs")
    parser.add_argument(
        "--codecs",
        nargs="+",
        choices=codecs.CODECS,
        default=list(codecs.CODECS),
        help="codecs beside the exact one; all by default",
    )
    parser.add_argument(
        "--cloze",
        metavar="FIELD",
        help="measure the right answer among those of held-out records with the same FIELD",
    )
    options = parser.parse_args()
    load = os.getloadavg()
    repeats, steps, rounds, seeds = (1, 4, 2, 1) if options.quick else (5, 16, 6, 3)
    report = Report(
        "flglm",
        {
            "repeats": repeats,
            "steps": steps,
            "seeds": seeds,
            "config": options.config.name if options.config else "quickstart",
            "devices": f"{os.cpu_count()} CPU cores for all of a job",
        },
    )

    if options.part in (None, "modes"):
        with tempfile.TemporaryDirectory() as folder:
            source = str(standard_library(Path(folder) / "text.jsonl"))
            modes.measure(report, source=source, length=64, steps=steps, repeats=repeats)

    if options.part in (None, "codecs"):
        chosen = quickstart(rounds)
        if options.config:
            chosen = tomllib.loads(options.config.read_text(encoding="utf-8"))
        codecs.measure(report, chosen, names=options.codecs, seeds=seeds, cloze_field=options.cloze)

    if options.part in (None, "pipeline"):
        pipeline.measure(report, steps=min(steps, 4), repeats=repeats)

    if options.part in (None, "thousand"):
        with tempfile.TemporaryDirectory() as folder:
            pieces = standard_library(Path(folder) / "text.jsonl")
            thousand.measure(report, source=pieces, folder=Path(folder), steps=steps)

    if options.part in (None, "memory"):
        memory.measure(report, quick=options.quick)

    report.finish(options.out, load)
