"""Many jobs in several processes, each told as it ends."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from typing import TypeVar

from rich.console import Console

Job = TypeVar("Job")
Found = TypeVar("Found")


def pooled(
    pool: Executor,
    work: Callable[[Job], Found],
    waiting: Sequence[Job],
    failed: Callable[[Job, str], Found],
    words: Callable[[Found], str],
) -> list[Found]:
    """Do all jobs; return what each found, in their order, and print `words` of it as it ends.

    A job that raises costs no other: `failed` makes what stands in its place, from the error.
    """
    console = Console()
    since = time.perf_counter()
    futures = {pool.submit(work, job): number for number, job in enumerate(waiting)}
    found: dict[int, Found] = {}

    for future in as_completed(futures):
        number = futures[future]
        try:
            found[number] = future.result()
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:300]}"
            found[number] = failed(waiting[number], why)

        passed = f"{len(found)}/{len(waiting)} {time.perf_counter() - since:.0f} s"
        line = f"{passed}  {words(found[number])}"
        console.print(line[:240], markup=False, soft_wrap=True)

    return [found[number] for number in range(len(waiting))]
