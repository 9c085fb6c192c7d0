"""Gaussian noise that only the holder of a secret can draw, added on a grid.

The noise of differential privacy protects nothing if somebody else can compute it, so it never
comes from the seed of a run. A stream is keyed by HMAC-SHA-256 of a secret and of what the noise is
for: the same release draws the same noise, after a crash too, and another release draws independent
noise. Bytes are SHAKE-256 of the key and a block number.

Floating-point noise can betray the value under it by its last bits (Mironov, "On Significance of
the Least Significant Bits for Differential Privacy", CCS 2012). So the value is cut to a grid, the
noise is rounded to the same grid, and only whole numbers are added: which numbers can come out does
not depend on the value.
"""

import hashlib
import hmac
import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

SECRET_BYTES = 32
GRID_BITS = 16
"""The grid is the largest power of two within the noise's standard deviation, divided by 2^16."""

_BLOCK = 1 << 16  # values whose noise is drawn at once
_BITS = 2.0**-53


def derive_key(secret: bytes, purpose: str, *parts: bytes) -> bytes:
    """Return 32 bytes for `purpose` and `parts`, which cannot be computed without `secret`."""
    assert len(secret) == SECRET_BYTES, "a secret has 32 bytes"
    digest = hmac.new(secret, digestmod=hashlib.sha256)

    for part in (purpose.encode(), *parts):
        digest.update(len(part).to_bytes(8, "little"))  # no two lists of parts are the same text
        digest.update(part)

    return digest.digest()


def gaussian(key: bytes, count: int) -> NDArray[np.float64]:
    """Return `count` independent standard Gaussian values (count,), a function of `key` alone."""
    values = np.empty(count)
    for start, block in _blocks(key, count):
        values[start : start + len(block)] = block
    return values


def _blocks(key: bytes, count: int) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield the start and the values of each block, by the inverse of the distribution function.

    A value takes 106 random bits and a sign, so that the tail is as finely drawn as the middle.
    """
    for number, start in enumerate(range(0, count, _BLOCK)):
        size = min(_BLOCK, count - start)
        stream = hashlib.shake_256(key + number.to_bytes(8, "little")).digest(16 * size)
        high, low = np.frombuffer(stream, "<u8").reshape(size, 2).T
        tail = ((high >> np.uint64(11)) + ((low >> np.uint64(11)) + 0.5) * _BITS) * _BITS
        yield start, np.where(high & np.uint64(1), -1.0, 1.0) * -ndtri(tail / 2)


def grid_of(std: float) -> float:
    """Return the spacing of the grid for noise of standard deviation `std` (above 0)."""
    assert std > 0, "noise has a size"
    assert math.isfinite(std), "noise has a size"
    return 2.0 ** (math.floor(math.log2(std)) - GRID_BITS)


def on_grid(vector: Tensor, std: float, *, clip_norm: float | None = None) -> NDArray[np.float64]:
    """Return `vector` (n,) as whole numbers of grid steps, exact in fp64.

    With `clip_norm` the vector is scaled down to that norm where it is longer, and cut toward zero:
    the norm of what is returned, times the step, is never more. A vector that is not finite becomes
    zero.
    """
    values = vector.detach().cpu().double().numpy()
    grid = grid_of(std)

    if clip_norm is None:
        return np.rint(values / grid)

    length = math.sqrt(float(np.sum(np.square(values))))
    if not math.isfinite(length):
        return np.zeros_like(values)

    room = clip_norm * (1 - 1e-9)  # the sum of squares was rounded
    factor = room / length if length > room else 1.0
    return np.trunc(values * (factor / grid))


def disturb(steps: NDArray[np.float64], std: float, key: bytes) -> Tensor:
    """Return `steps` (n,) of the grid plus Gaussian noise of deviation `std`, as fp32 values."""
    grid = grid_of(std)
    noisy = np.empty_like(steps)

    for start, block in _blocks(key, len(steps)):
        span = slice(start, start + len(block))
        noisy[span] = steps[span] + np.rint(block * (std / grid))

    return torch.from_numpy((noisy * grid).astype(np.float32))
