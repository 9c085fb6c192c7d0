"""Seconds that a codec takes for an update on this machine, and its code loaded ahead of the first
update."""

import time
from collections.abc import Callable

import torch

from fluvial.codecs import build
from fluvial.codecs.base import Codec, CodecSettings
from fluvial.seeds import generator
from fluvial.wire.tensors import Layout

Clock = Callable[[], float]

SAMPLE = 2**16
"""Values of the update for which a codec is loaded, at least where the layout has them."""
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


def loaded(settings: CodecSettings, layout: Layout) -> None:
    """Load what codes updates of `layout`, by coding a small one.

    A process forked afterwards has it. Raises `ConfigError` for a codec that needs a fit, or whose
    rate leaves the small update no bytes.
    """
    shapes = list(layout.shapes)
    while len(shapes) > 1 and Layout(tuple(shapes[:-1])).numel >= SAMPLE:
        shapes.pop()

    sample = Layout(tuple(shapes))
    vector = torch.randn(sample.numel, generator=generator(0, "loaded"))
    codec = build(settings, sample)
    codec.decode(codec.encode(sample.unflatten(vector)))
