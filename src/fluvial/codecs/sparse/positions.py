"""Positions drawn from a seed, which then need no bytes of their own."""

import struct

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

SEED = struct.Struct("<Q")
"""Format of a seed in a frame."""


def slots(seed: int, count: int, total: int) -> Indices:
    """Return `count` different positions of `total`, in order, drawn from a u64 seed: those of the
    smallest words.

    Uses raw words of PCG64, which NumPy promises not to change, rather than `Generator.choice`,
    which it may.
    """
    words = np.random.PCG64(seed).random_raw(total)
    chosen = np.argpartition(words, count - 1)[:count] if count < total else np.arange(total)

    return np.sort(chosen).astype(np.int64)
