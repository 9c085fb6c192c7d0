"""Loss at equal bytes of a rate that follows the noise, against fixed rates.

    python -m benchmarks.codecs snr [--quick] [--cell NAME] [--codec NAME ...] [--learning-rate LR]
        [--cache FILE.jsonl] [--out FILE.json]

Every contender trains the same sites with the same steps, batches and learning rate. Bytes are
those that sites send up in all rounds. At the bytes of a driven run, the loss of fixed rates is
interpolated between the two nearest of them, in the logarithm of the bytes, seed by seed.
"""

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.cgfedllm.bed import CORPORA
from benchmarks.codecs.bed import settings, traced
from benchmarks.codecs.bytes_to_target import FULL, QUICK
from benchmarks.codecs.cache import Cache
from benchmarks.codecs.contenders import CELLS, Bed, Contender, resolve
from benchmarks.codecs.figures import half_width
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show

CODECS = ("trellis", "hadamard")
RATES = (16.0, 32.0, 64.0, 128.0)
START = 64.0
"""Rate of the first round of a driven run."""
DRIVEN: tuple[tuple[str, float], ...] = (("snr_db", 1.5), ("snr_db", 3.0), ("noise_ratio", 1.0))
COLUMNS = {
    "contender": "contender",
    "bytes_up": "bytes up",
    "loss": "loss",
    "excess": "over fixed",
    "excess_half": "+-",
}


def contenders(codec: str) -> list[Contender]:
    """Return the runs of one codec: fixed rates, then driven ones."""
    usual = {"name": codec, "error_feedback": True}
    fixed = [
        Contender(f"{codec} 1/{rate:g}", "ours", {**usual, "rate": rate}, rate=rate)
        for rate in RATES
    ]
    driven = [
        Contender(f"{codec} {name} {value:g}", "ours", {**usual, "rate": START, name: value})
        for name, value in DRIVEN
    ]
    return [*fixed, *driven]


def at_bytes(points: Sequence[tuple[float, float]], size: float) -> float | None:
    """Return the loss at `size` bytes of (bytes, loss) in any order; None outside of them."""
    ordered = sorted(points)
    for (low, loss_low), (high, loss_high) in itertools.pairwise(ordered):
        if low <= size <= high:
            share = math.log(size / low) / math.log(high / low)
            return loss_low + share * (loss_high - loss_low)
    return None


def measure(
    cell: str, codecs: Sequence[str], bed: Bed, learning_rate: float, cache: Cache
) -> list[Row]:
    """Run every contender with every seed; return a row for each contender."""
    rows = []
    for codec in codecs:
        curves: list[list[tuple[float, float]]] = [[] for _ in range(bed.seeds)]
        for contender in contenders(codec):
            runs = []
            for seed in range(bed.seeds):
                config = resolve(cell, contender, bed, learning_rate=learning_rate, seed=seed)
                key = Cache.key(config)
                runs.append(cache.find(key, fresh=True) or cache.add(key, traced(config)))

            ends = [(sum(run["up"]) / run["sites"], run["loss"][-1]) for run in runs]
            row: Row = {
                "cell": cell,
                "codec": codec,
                "contender": contender.name,
                "driven": contender.rate is None,
                "bytes_up": mean(size for size, _ in ends),
                "loss": mean(loss for _, loss in ends),
                "up_by_round": [size / runs[0]["sites"] for size in runs[0]["up"]],
            }
            if contender.rate is not None:
                for curve, end in zip(curves, ends, strict=True):
                    curve.append(end)
            else:
                row |= excess(curves, ends)
            rows.append(row)

    return rows


def excess(
    curves: Sequence[Sequence[tuple[float, float]]], ends: Sequence[tuple[float, float]]
) -> Row:
    """Return the loss of driven runs over that of fixed rates at their bytes, by seed."""
    others = [at_bytes(curve, size) for curve, (size, _) in zip(curves, ends, strict=True)]
    differences = [
        loss - other for (_, loss), other in zip(ends, others, strict=True) if other is not None
    ]
    if len(differences) < len(ends):
        return {"excess": None, "excess_half": None}
    return {"excess": mean(differences), "excess_half": half_width(differences)}


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Return one claim for each driven run: its loss is no higher than that of a fixed rate."""
    return [
        Claim(
            f"{row['contender']}: loss over a fixed rate at its bytes",
            row["excess"],
            0.0,
            "at most",
        )
        for row in rows
        if row["driven"]
    ]


def main() -> None:
    """Run the benchmark from the command line."""
    parser = parser_of("codecs snr", __doc__, quick="a run of minutes that shows nothing")
    parser.add_argument("--cell", choices=CELLS, default="stdlib")
    parser.add_argument("--codec", action="append", choices=CODECS, help="default: each of them")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="of every run")
    parser.add_argument("--cache", type=Path, help="JSON lines: runs to take, and to add to")
    options = parser.parse_args()
    load = os.getloadavg()
    bed = QUICK if options.quick else FULL
    report = Report(
        "snr",
        {
            "quick": options.quick,
            "cell": options.cell,
            "learning_rate": options.learning_rate,
            **settings(bed),
        },
    )

    if CORPORA[options.cell].present:
        report.rows = measure(
            options.cell,
            options.codec or CODECS,
            bed,
            options.learning_rate,
            Cache(options.cache),
        )
        report.claims = claims(report.rows)
        show(f"{options.cell}: fixed rates and rates that follow the noise", COLUMNS, report.rows)
    else:
        report.skip(f"{options.cell}: this checkout has no ../shared beside it")
    report.finish(options.out, load)
