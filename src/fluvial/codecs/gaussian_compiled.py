"""Compiled passes over values of `Blocks`: their levels, and how often each magnitude occurs;
`gaussian` says what they compute."""

import numpy as np
from numpy.typing import NDArray

from fluvial.codecs.compiled import compiled

Doubles = NDArray[np.float64]
Reals = NDArray[np.float32] | NDArray[np.float64]
Ints = NDArray[np.int64]


@compiled
def quantise(
    values: Reals, factor: float, limits: Doubles, ends: Ints, levels: NDArray[np.int16]
) -> None:
    """Write `values` times `factor` as whole levels, within the limit of each block."""
    start = 0
    for block in range(len(ends)):
        limit = limits[block]
        for index in range(start, ends[block]):
            level = np.rint(values[index] * factor)
            levels[index] = np.int16(max(min(level, limit), -limit))
        start = ends[block]


@compiled
def count(
    values: Reals, factor: float, limits: Doubles, ends: Ints, classes: Ints, counts: Ints
) -> None:
    """Add the occurrences of every magnitude of the same levels to `counts` (classes,
    magnitudes)."""
    start = 0
    for block in range(len(ends)):
        limit = limits[block]
        row = counts[classes[block]]
        for index in range(start, ends[block]):
            magnitude = abs(np.rint(values[index] * factor))
            row[np.int64(magnitude if magnitude < limit else limit)] += 1  # also of NaN
        start = ends[block]
