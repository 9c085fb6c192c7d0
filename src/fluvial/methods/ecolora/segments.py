"""Segments of the adapter, the values of them that are sent, and the mix a site starts from."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fluvial.codecs.golomb import Indices, largest
from fluvial.codecs.quantise import Floats
from fluvial.wire.tensors import Layout, factor


@dataclass(frozen=True)
class Slice:
    """Range `start` to `stop` of the values of the flattened adapter."""

    start: int
    stop: int


def segment(number: int, segments: int, total: int) -> Slice:
    """Return segment `number` of `segments` of nearly equal size."""
    return Slice(number * total // segments, (number + 1) * total // segments)


def turn(place: int, round: int, segments: int) -> int:
    """Return the segment that the site at `place` in the cohort sends in `round`.

    It is (place + round) mod N_s.
    """
    return (place + round) % segments


def share(least: float, most: float, gamma: float, fallen: float) -> float:
    """Return k = k_min + (k_max - k_min) exp(-gamma * fallen), at most k_max.

    The loss has fallen by `fallen` nats. k is rounded to four places, as it is sent.
    """
    return round(least + (most - least) * math.exp(-gamma * max(fallen, 0.0)), 4)


def mix(ours: Floats, others: Floats, weight: float) -> Floats:
    """Return (1 - weight) * others + weight * ours; exactly `others` at weight 0."""
    return others + np.float32(weight) * (ours - others)


class Sparsifier:
    """Choice of the values that are sent: the largest of A and of B, a share of each."""

    def __init__(self, layout: Layout) -> None:
        kinds = [
            np.full(size, factor(name) == "B")
            for name, size in zip(layout.names, layout.sizes, strict=True)
        ]
        self._is_b: NDArray[np.bool_] = np.concatenate(kinds)

    def choose(self, change: Floats, span: Slice, share_a: float, share_b: float) -> Indices:
        """Return positions within `span`, rising; change (span.stop - span.start,)."""
        chosen = []
        for is_b, fraction in ((False, share_a), (True, share_b)):
            places = np.flatnonzero(self._is_b[span.start : span.stop] == is_b)
            count = math.ceil(fraction * len(places))
            chosen.append(places[largest(abs(change[places]), count)])

        return np.sort(np.concatenate(chosen))

    def count(self, span: Slice, share_a: float, share_b: float) -> int:
        """Return the number of values that `choose` returns where none of them is 0."""
        is_b = self._is_b[span.start : span.stop]
        return math.ceil(share_b * int(is_b.sum())) + math.ceil(share_a * int((~is_b).sum()))
