"""The number of threads of tensor operations that is faster for a small model, as measured.

The threads of one operation wait for each other. Where other programs have the cores, or the
matrices are tiny, this takes longer than the work itself.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

logger = logging.getLogger(__name__)

SMALL = 100_000_000
"""Parameters up to which a model is tried: its pass takes about a second on one thread. A larger
one has large matrices, which more threads compute faster."""
PASSES = 4
"""Timed passes with each number of threads."""
ROWS, WIDTH = 8, 16
"""Sequences and tokens of a pass, as of a step of generated answers."""


@contextmanager
def with_threads(number: int) -> Iterator[None]:
    """Compute on a number of threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def faster_threads(model: nn.Module) -> int:
    """Return 1 where passes of `model` are faster on one thread, else the number that is set.

    A large model, and one on another device than the CPU, is not tried.
    """
    most = torch.get_num_threads()
    device = next(model.parameters()).device
    if most == 1 or device.type != "cpu" or _size(model) > SMALL:
        return most

    tokens = torch.zeros((ROWS, WIDTH), dtype=torch.long)
    mask = torch.ones_like(tokens)

    @torch.no_grad()
    def one_pass() -> None:
        model(input_ids=tokens, attention_mask=mask, use_cache=False)

    threads = measured_threads(one_pass, most)
    logger.info("computing on %d of %d threads, which is faster now", threads, most)
    return threads


def measured_threads(
    one_pass: Callable[[], object], most: int, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Return 1 or `most`, the number of threads with which passes take less time in all.

    Both take turns, so that what other programs do in between meets both.
    """
    taken = {1: 0.0, most: 0.0}
    for number in range(PASSES + 1):
        for threads in taken:
            with with_threads(threads):
                started = clock()
                one_pass()
            if number:  # the first pass with a number of threads starts them
                taken[threads] += clock() - started
    return min(taken, key=lambda threads: taken[threads])


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
