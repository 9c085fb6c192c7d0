"""Compiled search and decoding of trellis paths; `paths` says what they compute.

Sums of products are fused, in rising order, whatever the processor: with `fma` a frame has the same
bits everywhere. Codes that follow even and odd bits lie apart, so that all loads are contiguous.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fluvial.codecs.compiled import compiled

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bits = NDArray[np.uint8]
Ints = NDArray[np.int64]


def _fused(typingctx: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ARG001 - numba's form
    """Return the type and the instruction of a * b + c of three fp32 numbers, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
        return builder.fma(*values)

    return types.float32(types.float32, types.float32, types.float32), codegen


fma: Callable[[np.float32, np.float32, np.float32], np.float32] = intrinsic(_fused)


@compiled
def search(
    rows: Floats,
    scales: Floats,
    shifts: Ints,
    spans: Ints,
    kinds: Ints,
    book: Floats,
    halves: Floats,
    sums: Floats,
    sum_halves: Floats,
    path: Bits,
) -> None:
    """Write the bits (blocks, bits) of the best path for every row (blocks, length) into `path`.

    Step t codes `spans[t]` values, times `scales[t]`, by `shifts[t]` bits; `sums[kinds[t]]` are the
    energies of its codes. `halves` and `sum_halves` are `book` (values, states) and `sums`, those
    of even states first, on an axis of their own.
    """
    states = book.shape[1]
    half = states >> 1
    steps = len(spans)
    cost = np.empty(states, np.float32)
    metric = np.empty(states, np.float32)
    least = np.empty(states, np.float32)
    wider = np.empty(states, np.float32)
    even = np.empty(half, np.float32)
    odd = np.empty(half, np.float32)
    chosen = np.empty((steps, half), np.uint8)
    codes = halves[0]
    codes_next = halves[1]

    for block in range(len(rows)):
        row = rows[block]
        cost[:] = np.float32(1e30)
        cost[0] = np.float32(0)
        position = 0

        for step in range(steps):
            shift = shifts[step]
            span = spans[step]
            kind = kinds[step]
            scale = scales[step]
            choice = chosen[step]
            first = row[position] * scale

            if shift == 1:
                if span == 1:
                    _one(cost, metric, choice, codes, sum_halves[kind], first)
                elif span == 2:
                    second = row[position + 1] * scale
                    _two(cost, metric, choice, codes, codes_next, sum_halves[kind], first, second)
                else:
                    _product(even, odd, halves, row[position : position + span], scale)
                    _add(cost, metric, choice, even, odd, sum_halves[kind])
            else:
                for state in range(states):
                    metric[state] = first * book[0, state]
                for index in range(1, span):
                    value = row[position + index] * scale
                    for state in range(states):
                        metric[state] = fma(value, book[index, state], metric[state])
                _choose(cost, least, choice, shift)
                _spread(metric, sums[kind], least, wider, shift)

            position += span
            cost, metric = metric, cost

        _trace(chosen, shifts, states, _first_least(cost), path[block])


@compiled
def follow(
    path: Bits, shifts: Ints, spans: Ints, scales: Floats, codes: Floats, decoded: Doubles
) -> None:
    """Write what the bits (blocks, bits) decode to into `decoded` (blocks, length).

    `codes` (states, values) has a row for each state, so that a step reads one place.
    """
    mask = len(codes) - 1

    for block in range(len(path)):
        state = 0
        bit = 0
        position = 0

        for step in range(len(spans)):
            for _ in range(shifts[step]):
                state = (state << 1 | path[block, bit]) & mask
                bit += 1
            scale = scales[step]
            for index in range(spans[step]):
                decoded[block, position + index] = codes[state, index] * scale
            position += spans[step]


@compiled
def _one(
    cost: Floats, metric: Floats, choice: Bits, codes: Floats, sums: Floats, x: np.float32
) -> None:
    """Take a step of one bit and one value."""
    half = len(cost) >> 1
    for low in range(half):
        below = cost[low]
        above = cost[low + half]
        choice[low] = np.uint8(above < below)
        least = above if above < below else below
        metric[2 * low] = (x * codes[0, low] + sums[0, low]) + least
        metric[2 * low + 1] = (x * codes[1, low] + sums[1, low]) + least


@compiled
def _two(
    cost: Floats,
    metric: Floats,
    choice: Bits,
    codes: Floats,
    codes_next: Floats,
    sums: Floats,
    x: np.float32,
    y: np.float32,
) -> None:
    """Take a step of one bit and two values."""
    half = len(cost) >> 1
    for low in range(half):
        below = cost[low]
        above = cost[low + half]
        choice[low] = np.uint8(above < below)
        least = above if above < below else below
        even = fma(y, codes_next[0, low], x * codes[0, low])
        odd = fma(y, codes_next[1, low], x * codes[1, low])
        metric[2 * low] = (even + sums[0, low]) + least
        metric[2 * low + 1] = (odd + sums[1, low]) + least


@compiled
def _product(even: Floats, odd: Floats, halves: Floats, values: Floats, scale: np.float32) -> None:
    """Write the products of `values` with the codes of even and of odd states."""
    first = values[0] * scale
    for low in range(len(even)):
        even[low] = first * halves[0, 0, low]
        odd[low] = first * halves[0, 1, low]

    for index in range(1, len(values)):
        value = values[index] * scale
        for low in range(len(even)):
            even[low] = fma(value, halves[index, 0, low], even[low])
            odd[low] = fma(value, halves[index, 1, low], odd[low])


@compiled
def _add(
    cost: Floats, metric: Floats, choice: Bits, even: Floats, odd: Floats, sums: Floats
) -> None:
    """Take a step of one bit, given its products."""
    half = len(cost) >> 1
    for low in range(half):
        below = cost[low]
        above = cost[low + half]
        choice[low] = np.uint8(above < below)
        least = above if above < below else below
        metric[2 * low] = (even[low] + sums[0, low]) + least
        metric[2 * low + 1] = (odd[low] + sums[1, low]) + least


@compiled
def _choose(cost: Floats, least: Floats, choice: Bits, shift: int) -> None:
    """Find the first of the least costs among the predecessors of each state."""
    left = len(cost) >> shift
    for low in range(left):
        least[low] = cost[low]
        choice[low] = 0

    for number in range(1, 1 << shift):
        start = number * left
        for low in range(left):
            other = cost[start + low]
            nearer = other < least[low]
            choice[low] = np.uint8(number) if nearer else choice[low]
            least[low] = other if nearer else least[low]


@compiled
def _spread(metric: Floats, sums: Floats, least: Floats, wider: Floats, shift: int) -> None:
    """Add energies and the cost of the best predecessor to the products."""
    size = len(metric) >> shift
    while size < len(metric):  # each cost beside itself, until every state has one
        for low in range(size):
            wider[2 * low] = least[low]
            wider[2 * low + 1] = least[low]
        least, wider = wider, least
        size *= 2

    for state in range(len(metric)):
        metric[state] = (metric[state] + sums[state]) + least[state]


@compiled
def _first_least(cost: Floats) -> int:
    """Return the first state of least cost."""
    best = 0
    for state in range(1, len(cost)):
        if cost[state] < cost[best]:
            best = state
    return best


@compiled
def _trace(chosen: Bits, shifts: Ints, states: int, last: int, path: Bits) -> None:
    """Write the bits that lead to the state `last`."""
    state = last
    end = len(path)

    for step in range(len(shifts) - 1, -1, -1):
        shift = shifts[step]
        for bit in range(shift):
            path[end - 1 - bit] = (state >> bit) & 1
        end -= shift
        before = state >> shift
        state = before + np.int64(chosen[step, before]) * (states >> shift)
