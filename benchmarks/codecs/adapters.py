"""Bytes to the target where each scheme chooses what is tuned and how often it is sent.

    python -m benchmarks.codecs adapters [--cell NAME ...] [--contender TEXT ...] [--minutes M]
        [--cache FILE.jsonl] [--processes N] [--seeds N] [--look] [--quick] [--out FILE.json]

Bed, target and bytes are those of `bytes_to_target`. Every scheme is tuned by the same rule, on
seed 0: first its adapters at the middle learning rate, then four times the local steps in half of
the rounds for the best of them, then the other learning rates for the better of the two. Best is
what needs the fewest bytes up to the target, or what has the lowest last loss where nothing reaches
it. This choice then runs with all seeds. "common adapter" is the same search for ours with nothing
but `r 8, attention`, the adapter that people use today, which `bytes_to_target` gives all others.
With one seed and one learning rate a run ends at the target. `--look` leaves the search to ours:
every other scheme has the first of its adapters, once the steps, and no other learning rate.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cgfedllm.bed import CORPORA, Table, workers
from benchmarks.codecs.bed import Found, Job, settings
from benchmarks.codecs.bytes_to_target import FULL, QUICK, target_row
from benchmarks.codecs.contenders import CELLS, CONTENDERS, Bed, Contender
from benchmarks.codecs.figures import bytes_until, first_round
from benchmarks.codecs.jobs import run_all
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show

ADAPTERS: dict[str, Table] = {
    "r 1, all linear": {"r": 1, "lora_alpha": 2, "target_modules": "all-linear"},
    "r 2, all linear": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
}
"""Adapters by name; alpha is twice the rank in all."""
SQUARE: dict[str, Table] = {
    "r 32, all linear": {"r": 32, "lora_alpha": 32, "target_modules": "all-linear"},
    "r 8, all linear": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
    "r 8, attention": {"r": 8, "lora_alpha": 8, "target_modules": "attention"},
}
"""Adapters of Fed-SB, which sends r x r values of a module, at the scale of its authors."""
COMMON: dict[str, Table] = {"r 8, attention": {}}
"""The adapter that people use today."""
MORE_STEPS = 4
"""Times the local steps of a round, beside once."""


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
    Contender("Fed-SB", "published", method={"name": "fedsb"}),
    Contender("Fed-SB, int4 + EF", "assembled", _with_feedback("int4"), method={"name": "fedsb"}),
    Contender(
        "FedSA-LoRA, own B, trellis 1/64 + EF",
        "assembled",
        _with_feedback("trellis", rate=64),
        method={"name": "fedsa"},
    ),
    Contender("flasc", "published", method={"name": "flasc"}),
    Contender("ecolora", "published", method={"name": "ecolora"}),
)
"""Schemes for an update; the first defines the target, with the adapter and the steps of all."""


def adapters(scheme: Contender, tables: dict[str, Table]) -> list[Contender]:
    """Return a scheme with each of these adapters, and once the local steps."""
    return [
        replace(scheme, name=f"{scheme.name}; {name}; 1x steps", lora=table)
        for name, table in tables.items()
    ]


def own_adapters(scheme: Contender) -> list[Contender]:
    """Return a scheme with each adapter that it may choose."""
    return adapters(scheme, SQUARE if scheme.method["name"] == "fedsb" else ADAPTERS)


def narrowed(groups: Sequence[Sequence[Contender]]) -> list[list[Contender]]:
    """Return groups for `--look`: ours as they are, of each other scheme the first adapter."""
    return [list(group) if group[0].role == "ours" else [group[0]] for group in groups]


def more_steps(choice: Contender) -> Contender:
    """Return a choice with four times its local steps, in half of the rounds."""
    scheme, adapter, _ = choice.name.split("; ")
    name = f"{scheme}; {adapter}; {MORE_STEPS}x steps"
    return replace(choice, name=name, steps=MORE_STEPS, rounds=0.5)


def best(found: Sequence[Found], target: float) -> Contender | None:
    """Return the choice with the fewest bytes up to `target` on seed 0, else the lowest loss; None
    where nothing was measured."""

    def order(each: Found) -> tuple[bool, float]:
        rate = each.learning_rate
        if rate is None:
            return (True, float("inf"))
        run = each.tuning[rate]
        reached = first_round(run["loss"], target)
        if reached is None:
            return (True, run["loss"][-1])
        return (False, bytes_until(run, reached)["up"])

    measured = [each for each in found if each.tuning]
    return min(measured, key=order).contender if measured else None


def middle(bed: Bed) -> tuple[float, ...]:
    """Return the middle learning rate of a bed."""
    return bed.learning_rates[len(bed.learning_rates) // 2 :][:1]


@dataclass(frozen=True)
class Search:
    """The search for the choice of every scheme in one cell."""

    pool: Executor
    job: Job
    report: Report
    target: float
    look: bool
    """True gives no choice to schemes that are not ours."""

    def choices(self, waiting: Sequence[Sequence[Contender]]) -> list[Contender]:
        """Return the choice of each list: the best contender, then the better number of steps."""
        chosen = self._bests(narrowed(waiting) if self.look else waiting)
        return self._bests(
            [
                [each] if self.look and each.role != "ours" else [each, more_steps(each)]
                for each in chosen
            ]
        )

    def _bests(self, groups: Sequence[Sequence[Contender]]) -> list[Contender]:
        """Return the best of each group at the middle learning rate, without unmeasured groups."""
        tuning = replace(self.job.bed, seeds=0, learning_rates=middle(self.job.bed))
        flat = [replace(self.job, contender=each, bed=tuning) for group in groups for each in group]
        found = iter(run_all(self.pool, flat, self.report))
        chosen = [best([next(found) for _ in group], self.target) for group in groups]
        return [each for each in chosen if each is not None]


def cell_rows(
    pool: Executor,
    cell: str,
    schemes: Sequence[Contender],
    bed: Bed,
    job: Job,
    report: Report,
    *,
    look: bool = False,
) -> list[Row]:
    """Return a row for each scheme's own choice, and one for the choice of ours with the common
    adapter. With `look` the other schemes have one adapter, and once the local steps."""
    here = replace(job, cell=cell, bed=bed)
    reference = run_all(pool, [replace(here, contender=SCHEMES[0])], report)[0]
    if not reference.runs:
        return []

    target = reference.runs[0]["loss"][bed.target - 1]
    alone = bed.seeds == 1 and len(bed.learning_rates) == 1
    here = replace(here, target=target if alone else None)
    search = Search(pool, here, report, target, look)
    rows = []
    common = [adapters(each, COMMON) for each in schemes if each.role == "ours"]
    for kind, groups in (
        ("own", [own_adapters(each) for each in schemes]),
        ("common adapter", common),
    ):
        choices = search.choices(groups)
        jobs = [replace(here, contender=each) for each in choices]
        for each in run_all(pool, jobs, report):
            if not each.tuning:
                continue
            scheme, adapter, steps = each.contender.name.split("; ")
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
    "reached": "reached",
    "rounds": "rounds",
    "bytes_up": "up",
    "bytes_all": "amortised",
    "frame_bytes": "up per round",
    "cpu_s": "CPU s per run",
}


def main() -> None:
    """See the module."""
    parser = parser_of("codecs adapters", __doc__, quick="standard library, two schemes")
    parser.add_argument("--cell", action="append", choices=CELLS)
    parser.add_argument(
        "--contender", action="append", default=[], help="only schemes with this text in their name"
    )
    parser.add_argument("--seeds", type=int, help="seeds of each choice")
    parser.add_argument("--look", action="store_true", help="only ours is tuned; see above")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after it")
    parser.add_argument("--cache", type=Path, help="JSON lines: runs to take, and to add to")
    parser.add_argument("--processes", type=int, help="default: as many as cores")
    options = parser.parse_args()
    load = os.getloadavg()
    bed = (
        replace(QUICK, seeds=1, learning_rates=QUICK.learning_rates[:1]) if options.quick else FULL
    )
    bed = replace(bed, seeds=options.seeds) if options.seeds else bed
    bed = replace(bed, learning_rates=middle(bed)) if options.look else bed
    wanted = options.cell or (["stdlib"] if options.quick else list(CELLS))
    schemes = [
        each
        for each in (SCHEMES[1:2] if options.quick else SCHEMES)
        if not options.contender or any(text in each.name for text in options.contender)
    ]
    report = Report(
        "adapters",
        {
            "quick": options.quick,
            "look": options.look,
            "cells": wanted,
            "adapters": ADAPTERS,
            **settings(bed),
        },
    )
    deadline = time.time() + 60 * options.minutes
    job = Job(wanted[0], CONTENDERS[0], bed, options.cache, deadline)

    with workers(options.processes) as pool:
        for cell in wanted:
            if not CORPORA[cell].present:
                report.skip(f"{cell}: this checkout has no ../shared beside it")
                continue
            report.rows += cell_rows(pool, cell, schemes, bed, job, report, look=options.look)

    report.claims = claims(report.rows)
    for cell in wanted:
        shown = [row for row in report.rows if row["cell"] == cell]
        show(
            f"{cell}: bytes of one site to the uncompressed loss of round {bed.target}",
            COLUMNS,
            shown,
        )
    report.finish(options.out, load)
