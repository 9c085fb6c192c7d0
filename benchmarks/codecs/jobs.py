"""Jobs of the benchmarks of codecs, in several processes."""

import time
from collections.abc import Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import replace

from rich.console import Console

from benchmarks.codecs.bed import Found, Job, compete
from benchmarks.codecs.cache import SOURCE
from benchmarks.codecs.contenders import only
from benchmarks.report import Report


def run_all(pool: Executor, waiting: Sequence[Job], report: Report) -> list[Found]:
    """All jobs, in the order of `waiting`; what the time did not suffice for is listed in the
    report."""
    console = Console()
    since = time.perf_counter()
    futures = {pool.submit(compete, job): number for number, job in enumerate(waiting)}
    found: dict[int, Found] = {}

    for done in as_completed(futures):
        number = futures[done]
        job = waiting[number]
        try:
            each = done.result()
        except Exception as error:  # a fault of one contender must not cost the hours of all others
            report.skip(
                f"{job.cell}, {job.contender.name}: {type(error).__name__}: {str(error)[:300]}"
            )
            each = Found(job.cell, job.contender, {}, [], complete=True)

        found[number] = each
        rows = [*each.tuning.values(), *each.runs]
        state = "" if each.complete else ", time is over"
        stopped = next((f", {row['stopped']}" for row in rows if "stopped" in row), "")
        console.print(
            f"{len(found)}/{len(waiting)} {time.perf_counter() - since:.0f} s  {each.cell}: "
            f"{each.contender.name}, "
            f"{len(each.tuning)} rates, {len(each.runs)} seeds{state}{stopped}"[:240],
            markup=False,
            soft_wrap=True,
        )

    results = [found[number] for number in sorted(found)]
    for each in results:
        if not each.complete:
            report.skip(
                f"{each.cell}, {each.contender.name}: time was over after {len(each.tuning)} "
                "learning rates and "
                f"{len(each.runs)} seeds"
            )

    old = {row["key"] for each in results for row in (*each.tuning.values(), *each.runs)}
    old -= {
        row["key"]
        for each in results
        for row in (*each.tuning.values(), *each.runs)
        if row["source"] == SOURCE
    }
    if old:
        report.skip(
            f"{len(old)} runs are from the cache and of another state of the package; see --again"
        )

    return results


def at_rate_of_uncompressed(pool: Executor, waiting: Sequence[Job], report: Report) -> list[Found]:
    """Run the uncompressed contender of each cell, then all others at its best learning rate."""
    references = run_all(pool, [job for job in waiting if _is_reference(job)], report)
    best = {each.cell: each.learning_rate for each in references}
    others = [
        replace(job, bed=only(job.cell, job.bed, rate))
        for job in waiting
        if not _is_reference(job) and (rate := best[job.cell]) is not None
    ]

    return references + run_all(pool, others, report)


def _is_reference(job: Job) -> bool:
    return job.contender.role == "reference"
