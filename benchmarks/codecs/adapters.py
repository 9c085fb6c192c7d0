"""Bytes to the target where each scheme chooses what is tuned and how often it is sent.

    python -m benchmarks.codecs adapters [--cell NAME ...] [--contender TEXT ...] [--minutes M]
        [--cache FILE.jsonl] [--processes N] [--quick] [--out FILE.json]

Bed, target and bytes are those of `bytes_to_target`. Each scheme has every adapter of `ADAPTERS`,
and once or four times the local steps; of these, and of the learning rates, the choice with the
fewest bytes up to the target on seed 0 is the scheme's own. It then runs with all seeds. So every
scheme is tuned by the same rule, and over the same choices. A scheme that does not reach the target
takes the choice with the lowest last loss. `r 8, attention` is the adapter that people use today.
"""

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cgfedllm.bed import CORPORA, Table, workers
from benchmarks.codecs.bed import Found, Job, settings
from benchmarks.codecs.bytes_to_target import FULL, QUICK, run_all, target_row
from benchmarks.codecs.contenders import CELLS, CONTENDERS, Bed, Contender
from benchmarks.codecs.figures import bytes_until, first_round
from benchmarks.report import Claim, Report, Row, show

ADAPTERS: dict[str, Table] = {
    "r 8, attention": {},
    "r 2, all linear": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "r 1, all linear": {"r": 1, "lora_alpha": 2, "target_modules": "all-linear"},
    "r 4, q and v": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
}
"""Adapters by name; alpha is twice the rank in all."""
STEPS = (1, 4)
"""Times the local steps of a round."""


def _with_feedback(codec: str, **more: Any) -> Table:
    return {"name": codec, "error_feedback": True, **more}


SCHEMES = (
    Contender("uncompressed", "reference", {"name": "identity"}),
    Contender("trellis 1/64 + EF", "ours", _with_feedback("trellis", rate=64)),
    Contender("hadamard 1/64 + EF", "assembled", _with_feedback("hadamard", rate=64)),
    Contender("int4 + EF", "assembled", _with_feedback("int4")),
    Contender("sign + EF", "assembled", _with_feedback("sign")),
    Contender("top_k 1/64 + EF", "assembled", _with_feedback("top_k", rate=64, value_bits="best")),
    Contender(
        "FFA-LoRA, trellis 1/64 + EF",
        "assembled",
        _with_feedback("trellis", rate=64),
        method={"name": "fedavg", "factors": "B"},
    ),
    Contender(
        "DiLoCo's outer steps, int4 + EF",
        "published",
        _with_feedback("int4"),
        method={"name": "fedavg", "server_momentum": 0.9, "server_learning_rate": 0.7},
    ),
    Contender("flasc", "published", method={"name": "flasc"}),
    Contender("ecolora", "published", method={"name": "ecolora"}),
)
"""Schemes for an update; the first defines the target, with the adapter and the steps of all."""


def choices(scheme: Contender) -> list[Contender]:
    """Return a scheme with each adapter and each number of steps."""
    return [
        replace(scheme, name=f"{scheme.name}; {name}; {times}x steps", lora=table, steps=times)
        for times in STEPS
        for name, table in ADAPTERS.items()
    ]


def own_choice(found: Sequence[Found], target: float) -> Found:
    """Return the choice with the fewest bytes up to `target` on seed 0, else the lowest loss."""

    def order(each: Found) -> tuple[bool, float]:
        rate = each.learning_rate
        if rate is None:
            return (True, float("inf"))
        run = each.tuning[rate]
        reached = first_round(run["loss"], target)
        if reached is None:
            return (True, run["loss"][-1])
        return (False, bytes_until(run, reached)["up"])

    return min(found, key=order)


def cell_rows(
    pool: Executor, cell: str, schemes: Sequence[Contender], bed: Bed, job: Job, report: Report
) -> list[Row]:
    """Return a row for each scheme's own choice, and one for its choice with the common adapter."""
    reference = run_all(pool, [replace(job, cell=cell, contender=SCHEMES[0], bed=bed)], report)[0]
    if not reference.runs:
        return []

    target = reference.runs[0]["loss"][bed.target - 1]
    tuning = replace(bed, seeds=0)
    waiting = [
        replace(job, cell=cell, contender=each, bed=tuning)
        for scheme in schemes
        for each in choices(scheme)
    ]
    tuned = run_all(pool, waiting, report)
    by_scheme = {
        scheme.name: [each for each in tuned if each.contender.name.startswith(f"{scheme.name};")]
        for scheme in schemes
    }
    final: list[tuple[Contender, str]] = []
    for found in by_scheme.values():
        measured = [each for each in found if each.tuning]
        if not measured:
            continue
        final.append((own_choice(measured, target).contender, "own"))
        common = [each for each in measured if not each.contender.lora]
        if common:
            final.append((own_choice(common, target).contender, "common adapter"))

    jobs = [replace(job, cell=cell, contender=each, bed=bed) for each, _ in final]
    rows = []
    for each, (contender, kind) in zip(run_all(pool, jobs, report), final, strict=True):
        if not each.tuning:
            continue
        scheme, adapter, steps = contender.name.split("; ")
        row = target_row(each, reference.runs, bed)
        rows.append({**row, "scheme": scheme, "adapter": adapter, "steps": steps, "kind": kind})
    return rows


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Return, for each cell, what the free choice saves and how ours compares with the others."""
    found = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        reached = [
            row
            for row in rows
            if row["cell"] == cell and row["seeds"] and row["reached"] == row["seeds"]
        ]
        own = [row for row in reached if row["kind"] == "own"]
        common = [row for row in reached if row["kind"] == "common adapter"]
        ours = [row for row in own if row["role"] == "ours"]
        others = [row for row in own if row["role"] in ("published", "assembled")]
        if not ours:
            continue
        best = min(row["bytes_up"] for row in ours)
        if common:
            ratio = best / min(row["bytes_up"] for row in common)
            name = f"{cell}: bytes up of ours with a free adapter over the best with the common one"
            found.append(Claim(name, ratio, 1 / 3, "at most"))
        if others:
            ratio = best / min(row["bytes_up"] for row in others)
            name = f"{cell}: bytes up of ours over the best other scheme, both with a free adapter"
            found.append(Claim(name, ratio, 1.1, "at most"))
    return found


COLUMNS = {
    "scheme": "scheme",
    "kind": "choice",
    "adapter": "adapter",
    "steps": "steps",
    "learning_rate": "lr",
    "seeds": "seeds",
    "loss": "loss",
    "excess": "excess",
    "reached": "reached",
    "rounds": "rounds",
    "bytes_up": "up",
    "bytes_all": "amortised",
    "frame_bytes": "up per round",
    "cpu_s": "CPU s per run",
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codecs adapters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="standard library, two schemes")
    parser.add_argument("--cell", action="append", choices=CELLS)
    parser.add_argument(
        "--contender", action="append", default=[], help="only schemes with this text in their name"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after it")
    parser.add_argument("--cache", type=Path, help="JSON lines: runs to take, and to add to")
    parser.add_argument("--processes", type=int, help="default: as many as cores")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    load = os.getloadavg()
    bed = (
        replace(QUICK, seeds=1, learning_rates=QUICK.learning_rates[:1]) if options.quick else FULL
    )
    wanted = options.cell or (["stdlib"] if options.quick else list(CELLS))
    schemes = [
        each
        for each in (SCHEMES[1:2] if options.quick else SCHEMES)
        if not options.contender or any(text in each.name for text in options.contender)
    ]
    report = Report(
        "adapters", {"quick": options.quick, "cells": wanted, "adapters": ADAPTERS, **settings(bed)}
    )
    deadline = time.time() + 60 * options.minutes
    job = Job(wanted[0], CONTENDERS[0], bed, options.cache, deadline)

    with workers(options.processes) as pool:
        for cell in wanted:
            if not CORPORA[cell].present:
                report.skip(f"{cell}: this checkout has no ../shared beside it")
                continue
            report.rows += cell_rows(pool, cell, schemes, bed, job, report)

    report.claims = claims(report.rows)
    for cell in wanted:
        shown = [row for row in report.rows if row["cell"] == cell]
        show(
            f"{cell}: bytes of one site to the uncompressed loss of round {bed.target}",
            COLUMNS,
            shown,
        )
    report.finish(options.out, load)
