"""Jobs of the benchmarks of codecs, in several processes."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace

from benchmarks.codecs.bed import Found, Job, compete
from benchmarks.codecs.cache import SOURCE
from benchmarks.codecs.contenders import only
from benchmarks.pooled import pooled
from benchmarks.report import Report


def run_all(pool: Executor, waiting: Sequence[Job], report: Report) -> list[Found]:
    """All jobs, in the order of `waiting`; what the time did not suffice for is listed in the
    report."""

    def failed(job: Job, why: str) -> Found:
        report.skip(f"{job.cell}, {job.contender.name}: {why}")
        return Found(job.cell, job.contender, {}, [], complete=True)

    results = pooled(pool, compete, waiting, failed, _words)
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


def _words(found: Found) -> str:
    state = "" if found.complete else ", time is over"
    rows = [*found.tuning.values(), *found.runs]
    stopped = next((f", {row['stopped']}" for row in rows if "stopped" in row), "")
    rates, seeds = len(found.tuning), len(found.runs)
    return f"{found.cell}: {found.contender.name}, {rates} rates, {seeds} seeds{state}{stopped}"


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
