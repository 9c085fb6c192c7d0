"""Seconds that a codec takes for an update on this machine, measured when they are asked for."""

import time
from collections.abc import Callable

import torch

from fluvial.codecs.base import Codec
from fluvial.seeds import generator

Clock = Callable[[], float]

ENOUGH_S = 0.2
"""Calls are repeated until they have taken about this long together."""


def coding_s(codec: Codec, clock: Clock = time.perf_counter) -> float:
    """Return the seconds to encode and decode one update, with as many threads as torch may use.

    The update is random. The first call is not counted, because it loads or compiles; the fastest
    of the others is, because what else the machine does only adds.
    """
    vector = 1e-3 * torch.randn(codec.layout.numel, generator=generator(0, "coding time"))
    update = codec.layout.unflatten(vector)
    codec.decode(codec.encode(update))
    fastest = float("inf")
    since = clock()

    while True:
        started = clock()
        codec.decode(codec.encode(update))
        ended = clock()
        fastest = min(fastest, ended - started)
        if ended - since >= ENOUGH_S:
            return fastest
