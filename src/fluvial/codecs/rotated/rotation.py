"""Random rotations, after which any update looks Gaussian.

A vector of n values is rotated by random signs and Hadamard matrices on its first and on its last
2^k values, 2^k <= n < 2^(k + 1), so nothing is padded. Nothing here learns from data. The compiled
version and the one in torch differ by rounding alone.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluvial.codecs import compiled

LARGEST_FP32 = float(np.finfo(np.float32).max)


class Rotation:
    """A random orthonormal map of each row of (rows, size), drawn from a seed."""

    def __init__(self, seed: int, rows: int, size: int) -> None:
        self._half, self._power = size // 2, 1 << size.bit_length() - 1
        kinds = 1 if size == self._power else 2
        words = np.random.PCG64(seed).random_raw(-(-kinds * rows * size // 64))
        drawn = words.astype("<u8", copy=False).view(np.uint8)
        bits = np.unpackbits(drawn, count=kinds * rows * size).view(np.int8)
        bits *= -2
        bits += 1
        signs = torch.from_numpy(bits).view(kinds, rows, size)
        self._before = signs[0]
        self._between = signs[-1]

    def forward(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        """Rotate x (rows, size), fp64 or fp32; with `overwrite`, its memory may be used."""
        if compiled.available():
            return self._compiled(x, back=False, overwrite=overwrite)

        x = self._butterfly(x * self._before)
        first = torch.cat([_hadamard(x[:, : self._power]), x[:, self._power :]], dim=1)

        if x.shape[1] == self._power:
            return first

        first = first * self._between
        rest = x.shape[1] - self._power
        return torch.cat([first[:, :rest], _hadamard(first[:, rest:])], dim=1)

    def inverse(self, z: Tensor, *, overwrite: bool = False) -> Tensor:
        """Undo `forward`."""
        if compiled.available():
            return self._compiled(z, back=True, overwrite=overwrite)

        rest = z.shape[1] - self._power
        if rest:
            z = torch.cat([z[:, :rest], _hadamard(z[:, rest:])], dim=1) * self._between
        x = torch.cat([_hadamard(z[:, : self._power]), z[:, self._power :]], dim=1)
        return self._butterfly(x).mul(self._before)

    def turn(self, vector: Tensor, starts: NDArray[np.int64], *, back: bool = False) -> None:
        """Rotate in place the rows of a vector (numel,), fp64 or fp32, that begin at `starts`
        (rows,); with `back`, undo that."""
        if compiled.available():
            self._loop(vector, starts, back=back)
            return

        size = self._before.shape[1]
        rows = [vector[start : start + size] for start in starts.tolist()]
        turned = self.inverse(torch.stack(rows)) if back else self.forward(torch.stack(rows))
        for row, value in zip(rows, turned, strict=True):
            row.copy_(value)

    def _compiled(self, x: Tensor, *, back: bool, overwrite: bool) -> Tensor:
        """Do what `forward` or `inverse` does by loops."""
        turned = x.contiguous() if overwrite else x.clone(memory_format=torch.contiguous_format)
        rows, size = turned.shape
        self._loop(turned.view(-1), size * np.arange(rows), back=back)
        return turned

    def _loop(self, vector: Tensor, starts: NDArray[np.int64], *, back: bool) -> None:
        """Do what `turn` does by loops."""
        from fluvial.codecs.rotated import rotation_compiled

        values = vector.numpy()
        scales = np.array([self._power**-0.5, 0.5**0.5], dtype=values.dtype)
        before = self._before.numpy()
        between = self._between.numpy()
        turn = rotation_compiled.inverse if back else rotation_compiled.forward

        def work(start: int, stop: int) -> None:
            rows = slice(start, stop)
            turn(values, starts[rows], before[rows], between[rows], self._power, scales)

        compiled.over_cores(work, len(starts))

    def _butterfly(self, x: Tensor) -> Tensor:
        """Return the sums and differences of the halves, so that both have the same energy; its own
        inverse."""
        if x.shape[1] == self._power:
            return x

        left = x[:, : self._half]
        middle = x[:, self._half : -self._half]
        right = x[:, -self._half :]

        return torch.cat([(left + right).div(2**0.5), middle, (left - right).div(2**0.5)], dim=1)


@cache
def _sylvester(size: int, dtype: torch.dtype) -> Tensor:
    """Return the orthonormal Hadamard matrix (size, size); `size` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.div(size**0.5).to(dtype)


def _hadamard(x: Tensor) -> Tensor:
    """Return every row of x (rows, size) times the orthonormal Hadamard matrix; `size` is a power
    of two."""
    rows, size = x.shape
    left = size

    while left > 1:
        radix = min(left, 32)
        x = x.reshape(rows, radix, size // radix).transpose(1, 2) @ _sylvester(radix, x.dtype)
        left //= radix

    return x.reshape(rows, size)
