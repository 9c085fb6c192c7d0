"""Paths on the trellis of `trellis` and `klt_trellis`: their plan, their codes, the best one for
some values, and what one decodes to.

A state of `memory` bits stands for Gaussian numbers from one fixed table. Each step shifts some
bits in, and the new state's numbers are those of the next values. `best_path` is Viterbi's search.
Sums of products are fused multiply-adds in rising order, compiled or in NumPy, so that every
processor makes the same frame.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri

from fluvial.codecs import compiled
from fluvial.codecs.rotated import paths_numpy

Floats = NDArray[np.float32]
Bits = NDArray[np.uint8]

BLOCK = 1024
"""Values of one path, at most."""
LONGEST = 64
"""Values of one step, at most."""


@dataclass(frozen=True)
class Plan:
    """The values that the bits of a path go to: `steps` of (bits, values), the same for each of
    `blocks`."""

    size: int
    blocks: int
    length: int
    """Values of a block; the last ones of all are padding."""
    shifts: NDArray[np.int64]
    """Bits of every step (steps,), at least 1."""
    spans: NDArray[np.int64]
    """Values of every step (steps,), at least 1."""
    scales: Floats
    """RMS of the numbers that stand for the values of a step."""

    @classmethod
    def of(cls, size: int, bits: int) -> "Plan":
        """Plan at most `bits` bits for `size` values of RMS 1, spread evenly; what is decoded has
        the energy that they carry."""
        blocks = max(-(-size // BLOCK), 1)
        length = -(-size // blocks)
        each = bits // blocks
        steps = min(each, length)
        edges = np.arange(steps + 1)
        spans = (
            np.diff(edges * length // max(steps, 1))
            if each <= length
            else np.ones(length, np.int64)
        )
        shifts = np.ones(steps, np.int64) if each <= length else np.diff(edges * each // length)
        scale = (1 - 4.0 ** (-int(shifts.sum()) / max(length, 1))) ** 0.5

        return cls(size, blocks, length, shifts, spans, np.full(len(spans), scale, np.float32))

    @property
    def bits(self) -> int:
        """Bits of one block."""
        return int(self.shifts.sum())

    @property
    def total(self) -> int:
        """Bits of all blocks."""
        return self.blocks * self.bits


@cache
def codebook(memory: int) -> Floats:
    """Return Gaussian numbers (LONGEST, 2^memory), of mean 0 and RMS 1 in each row; the same on
    every machine."""
    words = np.random.PCG64(memory).random_raw(LONGEST << memory)
    numbers = ndtri(((words >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53).reshape(
        LONGEST, -1
    )
    numbers -= numbers.mean(1, keepdims=True)
    codes: Floats = (numbers / np.sqrt((numbers**2).mean(1, keepdims=True))).astype(np.float32)

    return codes


def best_path(rows: Floats, plan: Plan, memory: int, device: torch.device | None = None) -> Bits:
    """Return the bits (plan.total,) of the path of least squared error for every row of (blocks,
    length), from state 0; with `device`, the search runs there."""
    assert plan.spans.max() <= LONGEST, "a code has no more numbers"
    energies, kinds = _energies(plan, memory)
    scales = -2 * plan.scales

    if device is not None:
        from fluvial.codecs.rotated import paths_torch

        return paths_torch.search(rows, plan, codebook(memory), energies, kinds, scales, device)

    if not compiled.available():
        return paths_numpy.search(rows, plan, codebook(memory), energies, kinds, scales)

    from fluvial.codecs.rotated import paths_compiled

    path = np.empty((plan.blocks, plan.bits), np.uint8)
    book = codebook(memory)
    halves = _halves(memory)
    energy_halves = _parted(energies)

    def work(start: int, stop: int) -> None:
        paths_compiled.search(
            rows[start:stop],
            scales,
            plan.shifts,
            plan.spans,
            kinds,
            book,
            halves,
            energies,
            energy_halves,
            path[start:stop],
        )

    compiled.over_cores(work, plan.blocks)
    return path.reshape(-1)


def follow(path: Bits, plan: Plan, memory: int) -> NDArray[np.float64]:
    """Return the values (n,) of a path (plan.total,)."""
    if plan.total == 0:
        return np.zeros(plan.size)

    assert plan.spans.max() <= LONGEST, "a code has no more numbers"
    path = path.reshape(plan.blocks, plan.bits)
    if not compiled.available():
        return paths_numpy.follow(path, plan, codebook(memory))

    from fluvial.codecs.rotated import paths_compiled

    decoded = np.empty((plan.blocks, plan.length))
    codes = _by_state(memory)

    def work(start: int, stop: int) -> None:
        paths_compiled.follow(
            path[start:stop], plan.shifts, plan.spans, plan.scales, codes, decoded[start:stop]
        )

    compiled.over_cores(work, plan.blocks)
    return decoded.reshape(-1)[: plan.size]


def search(
    values: NDArray[np.float64],
    bits: int,
    memory: int,
    *,
    scale: float = 1.0,
    device: torch.device | None = None,
) -> tuple[Bits, NDArray[np.float64]]:
    """Return the best path for `values` (n,) of about RMS `scale` in at most `bits` bits, and what
    it decodes to (n,); with `device`, the search runs there."""
    plan = Plan.of(len(values), bits)
    if plan.total == 0:
        return np.zeros(0, np.uint8), np.zeros(len(values))

    padded = np.zeros(plan.blocks * plan.length, dtype=np.float32)
    np.divide(values, scale, out=padded[: plan.size], casting="same_kind")
    path = best_path(padded.reshape(plan.blocks, plan.length), plan, memory, device)
    del padded  # its memory serves what is decoded

    decoded = follow(path, plan, memory)
    decoded *= scale
    return path, decoded


def _energies(plan: Plan, memory: int) -> tuple[Floats, NDArray[np.int64]]:
    """Return the energies of the codes (kinds, states) that a step can have, and each step's
    kind."""
    keys = plan.spans << 32 | plan.scales.view(np.uint32)
    _, first, kinds = np.unique(keys, return_index=True, return_inverse=True)
    book = codebook(memory)
    sums = {span: (book[:span] ** 2).sum(0) for span in set(plan.spans[first].tolist())}
    energies = [
        sums[span] * (scale * scale)
        for span, scale in zip(plan.spans[first].tolist(), plan.scales[first], strict=True)
    ]

    return np.stack(energies), kinds


def _parted(codes: Floats) -> Floats:
    """Return (rows, states) as (rows, 2, states / 2): even states, then odd ones."""
    return np.ascontiguousarray(codes.reshape(len(codes), -1, 2).transpose(0, 2, 1))


@cache
def _halves(memory: int) -> Floats:
    return _parted(codebook(memory))


@cache
def _by_state(memory: int) -> Floats:
    return np.ascontiguousarray(codebook(memory).T)
