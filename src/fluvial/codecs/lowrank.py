"""powersgd: stacked matrices as a product of two thin ones.

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", NeurIPS 2019, arXiv 1905.13727. The paper approximates the best factors by one power
iteration and sends them in full. Ours takes the singular vectors, stacks the tensors of one kind
over the layers, since a LoRA factor is thin already, and quantises and entropy-codes both factors,
so that any rate can be met.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from fluvial.codecs.base import Codec, CodecSettings, RateSettings, frame_room
from fluvial.codecs.gaussian import COARSEST, FINEST, OCTAVE, Blocks, Doubles, lowest
from fluvial.codecs.learned.canvas import target
from fluvial.errors import WireError
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout, factor

_AUDIBLE = 0.6
"""A component is sent if its right factor, times the singular value, has an RMS of so many steps;
0.5 to 0.7 differ little. The loudest is sent in any case."""
_NEARBY = OCTAVE // 16
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
    stack, in Elias gamma code, then `Blocks` with a block for each column, right factors first.
    """

    code: ClassVar[int] = 24
    fills: ClassVar[bool] = False
    settings: PowerSgdSettings

    def __init__(self, settings: PowerSgdSettings, layout: Layout) -> None:
        super().__init__(settings, layout)
        starts = np.cumsum(layout.sizes, dtype=np.int64) - layout.sizes
        alike: dict[object, list[int]] = {}
        shapes: dict[object, tuple[int, int]] = {}

        for start, size, (name, shape) in zip(starts, layout.sizes, layout.shapes, strict=True):
            if size:
                key = _key(name, shape)
                alike.setdefault(key, []).append(int(start))
                last = shape[-1] if shape else 1
                shapes[key] = (size // last, last)

        self._stacks = [_Stack(tuple(those), shapes[key]) for key, those in alike.items()]
        self._room = self.frame_size(settings, layout) - OVERHEAD

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, PowerSgdSettings)
        sizes = zip(layout.shapes, layout.sizes, strict=True)
        stacks = {_key(name, shape) for (name, shape), size in sizes if size}
        return frame_room(layout, settings, least=len(_to_bits([0] * len(stacks))) + Blocks.least)

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """Code the flattened update (numel,); see `Codec.body`."""
        spectra = [_Spectrum.of(stack.taken_from(vector)) for stack in self._stacks]
        audible, step = _Search(spectra, self._room).steps()

        stride = 1

        while True:
            ranks, blocks, values = _sent(spectra, step, audible)
            data = _to_bits(ranks) + blocks.encode_at(values, step)
            excess = 8 * (len(data) - self._room)
            if excess <= 0:
                return data
            further = math.ceil(excess / blocks.slope(blocks.loudness(values), step))
            step = min(step + max(further, stride), COARSEST)
            audible = min(audible + stride - 1, COARSEST)
            stride = 2 * stride

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        ranks = _from_bits(reader, [min(each.rows, each.features) for each in self._stacks])
        rows = [stack.rows for stack in self._stacks]
        features = [stack.features for stack in self._stacks]
        values = torch.from_numpy(
            Blocks(_sizes(features, ranks) + _sizes(rows, ranks)).decode(reader)
        )
        pieces = torch.split(
            values, [n * rank for n, rank in zip(features + rows, ranks + ranks, strict=True)]
        )
        vector = torch.zeros(self.layout.numel)

        for stack, rank, right, left in zip(
            self._stacks, ranks, pieces, pieces[len(ranks) :], strict=False
        ):
            if rank:
                product = left.view(rank, -1).T @ _orthonormal(right.view(rank, -1)).T
                stack.put_into(vector, product.clamp(-_LARGEST, _LARGEST).float())

        return vector


def _key(name: str, shape: tuple[int, ...]) -> object:
    """Return what tensors of one stack have in common: shape, factor and target module."""
    return shape, factor(name), target(name) if factor(name) else None


def _sizes(lengths: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """Return the lengths of all columns."""
    return [length for length, rank in zip(lengths, ranks, strict=True) for _ in range(rank)]


def _to_bits(ranks: Sequence[int]) -> bytes:
    """Return ranks in the gamma code of Elias (1975), which has 1 bit for 0 and 3 for 1 and 2."""
    bits = "".join(f"{rank + 1:b}".zfill(2 * (rank + 1).bit_length() - 1) for rank in ranks)
    size = -(-len(bits) // 8)
    return int("0" + bits.ljust(8 * size, "0"), 2).to_bytes(size, "big")


def _from_bits(reader: Reader, limits: Sequence[int]) -> list[int]:
    """Return what `_to_bits` wrote; raises `WireError` for a rank above its limit."""
    bits = ""

    def take(count: int) -> str:
        nonlocal bits
        while len(bits) < count:
            bits += f"{reader.take(1)[0]:08b}"
        taken, bits = bits[:count], bits[count:]
        return taken

    ranks = []
    for limit in limits:
        zeros = 0
        while zeros <= limit.bit_length() and take(1) == "0":
            zeros += 1
        rank = int("1" + take(zeros), 2) - 1
        if rank > limit:
            raise WireError(f"frame: rank {rank} of a stack whose rank is at most {limit}")
        ranks.append(rank)

    if "1" in bits:
        raise WireError("frame: more ranks than stacks")

    return ranks


# -- matrices -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stack:
    """Where the tensors of one kind lie in the flattened update."""

    starts: tuple[int, ...]
    """First value of each."""
    shape: tuple[int, int]
    """The shape of each, as a matrix."""

    @property
    def rows(self) -> int:
        """Rows of the stack."""
        return len(self.starts) * min(self.shape)

    @property
    def features(self) -> int:
        """Columns of the stack."""
        return max(self.shape)

    def _matrices(self, vector: Tensor) -> list[Tensor]:
        """Return views of the tensors, features last."""
        size = self.shape[0] * self.shape[1]
        views = [vector[start : start + size].view(self.shape) for start in self.starts]
        return [view.T for view in views] if self.shape[0] > self.shape[1] else views

    def taken_from(self, vector: Tensor) -> Tensor:
        """Return a copy of the tensors in `vector` (numel,), one below the other: (rows,
        features)."""
        return torch.cat(self._matrices(vector))

    def put_into(self, vector: Tensor, x: Tensor) -> None:
        """Write x (rows, features) to the tensors in `vector` (numel,)."""
        matrices = self._matrices(vector)
        for matrix, part in zip(matrices, x.chunk(len(matrices)), strict=True):
            matrix.copy_(part)


@dataclass(frozen=True)
class _Spectrum:
    """A stack and its singular values; singular vectors are rows, computed when asked for."""

    x: Tensor
    """fp32 (rows, features)."""
    values: Tensor
    """Singular values, rising (min of both,)."""
    shorter: Tensor
    """Singular vectors of the shorter side (min of both, min of both)."""

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Return the decomposition of x (rows, features) through the smaller Gram matrix."""
        wide = x.double()
        found = torch.linalg.eigh(wide @ wide.T if x.shape[0] <= x.shape[1] else wide.T @ wide)
        return cls(x, found.eigenvalues.clamp_min(0).sqrt(), found.eigenvectors.T)

    @cached_property
    def loudness(self) -> Doubles:
        """log2 of the RMS of every right vector times its singular value."""
        loudness: Doubles = (self.values / self.x.shape[1] ** 0.5).log2().numpy()
        return loudness

    def rank(self, audible: int) -> int:
        """Return the number of components that are sent at a step."""
        return int((self.loudness >= _least(audible)).sum())

    def rights(self, rank: int) -> Tensor:
        """Return the loudest right vectors times their singular values (rank, features)."""
        if self.x.shape[0] <= self.x.shape[1]:
            return _last(self.shorter, rank) @ self.x.double()
        return _last(self.shorter, rank) * _last(self.values, rank)[:, None]

    def lefts(self, rank: int) -> Tensor:
        """Return the loudest left vectors times their singular values (rank, rows)."""
        if self.x.shape[0] <= self.x.shape[1]:
            return _last(self.shorter, rank) * _last(self.values, rank)[:, None]
        return _last(self.shorter, rank) @ self.x.double().T


def _last(rows: Tensor, count: int) -> Tensor:
    """Return the last rows, which are the loudest."""
    return rows[len(rows) - count :]


def _orthonormal(rows: Tensor) -> Tensor:
    """Return Q (features, rank) of the QR of what is given as rows (rank, features)."""
    basis: Tensor = torch.linalg.qr(rows.T).Q
    return basis


def _flat(matrices: Sequence[Tensor]) -> Doubles:
    """Return all values, row after row."""
    return np.concatenate([each.reshape(-1).numpy() for each in matrices])


def _sent(
    spectra: Sequence[_Spectrum], step: int, audible: int
) -> tuple[list[int], Blocks, Doubles]:
    """Return the rank of every stack, by step `audible`, and all columns: those of the right
    factors, then those of Z."""
    ranks = [each.rank(audible) for each in spectra]
    rights = [each.rights(rank) for each, rank in zip(spectra, ranks, strict=True)]
    values = _flat(rights)
    rows, features = zip(*(each.x.shape for each in spectra), strict=True)
    sizes = _sizes(features, ranks)
    decoded = torch.split(
        torch.from_numpy(Blocks(sizes).decoded(values, step)), [right.numel() for right in rights]
    )
    lefts = [
        (each.x.double() @ _orthonormal(piece.view(right.shape))).T
        for each, right, piece in zip(spectra, rights, decoded, strict=True)
        if len(right)
    ]

    return ranks, Blocks(sizes + _sizes(rows, ranks)), _flat([*rights, *lefts])


# -- how fine -------------------------------------------------------------------------------------


class _Search:
    """Finds how finely to quantise, and which components to send, in a given room.

    The bits of Gaussian columns follow from the singular values alone. What real columns take more
    is measured at one step, and is about the same at steps nearby.
    """

    def __init__(self, spectra: Sequence[_Spectrum], room: int) -> None:
        """Set the room of a body, in bytes."""
        self._spectra = spectra
        self._room = room
        ranks = [len(each.values) for each in spectra]
        rows, features = zip(*(each.x.shape for each in spectra), strict=True)
        self._features = np.array(_sizes(features, ranks))
        self._rows = np.array(_sizes(rows, ranks))
        self._rights = np.concatenate([each.loudness for each in spectra])
        self._lefts = self._rights + np.log2(self._features / self._rows) / 2
        self._low = Blocks(self._features.tolist()).finest(self._rights)
        loudest = OCTAVE * (float(self._rights.max(initial=-np.inf)) - math.log2(_AUDIBLE))
        self._high = math.floor(max(loudest, FINEST))
        """Step at which the loudest component is still sent."""

    def steps(self) -> tuple[int, int]:
        """Return the step by which components are sent or not, and that of the quantiser."""
        audible = min(self._finest(self._low, 0.0), self._high)
        _, more = self._measure(audible)
        audible = min(self._finest(self._low, more), self._high)
        # Where one more component would not fit, a finer step for those that do uses what is left.
        excess, more = self._measure(audible)
        finer = min(max(audible - OCTAVE // 2, self._low), audible)
        step = self._finest(finer, more, audible)
        low = max(step - _NEARBY, finer)

        return audible, lowest(lambda step: excess(step) <= 0, low, step + _NEARBY, _CLOSE)

    def _measure(self, audible: int) -> tuple[Callable[[int], float], float]:
        """Return the bits beyond the room by step of the columns as sent at `audible`, and how many
        more these are there than of Gaussian columns."""
        ranks, blocks, values = _sent(self._spectra, audible, audible)
        room = self._room - len(_to_bits(ranks))
        excess = partial(blocks.excess, values, room=room, loudness=blocks.loudness(values))
        return excess, excess(audible) - self._expected(audible, audible)

    def _finest(self, low: int, more: float, audible: int | None = None) -> int:
        """Return the lowest step, from `low` on, whose columns fit with so many bits more; without
        `audible`, components are sent by the same step."""

        def fits(step: int) -> bool:
            return self._expected(step, step if audible is None else audible) + more <= 0

        return lowest(fits, low, COARSEST)

    def _expected(self, step: int, audible: int) -> float:
        """Return the bits beyond the room, were the columns Gaussian."""
        sent = self._rights >= _least(audible)
        blocks = Blocks([*self._features[sent], *self._rows[sent]])
        loudness = np.concatenate([self._rights[sent], self._lefts[sent]])
        ranks = [each.rank(audible) for each in self._spectra]
        return blocks.expected_excess(loudness, step, self._room - len(_to_bits(ranks)))


def _least(audible: int) -> float:
    """Return the loudness from which on a component is sent, by its right vector."""
    return math.log2(_AUDIBLE) + audible / OCTAVE
