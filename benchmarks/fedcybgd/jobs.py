"""Jobs of `benchmarks.fedcybgd`: full and quick beds, and many jobs at a time."""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import replace

from rich.console import Console

from benchmarks.codecs.cache import SOURCE
from benchmarks.fedcybgd.bed import Found, Job, compete
from benchmarks.fedcybgd.contenders import (
    Bed,
)
from benchmarks.report import Report

FULL = Bed(rounds=8, steps=4, heldout=None, length=None, seeds=3, paces=(0.5, 1.0, 2.0), further=2)
QUICK = Bed(rounds=2, steps=1, heldout=2, length=16, seeds=1, paces=(1.0,), further=0)
EQUAL = 0.005
"""Losses this close, relatively, count as equal."""
FEWER = 4.0
"""Times fewer bytes down that the cache is to take."""


def run_all(pool: Executor, waiting: Sequence[Job], report: Report) -> list[Found]:
    """All jobs, in the order of `waiting`; what the time did not suffice for is listed in the
    report."""
    console = Console()
    since = time.perf_counter()
    futures = {pool.submit(compete, job): number for number, job in enumerate(waiting)}
    done: dict[int, Found] = {}

    for future in as_completed(futures):
        number = futures[future]
        job = waiting[number]
        name = f"{job.cell.name}, {job.contender.name}"

        try:
            each = future.result()
        except Exception as error:  # a fault of one contender must not cost the hours of all others
            report.skip(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            each = Found(job, complete=True)

        done[number] = each
        if not each.complete:
            report.skip(
                f"{name}: time was over after {len(each.tuning)} learning rates and "
                f"{len(each.runs)} seeds"
            )

        losses = ", ".join(f"{row['loss']:.4f}" for row in each.runs if "loss" in row)
        line = f"{len(done)}/{len(waiting)} {time.perf_counter() - since:.0f} s  {name}: {losses}"
        console.print(line, markup=False, soft_wrap=True)

    old = {row["key"] for each in done.values() for row in each.runs if row["source"] != SOURCE}
    if old:
        report.skip(f"{len(old)} runs are from the cache and of another state of the package")

    return [done[number] for number in sorted(done)]


# -- the command ---------------------------------------------------------------------------------


def bed_of(options: argparse.Namespace) -> Bed:
    """Return the bed that the options name."""
    bed = QUICK if options.quick else FULL
    return bed if options.seeds is None else replace(bed, seeds=options.seeds)
