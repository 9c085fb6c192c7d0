"""Compiled passes over the coefficients that `klt` codes; `order` and `encoder` say what they
compute."""

import numpy as np
from numpy.typing import NDArray

from fluvial.codecs.compiled import compiled

Codes = NDArray[np.int32]
Counts = NDArray[np.int64]
Floats = NDArray[np.float32]
Places = NDArray[np.intp]


@compiled
def select(above: Counts, place: Places, first: Counts, cells: Counts) -> tuple[Codes, Places]:
    """Return the number of coefficients of each class, and the place of each coefficient, class by
    class and in it by group.

    Class k and all above it have `above[group, cells[k, group]]` coefficients of a group; these
    stand in `place` from `first[group]` on, loudest first.
    """
    classes, groups = cells.shape
    sizes = np.zeros(classes, np.int32)
    total = 0
    for group in range(groups):
        total += above[group, cells[0, group]]
    where = np.empty(total, np.intp)
    end = 0

    for number in range(classes):
        begin = end
        for group in range(groups):
            louder = above[group, cells[number + 1, group]] if number + 1 < classes else 0
            start = first[group] + louder
            stop = first[group] + above[group, cells[number, group]]
            for index in range(start, stop):
                where[end] = place[index]
                end += 1
        sizes[number] = end - begin

    return sizes, where


@compiled
def measure(
    values: Floats,
    sizes: Codes,
    factor: np.float32,
    zero_below: Floats,
    offset: Floats,
    most: Floats,
    start: Codes,
    bits: Floats,
) -> tuple[float, float]:
    """Return the bits of all levels, and by how many steps in all they are clipped."""
    total = 0.0
    excess = 0.0
    end = 0

    for number in range(len(sizes)):
        begin = end
        end += sizes[number]
        for index in range(begin, end):
            magnitude = _magnitude(values[index] * factor, zero_below[number], offset[number])
            level = _clipped(magnitude, most[number])
            total += bits[start[number] + np.int64(level)]
            if magnitude != level:
                excess += np.float64(magnitude) - np.float64(level)

    return total, excess


@compiled
def symbols(
    values: Floats,
    sizes: Codes,
    factor: np.float32,
    zero_below: Floats,
    offset: Floats,
    most: Floats,
) -> Codes:
    """Return the levels, those of each class from 0 on."""
    coded = np.empty(len(values), np.int32)
    end = 0

    for number in range(len(sizes)):
        begin = end
        end += sizes[number]
        for index in range(begin, end):
            magnitude = _magnitude(values[index] * factor, zero_below[number], offset[number])
            level = np.int32(_clipped(magnitude, most[number]))
            coded[index] = np.int32(most[number]) + (level if values[index] > 0 else -level)

    return coded


@compiled
def scatter(
    coded: Codes,
    sizes: Codes,
    base: Codes,
    table: Floats,
    factor: float,
    where: Places,
    num_tops: int,
    latent: Floats,
) -> bool:
    """Write the values of the symbols (n,) to their places, and return whether there is any but 0
    from `num_tops` on; symbol 0 of a class has the entry `base` of the table."""
    beyond = False
    end = 0

    for number in range(len(sizes)):
        begin = end
        end += sizes[number]
        for index in range(begin, end):
            value = table[base[number] + coded[index]]
            latent[where[index]] = np.float32(value * factor)
            beyond |= value != 0 and where[index] >= num_tops

    return beyond


@compiled
def _magnitude(scaled: np.float32, zero_below: np.float32, offset: np.float32) -> np.float32:
    """Return the magnitude of a value in whole steps."""
    size = abs(scaled)
    return np.floor(size + offset) if size >= zero_below else np.float32(0)


@compiled
def _clipped(magnitude: np.float32, most: np.float32) -> np.float32:
    """Return a magnitude that has a symbol, also for NaN."""
    return magnitude if magnitude < most else most
