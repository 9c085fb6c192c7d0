"""Compiled rotations of rows, in place: signs, butterflies and Walsh-Hadamard transforms;
`rotation` says what they compute.

The stages of a transform commute, so the widest come first, over all of a long row, and the rest
follow piece by piece, each while it lies in the cache.
"""

import numpy as np
from numpy.typing import NDArray

from fluvial.codecs.compiled import compiled

Numbers = NDArray[np.float32] | NDArray[np.float64]
Signs = NDArray[np.int8]
Ints = NDArray[np.int64]

_CACHED = 1 << 15
"""Numbers of a piece; 256 KiB in fp64."""


@compiled
def forward(
    x: Numbers, starts: Ints, before: Signs, between: Signs, power: int, scales: Numbers
) -> None:
    """Rotate the rows of x (numel,) that begin at `starts` (rows,), with signs (rows, size);
    `scales` (2,) are power^-1/2 and 2^-1/2 in the type of x."""
    for number in range(len(starts)):
        row = x[starts[number] : starts[number] + before.shape[1]]
        _flip(row, before[number])

        if len(row) > power:
            _butterfly(row, scales)
            _hadamard(row[:power], scales)
            _flip(row, between[number])
            _hadamard(row[len(row) - power :], scales)
        else:
            _hadamard(row, scales)


@compiled
def inverse(
    x: Numbers, starts: Ints, before: Signs, between: Signs, power: int, scales: Numbers
) -> None:
    """Undo `forward`."""
    for number in range(len(starts)):
        row = x[starts[number] : starts[number] + before.shape[1]]

        if len(row) > power:
            _hadamard(row[len(row) - power :], scales)
            _flip(row, between[number])
            _hadamard(row[:power], scales)
            _butterfly(row, scales)
        else:
            _hadamard(row, scales)

        _flip(row, before[number])


@compiled
def _flip(row: Numbers, signs: Signs) -> None:
    """Multiply by signs."""
    for index in range(len(row)):
        row[index] *= signs[index]


@compiled
def _butterfly(row: Numbers, scales: Numbers) -> None:
    """Write sums and differences of the two halves, over the square root of 2."""
    half = len(row) >> 1
    root = scales[1]
    left = row[:half]
    right = row[len(row) - half :]

    for index in range(half):
        above = left[index]
        below = right[index]
        left[index] = (above + below) * root
        right[index] = (above - below) * root


@compiled
def _hadamard(row: Numbers, scales: Numbers) -> None:
    """Transform a row of 2^k numbers."""
    width = len(row)
    while width > _CACHED:
        _quarter(row, width)
        width >>= 2

    for start in range(0, len(row), width):
        piece = row[start : start + width]
        _small(piece, scales)


@compiled
def _small(piece: Numbers, scales: Numbers) -> None:
    """Do the stages within a piece, and scale it."""
    width = len(piece)
    while width > 16:
        _quarter(piece, width)
        width >>= 2

    while width > 1:
        half = width >> 1
        for start in range(0, len(piece), width):
            for index in range(start, start + half):
                above = piece[index]
                below = piece[index + half]
                piece[index] = above + below
                piece[index + half] = above - below
        width = half

    factor = scales[0]
    for index in range(len(piece)):
        piece[index] *= factor


@compiled
def _quarter(row: Numbers, width: int) -> None:
    """Do two stages: butterflies over the quarters of every `width` numbers."""
    step = width >> 2
    for start in range(0, len(row), width):
        first = row[start : start + step]
        second = row[start + step : start + 2 * step]
        third = row[start + 2 * step : start + 3 * step]
        fourth = row[start + 3 * step : start + width]

        for index in range(step):
            a = first[index] + third[index]
            b = second[index] + fourth[index]
            c = first[index] - third[index]
            d = second[index] - fourth[index]
            first[index] = a + b
            second[index] = a - b
            third[index] = c + d
            fourth[index] = c - d
