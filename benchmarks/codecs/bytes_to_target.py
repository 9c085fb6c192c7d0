"""Bytes of a site until the model is as good as uncompressed training makes it.

    python -m benchmarks.codecs bytes_to_target [--quick] [--part free] [--cell NAME ...]
        [--contender TEXT ...] [--seeds N] [--rate-of-uncompressed]
        [--minutes M] [--cache FILE.jsonl] [--again TEXT ...] [--processes N] [--out FILE.json]

Every contender trains the same sites with the same steps and batches. Its local learning rate is
the best of one grid on seed 0, by the loss of the last round, and so is that of the uncompressed
run; then all seeds run at it. With `--rate-of-uncompressed` it is that of the uncompressed run,
and costs no runs. The target is the loss of the uncompressed run, same cell and seed,
after two thirds of the rounds. Bytes are those of the serialised messages of one site, envelopes
included: up, down, set-up (what is installed at sites, what they send for the codec's fit) and
"amortised", all of them. What did not reach the target in every seed is credited with all its bytes
where it is compared, which favours it. Part "free" lets the local steps of a round vary too.
"""

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.cgfedllm.bed import CORPORA, workers
from benchmarks.codecs.bed import Found, Job, settings
from benchmarks.codecs.contenders import (
    CELLS,
    CONTENDERS,
    REFERENCE,
    Bed,
    Contender,
    grid,
    possible,
)
from benchmarks.codecs.figures import average, bytes_until, first_round, half_width
from benchmarks.codecs.jobs import at_rate_of_uncompressed, run_all
from benchmarks.codecs.target_claims import _reached, claims
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show

FULL = Bed(
    rounds=12,
    steps=6,
    batch=2,
    tgap_rounds=10,
    heldout=8,
    seeds=3,
    learning_rates=(2e-3, 4e-3, 8e-3),
    target=8,
)
QUICK = Bed(
    rounds=3,
    steps=2,
    batch=2,
    tgap_rounds=3,
    heldout=2,
    seeds=2,
    learning_rates=(5e-3, 1e-2),
    target=2,
)
QUICK_NAMES = (
    REFERENCE,
    "top_k 1/64 + EF",
    "int8, both ways",
    "hadamard 1/64 + EF",
    "klt 1/64 + EF",
    "trellis 1/64 + EF",
    "trellis 1/64 + EF, down trellis 1/32",
)
FREE_STEPS = (1, 2, 4)
"""Times the local steps of a round, in part "free"."""
FREE = ("trellis 1/64 + EF", "klt 1/64 + EF", "hadamard 1/64 + EF", "eden 1/64")


def jobs(
    cells: Sequence[str],
    contenders: Sequence[Contender],
    bed: Bed,
    options: argparse.Namespace,
    deadline: float,
) -> list[Job]:
    """Tier by tier and in it cell by cell, so that what matters most is done when the time is
    over."""
    found = [
        Job(
            cell,
            contender,
            bed,
            options.cache,
            deadline,
            any(text in contender.name for text in options.again),
        )
        for cell in cells
        for contender in contenders
    ]
    return sorted(found, key=lambda job: job.contender.tier)


def table(found: Sequence[Found], bed: Bed) -> list[Row]:
    """Return a row for every contender of every cell that has an uncompressed run to be compared
    with."""
    references = {each.cell: each for each in found if each.contender.role == "reference"}
    return [
        target_row(each, references[each.cell].runs, bed)
        for each in found
        if each.tuning and each.cell in references and references[each.cell].runs
    ]


def target_row(each: Found, references: Sequence[Row], bed: Bed) -> Row:
    """Return the figures of a job beside those of the uncompressed runs of its cell, by seed."""
    rates = grid(each.cell, bed)
    row: Row = {
        "cell": each.cell,
        "contender": each.contender.name,
        "role": each.contender.role,
        "rate": each.contender.rate,
        "both_ways": each.contender.downlink is not None,
        "learning_rate": each.learning_rate,
        "edge": each.learning_rate in (rates[0], rates[-1]),
        "complete": each.complete,
    }
    stopped = [run["stopped"] for run in (*each.tuning.values(), *each.runs) if "stopped" in run]
    row["stopped"] = stopped[0] if stopped else None
    pairs = [
        (run, reference)
        for run, reference in zip(each.runs, references, strict=False)
        if "stopped" not in run and "stopped" not in reference
    ]
    row["seeds"] = len(pairs)

    if not pairs:
        return row

    excess = [run["loss"][-1] - reference["loss"][-1] for run, reference in pairs]
    reached = [
        first_round(run["loss"], reference["loss"][bed.target - 1]) for run, reference in pairs
    ]
    spent = [
        bytes_until(run, found or bed.rounds)
        for (run, _), found in zip(pairs, reached, strict=True)
    ]
    row |= {
        "loss": mean(run["loss"][-1] for run, _ in pairs),
        "excess": mean(excess),
        "excess_half": half_width(excess),
        "excess_relative": mean(
            run["loss"][-1] / reference["loss"][-1] - 1 for run, reference in pairs
        ),
        "losses": [run["loss"][-1] for run, _ in pairs],
        "reached": sum(found is not None for found in reached),
        "rounds": mean(found or bed.rounds for found in reached),
        **{f"bytes_{key}": value for key, value in average(spent).items()},
        "frame_bytes": mean(run["up"][-1] / run["sites"] for run, _ in pairs),
        "run_s": mean(run["seconds"] for run, _ in pairs),
        "cpu_s": mean(run["cpu_s"] for run, _ in pairs),
        "choice": pairs[0][0].get("choice"),
    }

    return row


COLUMNS = {
    "contender": "contender",
    "learning_rate": "lr",
    "seeds": "seeds",
    "loss": "loss",
    "excess": "excess",
    "excess_half": "+-",
    "reached": "reached",
    "rounds": "rounds",
    "bytes_up": "up",
    "bytes_down": "down",
    "bytes_setup": "set-up",
    "bytes_all": "amortised",
    "frame_bytes": "up per round",
    "cpu_s": "CPU s per run",
    "why": "",
}


def main() -> None:
    """See the module."""
    parser = parser_of(
        "codecs bytes_to_target",
        __doc__,
        quick="standard library, few contenders and rounds: whether it works",
    )
    parser.add_argument(
        "--cell",
        action="append",
        choices=CELLS,
        help="default: all that are present, in this order",
    )
    parser.add_argument(
        "--contender", action="append", default=[], help="only those with this text in their name"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no run after this time"
    )
    parser.add_argument(
        "--cache", type=Path, help="JSON lines: runs to take, and to add to; may be shared"
    )
    parser.add_argument(
        "--again",
        action="append",
        default=[],
        help="contenders whose runs of older code are not to be taken",
    )
    parser.add_argument("--processes", type=int, help="default: as many as cores")
    parser.add_argument("--part", choices=["main", "free"], default="main")
    parser.add_argument("--seeds", type=int, help="default: as many as the bed has")
    parser.add_argument(
        "--rate-of-uncompressed",
        action="store_true",
        help="give every contender the learning rate that is best for the uncompressed run",
    )
    options = parser.parse_args()
    load = os.getloadavg()
    deadline = time.time() + 60 * options.minutes
    bed = QUICK if options.quick else FULL
    bed = replace(bed, seeds=options.seeds or bed.seeds)
    wanted = options.cell or (["stdlib"] if options.quick else list(CELLS))
    report = Report(
        "bytes_to_target",
        {
            "quick": options.quick,
            "part": options.part,
            "cells": wanted,
            "rate_of_uncompressed": options.rate_of_uncompressed,
            **settings(bed),
        },
    )

    for cell in wanted:
        if not CORPORA[cell].present:
            report.skip(f"{cell}: this checkout has no ../shared beside it")

    cells = [cell for cell in wanted if CORPORA[cell].present]
    named = (
        [each for each in CONTENDERS if each.name in QUICK_NAMES] if options.quick else CONTENDERS
    )
    contenders = [
        each
        for each in possible(named, report.skip, bed)
        if each.role == "reference"
        or not options.contender
        or any(text in each.name for text in options.contender)
    ]

    with workers(options.processes) as pool:
        if options.part == "free":
            free(pool, cells, contenders, bed, options, deadline, report)
        else:
            run = at_rate_of_uncompressed if options.rate_of_uncompressed else run_all
            found = run(pool, jobs(cells, contenders, bed, options, deadline), report)
            report.rows = table(found, bed)
            report.claims = claims(report.rows)

    for cell in cells:
        _print(cell, report.rows, bed)
    report.finish(options.out, load)


def _print(cell: str, rows: Sequence[Row], bed: Bed) -> None:
    shown: list[Row] = []
    for row in rows:
        if row["cell"] == cell:
            why = (
                "refused or stopped"
                if row["stopped"]
                else "lr at the grid's edge"
                if row["edge"]
                else ""
            )
            shown.append({**row, "why": why})

    show(
        f"{cell}: loss after {bed.rounds} rounds and excess over uncompressed, nats; rounds and "
        "bytes of one site to "
        f"the uncompressed loss of round {bed.target} (all its bytes where not every seed reached "
        "it)",
        COLUMNS,
        shown,
    )


def free(
    pool: Executor,
    cells: Sequence[str],
    contenders: Sequence[Contender],
    bed: Bed,
    options: argparse.Namespace,
    deadline: float,
    report: Report,
) -> None:
    """Print the same with one, two and four times the local steps; the target stays that of the
    uncompressed run at one."""
    chosen = [each for each in contenders if each.role == "reference" or each.name in FREE]
    waiting = [
        replace(job, bed=replace(bed, steps=times * bed.steps))
        for times in FREE_STEPS
        for job in jobs(cells, chosen, bed, options, deadline)
    ]
    found = run_all(pool, waiting, report)
    references = {
        job.cell: each.runs
        for job, each in zip(waiting, found, strict=True)
        if job.contender.name == REFERENCE and job.bed == bed
    }

    for job, each in zip(waiting, found, strict=True):
        if each.tuning and references[job.cell]:
            row = target_row(each, references[job.cell], bed)
            steps = job.bed.steps
            report.rows.append(
                {**row, "steps": steps, "contender": f"{row['contender']}, {steps} steps"}
            )

    best: dict[tuple[str, str], Any] = {}
    for row in report.rows:
        if _reached(row):
            key = (row["cell"], row["contender"].rsplit(", ", 1)[0])
            best[key] = min(best.get(key, row), row, key=lambda each: each["bytes_up"])

    for cell in dict.fromkeys(cell for cell, _ in best):
        ours, theirs = (
            [best[cell, name] for name in names if (cell, name) in best]
            for names in (FREE[:2], FREE[2:])
        )
        if ours and theirs:
            ratio = min(row["bytes_up"] for row in ours) / min(row["bytes_up"] for row in theirs)
            name = (
                f"free: {cell}: bytes up of the best of {', '.join(FREE[:2])} over the best of "
                f"{', '.join(FREE[2:])}"
            )
            report.claims.append(Claim(name, ratio, 1.0, "below"))
