"""Loops that numba compiles when they are first used, where numba is installed.

Nothing here imports numba before a kernel is asked for, and no module that defines kernels is
imported before that. Each kernel has a version in NumPy or torch, for machines where numba cannot
be imported.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)


@cache
def available() -> bool:
    """Return whether numba can be imported; numba refuses a NumPy that is newer than itself."""
    try:
        importlib.import_module("numba")
    except ImportError as error:
        log.warning("numba cannot be imported (%s): codecs use NumPy, which is slower", error)
        return False
    return True


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` at its first call, without the interpreter's lock while it runs.

    The machine code is kept beside the module, or in the user's cache where that folder is
    read-only, and in the process alone where there is neither.
    """
    numba = importlib.import_module("numba")
    try:
        kernel: Callable[P, R] = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba has no folder to write to
        kernel = numba.njit(nogil=True)(function)

    return kernel


_alone: ContextVar[bool] = ContextVar("_alone", default=False)
"""True while nothing else of the run works on this machine."""


@contextmanager
def all_cores() -> Iterator[None]:
    """Let `over_cores` use every core meanwhile, however few threads torch may use.

    It is for work beside which no site of this process works. Frames have the same bits.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def over_cores(work: Callable[[int, int], None], count: int) -> None:
    """Call `work(start, stop)` over 0 to `count`, a share for each thread that torch may use here,
    or under `all_cores` for each core.

    Threads are of this call: none is left when a process forks, as Flower's do.
    """
    most = _cores() if _alone.get() else min(torch.get_num_threads(), _cores())
    threads = max(min(most, count), 1)
    if threads == 1:
        work(0, count)
        return

    edges = [count * number // threads for number in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, edges[:-1], edges[1:]):
            pass


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
