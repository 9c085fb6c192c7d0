"""Jobs of `benchmarks.fedcybgd`: full and quick beds, and many jobs at a time."""

import argparse
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace

from benchmarks.codecs.cache import SOURCE
from benchmarks.fedcybgd.bed import Found, Job, compete
from benchmarks.fedcybgd.contenders import Bed
from benchmarks.pooled import pooled
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

    def failed(job: Job, why: str) -> Found:
        report.skip(f"{_name(job)}: {why}")
        return Found(job, complete=True)

    found = pooled(pool, compete, waiting, failed, _words)
    for each in found:
        if not each.complete:
            report.skip(
                f"{_name(each.job)}: time was over after {len(each.tuning)} learning rates and "
                f"{len(each.runs)} seeds"
            )

    old = {row["key"] for each in found for row in each.runs if row["source"] != SOURCE}
    if old:
        report.skip(f"{len(old)} runs are from the cache and of another state of the package")

    return found


def _name(job: Job) -> str:
    return f"{job.cell.name}, {job.contender.name}"


def _words(found: Found) -> str:
    losses = ", ".join(f"{row['loss']:.4f}" for row in found.runs if "loss" in row)
    return f"{_name(found.job)}: {losses}"


# -- the command ---------------------------------------------------------------------------------


def bed_of(options: argparse.Namespace) -> Bed:
    """Return the bed that the options name."""
    bed = QUICK if options.quick else FULL
    return bed if options.seeds is None else replace(bed, seeds=options.seeds)
