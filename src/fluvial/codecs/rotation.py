"""Codecs behind a random rotation, after which any update looks Gaussian: hadamard and eden.

hadamard  Every tensor is rotated, then quantised with one step for everything (which is reverse water-filling) and
          entropy-coded by the table of N(0, 1) at its RMS.
eden      Vargaftik, Ben Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher, "EDEN: Communication-Efficient and
          Robust Distributed Mean Estimation for Federated Learning", ICML 2022, arXiv 2108.08842. The whole update
          is rotated and quantised; one scale makes the expectation over rotations the update itself.

A vector of n values is rotated by random signs and Hadamard matrices on its first and on its last
2^k values, 2^k <= n < 2^(k + 1), so nothing is padded. Nothing here learns from data.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from torch import Tensor

from fluvial.codecs import entropy
from fluvial.codecs.base import Codec, CodecSettings, RateSettings, frame_room
from fluvial.codecs.sparse import slots
from fluvial.errors import WireError
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

OCTAVE = 1500
"""Codes of a step per factor of 2."""
_CLASS = 4
"""Classes of loudness (RMS over step) per factor of 2."""
_UNIT = 12
"""The class whose RMS is one step; class 0 is silent, class 1 almost so."""
_CLASSES = _UNIT + 6 * _CLASS + 1
_NUMBERS = np.arange(_CLASSES)
_LEVELS = 255
_TOTAL = 1 << 22
COARSEST = (1 << 24) // _CLASSES // 2 - 1
FINEST = -COARSEST
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Table:
    """How values of one class of loudness are quantised; levels -limit to limit, in steps."""

    limit: int
    frequencies: entropy.Counts
    """Of the levels, (2 limit + 1,)."""
    centroids: Doubles
    """What the levels stand for (2 limit + 1,), in steps."""

    @cached_property
    def model(self) -> Any:
        """The entropy coder's view of `frequencies`."""
        return entropy.model(self.frequencies)


@cache
def tables() -> tuple[Table, ...]:
    """The table of every class, for values of N(0, 1) rounded to whole steps; the silent class has
    level 0 only."""
    made = [Table(0, np.ones(1, dtype=np.int64), np.zeros(1))]
    for number in range(1, _CLASSES):
        sigma = 2.0 ** ((number - _UNIT) / _CLASS)
        limit = min(_LEVELS, int(16 * sigma) + 2)
        edges = np.append(np.arange(limit) + 0.5, np.inf) / sigma
        mass = ndtr(-edges[:-1]) - ndtr(-edges[1:])
        first = (
            sigma
            * (np.exp(-(edges[:-1] ** 2) / 2) - np.exp(-(edges[1:] ** 2) / 2))
            / np.sqrt(2 * np.pi)
        )
        lowest = np.arange(limit) + 0.5
        centres = np.divide(first, mass, out=lowest.copy(), where=mass > 1e-12).clip(
            lowest, lowest + 0.5
        )
        frequencies = np.rint(
            np.concatenate([mass[::-1], [1 - 2 * mass.sum()], mass]) * _TOTAL
        ).astype(np.int64)
        made.append(
            Table(limit, frequencies.clip(1), np.concatenate([-centres[::-1], [0.0], centres]))
        )

    return tuple(made)


@cache
def _costs() -> Doubles:
    """Bits of a magnitude, sign included (classes, 256)."""
    costs = np.zeros((_CLASSES, _LEVELS + 1))
    for row, table in zip(costs, tables(), strict=True):
        row[: table.limit + 1] = -np.log2(
            table.frequencies[table.limit :] / table.frequencies.sum()
        )

    return costs


@cache
def _rates() -> Doubles:
    """Bits of a value of N(0, 1), by class (classes,)."""
    rates = []
    for table in tables():
        share = table.frequencies / table.frequencies.sum()
        rates.append(-float((share * np.log2(share)).sum()))

    return np.array(rates)


class Blocks:
    """Codes blocks of zero-mean values that are about Gaussian, each of its own RMS, into a given
    number of bytes.

    Bytes: step (1/1500 octave) and the most usual class as one number (u24), and a stream: the
    class of every block, then the levels of each block that is not silent. No value decodes to more
    than twice itself, so coding contracts.
    """

    least: ClassVar[int] = 11
    """Bytes that suffice for silence, and one more for each block."""
    least_of_one: ClassVar[int] = 7
    """Bytes that suffice for silence of one block."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Values in each block."""
        self.sizes = np.array(sizes, dtype=np.int64)
        self._ends = np.cumsum(self.sizes)
        self._spans = list(zip(self.sizes.tolist(), self._ends.tolist(), strict=True))

    def encode(self, values: Doubles, room: int) -> bytes:
        """At most `room` bytes for `values` (sum of sizes,), with about the finest step that
        fits."""
        loudness = self.loudness(values)
        step = self.expected_step(loudness, room)
        excess = self.excess(values, step, room, loudness=loudness)

        if excess < 0:
            step += int(excess / self.slope(loudness, step))

        stride = 1
        while True:
            step = min(max(step, self.finest(loudness)), COARSEST)
            excess = self.excess(values, step, room, loudness=loudness)
            if excess <= 0 or step == COARSEST:
                data = self.encode_at(values, step, loudness=loudness)
                if len(data) <= room:
                    return data

            assert step < COARSEST, "silence fits, as the constructor of the codec checked"
            step += max(int(excess / self.slope(loudness, step)), stride)
            stride *= 2

    def encode_at(self, values: Doubles, step: int, *, loudness: Doubles | None = None) -> bytes:
        """`values` with a given step, whatever it takes; their `loudness` saves time."""
        classes, levels = self._quantise(values, step, loudness)
        centre = _centre(classes)
        head = ((step - FINEST) * _CLASSES + centre).to_bytes(3, "little")
        parts: list[tuple[NDArray[np.integer], Any]] = []

        if len(classes):
            parts.append((classes, entropy.model(_class_frequencies(centre))))

        for number, start, end in self._runs(classes):
            table = tables()[number]
            parts.append((levels[start:end] + table.limit, table.model))

        return head + entropy.encode_with(parts)

    def decoded(self, values: Doubles, step: int) -> Doubles:
        """What `decode` makes of `encode_at`."""
        classes, levels = self._quantise(values, step, None)
        result = np.zeros(len(values))

        for number, start, end in self._runs(classes):
            table = tables()[number]
            result[start:end] = table.centroids.take(levels[start:end] + table.limit)

        result *= 2.0 ** (step / OCTAVE)
        return result

    def _runs(self, classes: Ints) -> list[tuple[int, int, int]]:
        """Class, start and end of all values that are not silent; neighbours of one class are one
        run."""
        edges = np.concatenate([[0], np.flatnonzero(np.diff(classes)) + 1, [len(classes)]])
        bounds = np.concatenate([[0], self._ends])[edges]
        runs = zip(
            classes[edges[:-1]] if len(classes) else [], bounds[:-1], bounds[1:], strict=False
        )

        return [
            (int(number), int(start), int(end))
            for number, start, end in runs
            if number and end > start
        ]

    def excess(
        self, values: Doubles, step: int, room: int, *, loudness: Doubles | None = None
    ) -> float:
        """Bits by which `encode_at` goes beyond `room` bytes."""
        classes, levels = self._quantise(values, step, loudness)
        cells = np.abs(levels)
        cells += np.repeat((classes * (_LEVELS + 1)).astype(np.int32), self.sizes)
        counts = np.bincount(cells, minlength=_costs().size)
        frequencies = _class_frequencies(_centre(classes))
        side = -np.log2(frequencies[classes] / frequencies.sum()).sum()

        return float(counts @ _costs().ravel() + side) - 8 * (room - self.least + 4)

    def loudness(self, values: Doubles) -> Doubles:
        """log2 of the RMS of every block; -inf for silence."""
        pieces = ((values[end - n : end], n) for n, end in self._spans)
        power = np.array([float(piece @ piece) / n if n else 0.0 for piece, n in pieces])

        with np.errstate(divide="ignore"):
            return cast(Doubles, np.log2(power) / 2)

    def expected_step(self, loudness: Doubles, room: int) -> int:
        """The step at which Gaussian blocks take `room` bytes."""
        low = self.finest(loudness)
        high = COARSEST

        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high)
                if self._expected(loudness, middle) > 8 * (room - 7)
                else (low, middle)
            )

        return high

    def slope(self, loudness: Doubles, step: int) -> float:
        """Bits that one code of the step is worth to Gaussian blocks."""
        half = OCTAVE // 16
        return max(
            self._expected(loudness, step - half) - self._expected(loudness, step + half), 1.0
        ) / (2 * half)

    def decode(self, reader: Reader) -> Doubles:
        """Values that `encode` coded, read to the end; raises `WireError`."""
        step, centre = divmod(int.from_bytes(reader.take(3), "little"), _CLASSES)
        step += FINEST

        if step > COARSEST:
            raise WireError(f"frame: step {step}; the coarsest is {COARSEST}")

        stream = entropy.Stream(reader.take(reader.left))
        classes = stream.take(_class_frequencies(centre), len(self.sizes))
        values = np.zeros(int(self.sizes.sum()))

        for number, start, end in self._runs(classes.astype(np.int64)):
            table = tables()[number]
            values[start:end] = table.centroids.take(stream.take_with(table.model, end - start))

        stream.finish()
        values *= 2.0 ** (step / OCTAVE)
        return values

    def _expected(self, loudness: Doubles, step: int) -> float:
        """Bits of Gaussian blocks."""
        rates = np.interp(_CLASS * (loudness - step / OCTAVE) + _UNIT, _NUMBERS, _rates())
        return float(self.sizes @ rates) + 3 * len(self.sizes)

    def finest(self, loudness: Doubles) -> int:
        """The finest step: the loudest block just has a class."""
        loudest = loudness.max(initial=-np.inf)
        if not np.isfinite(loudest):
            return COARSEST - 1
        return int(np.clip(np.ceil((loudest - 6) * OCTAVE), FINEST, COARSEST - 1))

    def _quantise(
        self, values: Doubles, step: int, loudness: Doubles | None
    ) -> tuple[Ints, NDArray[np.int32]]:
        """Class of every block, level of every value."""
        loudness = self.loudness(values) if loudness is None else loudness
        position = np.maximum(_CLASS * (loudness - step / OCTAVE) + _UNIT, 0)
        classes = np.minimum(np.rint(position), _CLASSES - 1).astype(np.int64)
        limits = np.repeat(_limits()[classes], self.sizes)
        levels = values * 2.0 ** (-step / OCTAVE)
        np.rint(levels, out=levels)
        np.minimum(levels, limits, out=levels)
        np.maximum(levels, np.negative(limits, out=limits), out=levels)

        return classes, levels.astype(np.int32)


@cache
def _limits() -> Doubles:
    """Largest level of every class."""
    return np.array([table.limit for table in tables()], dtype=np.float64)


def _centre(classes: Ints) -> int:
    return int(np.bincount(classes, minlength=1).argmax())


def _class_frequencies(centre: int) -> entropy.Counts:
    """Frequencies of the classes: half as often with each class away from `centre`."""
    return (1 << 12 >> np.abs(np.arange(_CLASSES) - centre).clip(max=12)) + 8


class Rotation:
    """A random orthonormal map of each row of (rows, size), drawn from a seed."""

    def __init__(self, seed: int, rows: int, size: int) -> None:
        self._half, self._power = size // 2, 1 << size.bit_length() - 1
        kinds = 1 if size == self._power else 2
        words = np.random.PCG64(seed).random_raw(-(-kinds * rows * size // 64)).astype("<u8")
        bits = np.unpackbits(words.view(np.uint8), count=kinds * rows * size).view(np.int8)
        signs = torch.from_numpy(1 - 2 * bits).view(kinds, rows, size)
        self._before = signs[0]
        self._between = signs[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x (rows, size), fp64 or fp32."""
        x = self._butterfly(x * self._before)
        first = torch.cat([_hadamard(x[:, : self._power]), x[:, self._power :]], dim=1)

        if x.shape[1] == self._power:
            return first

        first = first * self._between
        rest = x.shape[1] - self._power
        return torch.cat([first[:, :rest], _hadamard(first[:, rest:])], dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        """Undo `forward`."""
        rest = z.shape[1] - self._power
        if rest:
            z = torch.cat([z[:, :rest], _hadamard(z[:, rest:])], dim=1) * self._between
        x = torch.cat([_hadamard(z[:, : self._power]), z[:, self._power :]], dim=1)
        return self._butterfly(x).mul(self._before)

    def _butterfly(self, x: Tensor) -> Tensor:
        """Sums and differences of the halves, so that both have the same energy; its own
        inverse."""
        if x.shape[1] == self._power:
            return x

        left = x[:, : self._half]
        middle = x[:, self._half : -self._half]
        right = x[:, -self._half :]

        return torch.cat([(left + right).div(2**0.5), middle, (left - right).div(2**0.5)], dim=1)


@cache
def _sylvester(size: int, dtype: torch.dtype) -> Tensor:
    """The orthonormal Hadamard matrix (size, size); `size` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.div(size**0.5).to(dtype)


def _hadamard(x: Tensor) -> Tensor:
    """Every row of x (rows, size) times the orthonormal Hadamard matrix; `size` is a power of
    two."""
    rows, size = x.shape
    left = size

    while left > 1:
        radix = min(left, 32)
        x = x.reshape(rows, radix, size // radix).transpose(1, 2) @ _sylvester(radix, x.dtype)
        left //= radix

    return x.reshape(rows, size)


class HadamardSettings(RateSettings):
    """Rotated values, quantised with one step and entropy-coded."""

    name: Literal["hadamard"] = "hadamard"
    """Which codec."""


class Hadamard(Codec):
    """A randomised Hadamard rotation of every tensor and an entropy-coded scalar quantiser for
    Gaussians.

    Body: seed (u32), then `Blocks` with a block for each tensor.
    """

    code: ClassVar[int] = 14
    settings: HadamardSettings

    def __init__(self, settings: HadamardSettings, layout: Layout) -> None:
        super().__init__(settings, layout)
        self._blocks = Blocks(layout.sizes)
        self._room = self.frame_size(settings, layout) - OVERHEAD
        self._alike: dict[int, list[int]] = {}

        for index, size in enumerate(layout.sizes):
            if size:
                self._alike.setdefault(size, []).append(index)

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """At most 4 * values / rate."""
        assert isinstance(settings, HadamardSettings)
        return frame_room(layout, settings.rate, least=4 + Blocks.least + len(layout.sizes))

    def body(self, vector: Tensor, seed: int) -> bytes:
        seed %= 1 << 32
        rotated = self._rotate(vector, seed, back=False).double()
        return struct.pack("<I", seed) + self._blocks.encode(rotated.numpy(), self._room - 4)

    def parse(self, reader: Reader) -> Tensor:
        seed = int(reader.number("I"))
        values = self._rotate(torch.from_numpy(self._blocks.decode(reader)), seed, back=True)
        return values.clamp(-_LARGEST, _LARGEST).float()

    def _rotate(self, vector: Tensor, seed: int, *, back: bool) -> Tensor:
        """Every tensor rotated; in fp32, unless sums would end where fp32 ends."""
        large = float(torch.linalg.vector_norm(vector, ord=float("inf"))) > _LARGEST / 2**32
        pieces = list(
            torch.split(vector.double() if large else vector.float(), list(self.layout.sizes))
        )

        for number, size in enumerate(sorted(self._alike)):
            alike = self._alike[size]
            rotation = Rotation(seed + number, len(alike), size)
            stacked = torch.stack([pieces[index] for index in alike])
            turned = rotation.inverse(stacked) if back else rotation.forward(stacked)

            for index, row in zip(alike, turned, strict=True):
                pieces[index] = row

        return torch.cat(pieces)


class EdenSettings(RateSettings):
    """Rotated values, quantised, with a scale that makes them unbiased."""

    name: Literal["eden"] = "eden"
    """Which codec."""
    unbiased: Literal["yes", "no"] = "yes"
    """Whether the expectation over seeds is the update; "no" takes the scale of least error."""
    levels: Literal["entropy", "fixed"] = "entropy"
    """Entropy-coded whole steps, or the paper's Lloyd-Max levels of 1 to 8 bits with sampling under
    1 bit."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if (
            self.unbiased == "yes" and self.error_feedback
        ):  # feedback around a codec that enlarges diverges
            yield "unbiased='yes' diverges with error_feedback=true; choose one of the two"


class Eden(Codec):
    """EDEN: rotation (two, ours), quantiser, and the scale ||x||^2 / <R x, Q(R x)> (theorem 2.1
    there: unbiased).

    Body: seed (u32), scale (f4), tensors that are not zero (a byte 0 for all, else 1 and a bit for
    each), then either `Blocks` with one block, or a stream of level numbers. Zero tensors take no
    part in the rotation.
    """

    code: ClassVar[int] = 15
    settings: EdenSettings

    def __init__(self, settings: EdenSettings, layout: Layout) -> None:
        super().__init__(settings, layout)
        self._sizes = np.array(layout.sizes, dtype=np.int64)
        self._bitmap = -(-len(self._sizes) // 8)
        self._room = self.frame_size(settings, layout) - OVERHEAD

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """At most 4 * values / rate."""
        assert isinstance(settings, EdenSettings)
        bitmap = -(-len(layout.sizes) // 8) if len(layout.sizes) > 1 else 0
        return frame_room(layout, settings.rate, least=9 + bitmap + Blocks.least_of_one)

    def body(self, vector: Tensor, seed: int) -> bytes:
        seed %= 1 << 32
        ends = np.cumsum(self._sizes)
        values = vector.double()
        live = np.array(
            [
                bool(values[end - size : end].any())
                for size, end in zip(self._sizes, ends, strict=True)
            ]
        )
        head = b"\0" if live.all() else b"\1" + np.packbits(live, bitorder="little").tobytes()
        x = values[torch.from_numpy(np.repeat(live, self._sizes))]

        if not len(x):
            return struct.pack("<If", seed, 0) + head

        once, again = _twice(seed, len(x))
        z = again.forward(once.forward(x[None]))[0].numpy()
        room = self._room - 8 - len(head)

        if self.settings.levels == "entropy":
            blocks = Blocks([len(z)])
            data = blocks.encode(z, room)
            levels = blocks.decode(Reader(data))
        else:
            data, levels = self._fixed(z, seed, room)

        product = float(z @ levels)
        energy = float(z @ z if self.settings.unbiased == "yes" else levels @ levels)
        if self.settings.unbiased == "yes":
            scale = energy / product if product > 0 else 0.0
        else:
            scale = product / energy if energy > 0 else 0.0

        return struct.pack("<If", seed, min(scale, _LARGEST)) + head + data

    def parse(self, reader: Reader) -> Tensor:
        seed = int(reader.number("I"))
        scale = float(reader.number("f"))
        some = int(reader.number("B"))

        if not (0 <= scale < float("inf") and some <= 1):
            raise WireError(f"frame: scale {scale}, mark of zero tensors {some}")

        live = np.ones(len(self._sizes), dtype=bool)
        if some:
            bits = reader.array("u1", self._bitmap).astype(np.uint8)
            live = np.unpackbits(bits, count=len(live), bitorder="little").astype(bool)

        chosen = torch.from_numpy(np.repeat(live, self._sizes))
        count = int(chosen.sum())
        vector = torch.zeros(self.layout.numel)

        if count:
            room = self._room - 9 - (self._bitmap if some else 0)
            if self.settings.levels == "entropy":
                levels = Blocks([count]).decode(reader)
            else:
                levels = self._read_fixed(reader, count, seed, room)

            once, again = _twice(seed, count)
            x = once.inverse(again.inverse(torch.from_numpy(levels)[None]))[0] * scale
            vector[chosen] = x.clamp(-_LARGEST, _LARGEST).float()

        return vector

    def _shares(self, count: int, seed: int, room: int) -> list[tuple[int, Ints]]:
        """Bits of the levels and the positions, of `count`, that have levels of so many bits."""
        bits = 32 * max(room // 4 - 1, 0)
        least = min(bits // count, _MOST_BITS)
        more = (
            slots(seed + _SLOTS, min(bits - least * count, count), count)
            if least < _MOST_BITS
            else np.zeros(0, np.int64)
        )
        fewer = np.ones(count, dtype=bool)
        fewer[more] = False

        return [(least, np.flatnonzero(fewer)), (least + 1, more)]

    def _fixed(self, z: Doubles, seed: int, room: int) -> tuple[bytes, Doubles]:
        """The stream of level numbers, and what they stand for in units of the RMS."""
        rms = float(np.sqrt(z @ z / len(z)))
        levels = np.zeros(len(z))
        parts = []

        for bits, where in self._shares(len(z), seed, room):
            table = lloyd_max(bits)
            numbers = np.searchsorted((table[1:] + table[:-1]) / 2, z[where] / rms)
            levels[where] = table[numbers]
            parts.append((numbers, np.ones(len(table), dtype=np.int64)))

        return entropy.encode(parts), levels

    def _read_fixed(self, reader: Reader, count: int, seed: int, room: int) -> Doubles:
        """Inverse of `_fixed`."""
        stream = entropy.Stream(reader.take(reader.left))
        levels = np.zeros(count)

        for bits, where in self._shares(count, seed, room):
            table = lloyd_max(bits)
            levels[where] = table[stream.take(np.ones(len(table), dtype=np.int64), len(where))]

        stream.finish()
        return levels


_MOST_BITS = 8
_AGAIN = 1 << 32
_SLOTS = 2 << 32
"""Added to the seed for the second rotation and for the positions that are sampled."""


def _twice(seed: int, count: int) -> tuple[Rotation, Rotation]:
    """Two rotations of one row; after one alone, a few large values leave a bias that 2,000 seeds
    show."""
    return Rotation(seed, 1, count), Rotation(seed + _AGAIN, 1, count)


@cache
def lloyd_max(bits: int) -> Doubles:
    """The 2^bits levels of least mean squared error for N(0, 1), rising; for no bits, 0."""
    if bits == 0:
        return np.zeros(1)

    size = 1 << bits
    levels = 3**0.5 * ndtri(
        (np.arange(size) + 0.5) / size
    )  # Panter-Dite: density to the power of 1/3
    for _ in range(2000):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        levels = -np.diff(np.exp(-(edges**2) / 2)) / (2 * np.pi) ** 0.5 / np.diff(ndtr(edges))
        levels = (levels - levels[::-1]) / 2

    return cast(Doubles, levels)
