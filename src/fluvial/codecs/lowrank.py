"""powersgd: stacked matrices as a product of two thin ones.

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", NeurIPS 2019, arXiv 1905.13727. The paper approximates the best factors by one power
iteration and sends them in full. Ours takes the singular vectors, stacks the tensors of one kind
over the layers, since a LoRA factor is thin already, and quantises and entropy-codes both factors,
so that any rate can be met.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluvial.codecs.base import Codec, CodecSettings, RateSettings, frame_room
from fluvial.codecs.gaussian import COARSEST, FINEST, OCTAVE, Blocks, Doubles
from fluvial.codecs.learned.canvas import target
from fluvial.errors import WireError
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout, factor

_AUDIBLE = 0.6
"""A component is sent if its right factor, times the singular value, has an RMS of so many steps;
0.5 to 0.7 differ little. The loudest is sent in any case."""
_CLOSE = OCTAVE // 400
_LARGEST = float(np.finfo(np.float32).max)


class PowerSgdSettings(RateSettings):
    """Low rank, with quantised factors; ranks and bits follow from the rate and the message.

    Bytes per value: 4 / rate. Lost: all but the leading singular directions.
    """

    name: Literal["powersgd"] = "powersgd"
    """Name of the codec."""


class PowerSgd(Codec):
    """Every stack X (rows, features) as Z Q', with Q (features, rank) orthonormal and Z = X Q.

    A tensor is a matrix (all axes but the last, last), the longer side being its features; those of
    one shape, and of one LoRA target and factor, are stacked. Right factors times singular value,
    and then Z, are quantised with one step for everything; Q is the QR of what is decoded. ||X - Z^
    Q'||^2 = ||X||^2 - ||X Q||^2 + ||X Q - Z^||^2, so coding contracts. Body: the rank of every
    stack (u16), then `Blocks` with a block for each column, right factors first.
    """

    code: ClassVar[int] = 17
    fills: ClassVar[bool] = False
    settings: PowerSgdSettings

    def __init__(self, settings: PowerSgdSettings, layout: Layout) -> None:
        super().__init__(settings, layout)
        starts = np.cumsum(layout.sizes, dtype=np.int64) - layout.sizes
        stacks: dict[object, list[NDArray[np.int64]]] = {}

        for start, size, (name, shape) in zip(starts, layout.sizes, layout.shapes, strict=True):
            if size:
                where = start + np.arange(size).reshape(-1, shape[-1] if shape else 1)
                key = _stack(name, shape)
                stacks.setdefault(key, []).append(
                    where.T if where.shape[0] > where.shape[1] else where
                )

        self._stacks = [torch.from_numpy(np.concatenate(alike)) for alike in stacks.values()]
        self._room = self.frame_size(settings, layout) - OVERHEAD

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, PowerSgdSettings)
        sizes = zip(layout.shapes, layout.sizes, strict=True)
        stacks = {_stack(name, shape) for (name, shape), size in sizes if size}
        return frame_room(layout, settings, least=2 * len(stacks) + Blocks.least)

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """Code the flattened update (numel,); see `Codec.body`."""
        stacks = [vector[where].double() for where in self._stacks]
        rights = [_right_factors(x) for x in stacks]
        room = self._room - 2 * len(stacks)
        everything = Blocks(
            [n for right in rights for n in _sizes(right.shape[:1], [right.shape[1]])]
        )
        loudness = everything.loudness(
            np.concatenate([right.T.reshape(-1).numpy() for right in rights])
        )
        finest = everything.finest(loudness)

        def all_fits(step: int) -> bool:
            _, blocks, values = _factors(stacks, rights, step, step)
            return blocks.excess(values, step, room) <= 0

        low = finest
        audible = everything.expected_step(loudness, room)
        stride = OCTAVE // 4

        while not all_fits(audible):
            low = audible
            audible = min(audible + stride, COARSEST)
            stride *= 2

        loudest = float(loudness.max(initial=-np.inf)) - math.log2(_AUDIBLE)
        audible = min(_finest(all_fits, low, audible), math.floor(max(OCTAVE * loudest, FINEST)))

        def fits(finer: int) -> bool:
            _, blocks, values = _factors(stacks, rights, finer, audible)
            return blocks.excess(values, finer, room) <= 0

        # Where one more component would not fit, a finer step for those that do uses what is left.
        step = _finest(
            fits,
            min(max(audible - OCTAVE // 2, finest), audible),
            audible if fits(audible) else COARSEST,
        )
        stride = 1
        while True:
            ranks, blocks, values = _factors(stacks, rights, step, audible)
            data = blocks.encode_at(values, step)
            if len(data) <= room:
                return np.array(ranks, dtype="<u2").tobytes() + data
            step = min(step + stride, COARSEST)
            audible = min(audible + stride - 1, COARSEST)
            stride = 2 * stride

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        ranks = reader.array("u2", len(self._stacks)).astype(np.int64).tolist()
        for rank, where in zip(ranks, self._stacks, strict=True):
            if rank > min(where.shape):
                raise WireError(f"frame: rank {rank} of a stack {tuple(where.shape)}")

        rows, features = zip(*(where.shape for where in self._stacks), strict=True)
        values = torch.from_numpy(
            Blocks(_sizes(features, ranks) + _sizes(rows, ranks)).decode(reader)
        )
        pieces = torch.split(
            values, [n * rank for n, rank in zip(features + rows, ranks + ranks, strict=True)]
        )
        vector = torch.zeros(self.layout.numel)

        for where, rank, right, left in zip(
            self._stacks, ranks, pieces, pieces[len(ranks) :], strict=False
        ):
            if rank:
                product = left.view(rank, -1).T @ _orthonormal(right.view(rank, -1).T).T
                vector[where] = product.clamp(-_LARGEST, _LARGEST).float()

        return vector


def _stack(name: str, shape: tuple[int, ...]) -> object:
    """Return the key of a tensor's stack: shape, factor and target module."""
    return shape, factor(name), target(name) if factor(name) else None


def _finest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return about the lowest step that `fits`, from one that does not, or is as fine as may be, to
    one that does."""
    while high - low > _CLOSE:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)

    return high


def _sizes(lengths: tuple[int, ...], ranks: list[int]) -> list[int]:
    """Return the lengths of all columns."""
    return [length for length, rank in zip(lengths, ranks, strict=True) for _ in range(rank)]


def _right_factors(x: Tensor) -> Tensor:
    """Return right singular vectors times singular values of x (rows, features): (features, min of
    both), rising."""
    if x.shape[0] <= x.shape[1]:
        return x.T.matmul(torch.linalg.eigh(x @ x.T).eigenvectors)
    values, vectors = torch.linalg.eigh(x.T @ x)
    return torch.mul(vectors, values.clamp_min(0).sqrt())


def _orthonormal(columns: Tensor) -> Tensor:
    """Return Q of the QR of (features, rank)."""
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _factors(
    stacks: list[Tensor], rights: list[Tensor], step: int, audible: int
) -> tuple[list[int], Blocks, Doubles]:
    """Return the rank of every stack, by step `audible`, and all columns: those of the right
    factors, then those of Z."""
    least = _AUDIBLE * 2.0 ** (audible / OCTAVE)
    kept = [right[:, right.square().mean(0).sqrt() >= least] for right in rights]
    ranks = [right.shape[1] for right in kept]
    columns = Blocks([n for right in kept for n in _sizes(right.shape[:1], [right.shape[1]])])
    values = np.concatenate([right.T.reshape(-1).numpy() for right in kept])
    decoded = torch.split(
        torch.from_numpy(columns.decoded(values, step)), [right.numel() for right in kept]
    )
    lefts = [
        (x @ _orthonormal(piece.view(rank, -1).T)).T.reshape(-1).numpy()
        for x, rank, piece in zip(stacks, ranks, decoded, strict=True)
        if rank
    ]
    sizes = [n for x, rank in zip(stacks, ranks, strict=True) for n in _sizes(x.shape[:1], [rank])]

    return ranks, Blocks([*columns.sizes.tolist(), *sizes]), np.concatenate([values, *lefts])
