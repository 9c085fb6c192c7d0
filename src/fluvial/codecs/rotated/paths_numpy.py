"""Search and decoding of trellis paths in NumPy, where numba cannot be imported; `paths` says what
they compute.

Blocks lie along the last axis, so that every pass is over contiguous memory.
"""

from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bits = NDArray[np.uint8]
Ints = NDArray[np.int64]

_LANES = 64
"""Blocks that are searched side by side, at most; a shorter group is padded to a power of two."""
_FEWEST_LANES = 8
_MIDDLE = 1 << 28
"""The last 29 bits of an fp64 number that lies in the middle of two fp32 numbers."""


class Plan(Protocol):
    """Fields of `paths.Plan` that are used here."""

    @property
    def size(self) -> int:
        """Values that are coded."""

    @property
    def blocks(self) -> int:
        """Number of paths."""

    @property
    def length(self) -> int:
        """Values of a block."""

    @property
    def bits(self) -> int:
        """Bits of a block."""

    @property
    def shifts(self) -> Ints:
        """Bits of every step (steps,)."""

    @property
    def spans(self) -> Ints:
        """Values of every step (steps,)."""

    @property
    def scales(self) -> Floats:
        """Scale of every step (steps,)."""


def search(
    rows: Floats, plan: Plan, book: Floats, energies: Floats, kinds: Ints, scales: Floats
) -> Bits:
    """Return the bits (blocks * bits,) of the best path for every row (blocks, length)."""
    lanes = min(max(1 << (plan.blocks - 1).bit_length(), _FEWEST_LANES), _LANES)
    columns = np.zeros((plan.length, -(-plan.blocks // lanes) * lanes), np.float32)
    columns[:, : plan.blocks] = rows.T
    groups = np.split(columns, columns.shape[1] // lanes, axis=1)
    paths = [_viterbi(group, plan, book, energies, kinds, scales) for group in groups]

    return np.concatenate(paths)[: plan.blocks].reshape(-1)


def follow(path: Bits, plan: Plan, book: Floats) -> NDArray[np.float64]:
    """Return the values (size,) of paths (blocks, bits)."""
    memory = book.shape[1].bit_length() - 1
    padded = np.concatenate([np.zeros((plan.blocks, memory), np.uint8), path], axis=1)
    last = memory + np.cumsum(plan.shifts) - 1  # a state is the `memory` bits up to its last
    states = np.zeros((plan.blocks, len(last)), np.int16)

    for bit in range(memory):
        states |= padded[:, last - bit].astype(np.int16) << bit

    step = np.repeat(np.arange(len(plan.spans)), plan.spans)
    place = np.arange(plan.length) - np.repeat(np.cumsum(plan.spans) - plan.spans, plan.spans)
    decoded = book[place, states[:, step]] * plan.scales[step]
    values: NDArray[np.float64] = decoded.reshape(-1)[: plan.size].astype(np.float64)

    return values


def _viterbi(
    columns: Floats, plan: Plan, book: Floats, energies: Floats, kinds: Ints, scales: Floats
) -> Bits:
    """Return the bits (lanes, bits) of the best path for each column (length, lanes)."""
    states = book.shape[1]
    count = columns.shape[1]
    cost = np.full((states, count), 1e30, dtype=np.float32)
    cost[0] = 0
    metric = np.empty_like(cost)
    chosen = []
    position = 0
    steps = zip(plan.shifts.tolist(), plan.spans.tolist(), kinds, scales, strict=True)

    for shift, span, kind, scale in steps:
        products(book[:span], columns[position : position + span] * scale, out=metric)
        metric += energies[kind][:, None]
        position += span

        left = states >> shift
        from_each = cost.reshape(1 << shift, left, count)
        if shift == 1:
            chosen.append((from_each[1] < from_each[0]).view(np.uint8))
            least = np.minimum(from_each[0], from_each[1])
        else:
            chosen.append(from_each.argmin(0).astype(np.uint8))
            least = from_each.min(0)

        by_predecessor = metric.reshape(left, 1 << shift, count)
        by_predecessor += least[:, None]
        cost, metric = metric, cost

    path = np.zeros((count, plan.bits), np.uint8)
    lanes = np.arange(count)
    state = cost.argmin(0)
    end = plan.bits

    for shift, choice in zip(plan.shifts.tolist()[::-1], chosen[::-1], strict=True):
        for bit in range(shift):
            path[:, end - 1 - bit] = state >> bit & 1
        end -= shift
        before = state >> shift
        state = before + choice[before, lanes].astype(np.int64) * (states >> shift)

    return path


def products(codes: Floats, values: Floats, *, out: Floats) -> None:
    """Write `codes` (span, states) times `values` (span, lanes), by fused multiply-adds in rising
    order, into `out` (states, lanes)."""
    if len(codes) == 1:
        np.multiply(codes[0][:, None], values, out=out)
    elif _blas_is_fused(*codes.shape, values.shape[1]):
        np.matmul(codes.T, values, out=out)
    else:
        fused(codes, values, out=out)


def fused(codes: Floats, values: Floats, *, out: Floats) -> None:
    """Do what `products` does by exact arithmetic in fp64, whatever BLAS does."""
    np.multiply(codes[0][:, None], values[0], out=out)

    for code, value in zip(codes[1:], values[1:], strict=True):
        product = code.astype(np.float64)[:, None] * value.astype(np.float64)  # exact
        before = out.astype(np.float64)
        total = product + before
        middle = (total.view(np.int64) & (2 * _MIDDLE - 1)) == _MIDDLE

        if middle.any():  # round to the nearest as if `total` had all its digits
            difference = total - before
            lost = (before - (total - difference)) + (product - difference)
            lost = np.where(middle, lost, 0)
            total = np.where(
                lost == 0, total, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
            )

        out[:] = total


@cache
def _blas_is_fused(span: int, states: int, lanes: int) -> bool:
    """Return whether this machine's BLAS makes the same products as `fused` at this size, seen on
    some random numbers; on processors without a fused multiply-add it does not."""
    random = np.random.default_rng(0)
    codes = random.standard_normal((span, states)).astype(np.float32)
    values = random.standard_normal((span, lanes)).astype(np.float32)
    expected = np.empty((states, lanes), np.float32)
    fused(codes, values, out=expected)

    return bool(np.array_equal(codes.T @ values, expected))
