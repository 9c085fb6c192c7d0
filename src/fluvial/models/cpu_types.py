"""Float types in which the CPU of this machine is slow, as measured by a product of matrices."""

import time
from collections.abc import Iterator
from functools import cache

import torch

from fluvial.models.loading import resolve_device
from fluvial.models.pretrained import ModelConfig, dtype_of
from fluvial.models.threads import with_threads

SLOW = 2.0
"""Times longer than in float32 from which a type is slow. Where a CPU multiplies a type in
hardware the ratio is about 1 or less, and where it does not it is 5 to 14."""
_REPEATS = 5
_ROWS, _WIDTH = 128, 256


@cache
def times_slower(dtype: torch.dtype) -> float:
    """Return how many times longer the CPU takes for a product of matrices in `dtype` than in
    float32; the shortest of some repeats counts."""
    return _seconds(dtype) / _seconds(torch.float32)


def is_slow(config: ModelConfig) -> bool:
    """Return whether the base computes on the CPU in a type in which it is slow."""
    kind = dtype_of(config)
    on_cpu = resolve_device(config.device).type == "cpu"
    return on_cpu and kind != torch.float32 and times_slower(kind) >= SLOW


def slow_types(config: ModelConfig, *, autocast: bool) -> Iterator[str]:
    """Yield a remark where a base on the CPU computes in a slow type, or under `autocast` to
    bfloat16 that is slow there."""
    if is_slow(config):
        kind = dtype_of(config)
        name = str(kind).removeprefix("torch.")
        yield (
            f"model.dtype: this CPU computes about {times_slower(kind):.0f} times more slowly in "
            f'{name} than in float32; set model.dtype = "float32" if its {4 // kind.itemsize} '
            "times the memory for the base is there"
        )
    elif autocast and resolve_device(config.device).type == "cpu":
        slower = times_slower(torch.bfloat16)
        if slower >= SLOW:
            yield (
                f"train.bf16: this CPU computes about {slower:.0f} times more slowly in bfloat16 "
                "than in float32; remove it"
            )


def _seconds(dtype: torch.dtype) -> float:
    """Return the processor seconds of a product on one thread, which other programs do not
    lengthen."""
    rows = torch.ones(_ROWS, _WIDTH, dtype=dtype)
    weights = torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    times = []
    with with_threads(1):
        for _ in range(_REPEATS):
            before = time.thread_time()
            torch.nn.functional.linear(rows, weights)
            times.append(time.thread_time() - before)

    return max(min(times), 1e-9)
