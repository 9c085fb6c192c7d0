"""Memory that Python allocates while a function runs."""

import tracemalloc
from collections.abc import Callable


def allocates_less(work: Callable[[], object], limit: int) -> bool:
    """Return whether the peak of a run of `work`, in bytes, is below `limit` in one of three runs.

    Python traces the allocations of all threads, so that a thread that an earlier test left
    behind adds to a run; what `work` itself allocates is in every run.
    """
    return any(_peak_bytes(work) < limit for _ in range(3))


def _peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()

    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
