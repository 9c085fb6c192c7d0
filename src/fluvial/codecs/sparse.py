"""Codecs that send some of the values: top-k by magnitude, random-k by a seed.

`Masked` is what codecs with entropy-coded positions share; ternary, in `sign`, is one too.
"""

import math
import struct
from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluvial.codecs import entropy
from fluvial.codecs.base import Codec, CodecSettings, RateSettings, body_room, frame_room
from fluvial.codecs.quantise import Floats, bf16, from_bf16, read_scales, steps, to_levels, to_numpy
from fluvial.errors import ConfigError, WireError
from fluvial.settings import EXACT
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout

Indices = NDArray[np.int64]

SEED = struct.Struct("<Q")
"""How a frame carries a seed."""


def slots(seed: int, count: int, total: int) -> Indices:
    """`count` different positions of `total`, in order, drawn from a u64 seed: those of the
    smallest words.

    Uses raw words of PCG64, which NumPy promises not to change, rather than `Generator.choice`,
    which it may.
    """
    words = np.random.PCG64(seed).random_raw(total)
    chosen = np.argpartition(words, count - 1)[:count] if count < total else np.arange(total)

    return np.sort(chosen).astype(np.int64)


def masked_least(layout: Layout, *, num_scales: int, mark: int = 0) -> int:
    """Bytes of a body of `Masked` that keeps one value, `mark` bytes before it included."""
    return mark + 2 * num_scales + len(layout.sizes) + 9


class Masked(Codec):
    """Keeps the values that weigh most, as many as the rate allows, and entropy-codes where they
    are.

    Body: bf16 magnitudes, `num_scales` of them, the most usual class of density (u8), and a stream:
    the class of every tensor (half octaves of the odds of being kept; 0: nothing kept), the masks
    of the tensors with kept values, then a symbol for each kept value.
    """

    alphabet: int
    """Different symbols for a kept value; all are taken to be equally frequent."""
    num_scales: int
    """Magnitudes in the body."""
    settings: RateSettings

    def __init__(
        self, settings: RateSettings, layout: Layout, *, num_scales: int, mark: int = 0
    ) -> None:
        """`mark` bytes of the body are somebody else's."""
        super().__init__(settings, layout)
        self.num_scales = num_scales
        self._sizes = np.array(layout.sizes, dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        self._room = (
            body_room(layout, settings.rate, masked_least(layout, num_scales=num_scales, mark=mark))
            - mark
        )

    @abstractmethod
    def weights(self, values: Floats) -> NDArray[np.floating]:
        """By what values compete (numel,); those that weigh 0 are never kept."""

    @abstractmethod
    def scales(self, kept: Floats, tensors: Indices) -> NDArray[np.uint16]:
        """bf16 patterns (num_scales,) from the kept values and the tensor that each is of."""

    @abstractmethod
    def to_symbols(self, kept: Floats, tensors: Indices, scales: Floats) -> NDArray[np.integer]:
        """Symbols of the kept values."""

    @abstractmethod
    def from_symbols(self, symbols: NDArray[np.int32], tensors: Indices, scales: Floats) -> Floats:
        """Inverse of `to_symbols`, but for what is lost."""

    def best(self, weights: NDArray[np.floating], tensors: Indices) -> int:  # noqa: ARG002 - for signs
        """How many of the heaviest values, sorted, to keep: for most codecs, all that fit."""
        return len(weights)

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        values = to_numpy(vector)
        weights = self.weights(values)
        order = self._heaviest(weights)
        tensors = self._tensors(order)
        number = self._most(tensors)
        number = self.best(weights[order[:number]], tensors[:number])

        while len(body := self._write(values, np.sort(order[:number]))) > self._room:
            number -= 1 + number // 1024
        return body

    def parse(self, reader: Reader) -> Tensor:
        scales = read_scales(reader, self.num_scales)
        centre = int(reader.number("B"))
        if centre >= _CLASSES:
            raise WireError(f"frame: density class {centre}; there are {_CLASSES}")

        stream = entropy.Stream(reader.take(reader.left))
        classes = stream.take(_class_frequencies(centre), len(self._sizes))
        kept = [np.zeros(0, dtype=np.int64)]

        for size, end, number in zip(self._sizes, self._ends, classes, strict=True):
            if number:
                kept.append(
                    np.flatnonzero(stream.take(_mask_counts(int(number)), int(size))) + (end - size)
                )

        where = np.concatenate(kept)
        symbols = stream.take(np.ones(self.alphabet, dtype=np.int64), len(where))
        stream.finish()
        vector = np.zeros(self.layout.numel, dtype=np.float32)

        with np.errstate(over="ignore"):
            vector[where] = self.from_symbols(symbols, self._tensors(where), scales)
        return torch.from_numpy(vector)

    def _tensors(self, positions: Indices) -> Indices:
        """The tensor that each position of the flattened update is in."""
        return np.searchsorted(self._ends, positions, side="right")

    def _heaviest(self, weights: NDArray[np.floating]) -> Indices:
        """Positions by falling weight, without those of weight 0; as many as could fit at all."""
        limit = min(int(8 * self._room / math.log2(self.alphabet)), int(np.count_nonzero(weights)))
        if limit == 0:
            return np.zeros(0, dtype=np.int64)
        chosen = np.sort(np.argpartition(-weights, limit - 1)[:limit])
        return chosen[np.argsort(-weights[chosen], kind="stable")]

    def _most(self, tensors: Indices) -> int:
        """How many of the heaviest values fit, by the entropy; `tensors` says which each is of."""
        room = 8 * (self._room - 2 * self.num_scales - 5)

        def fits(number: int) -> bool:
            kept = np.bincount(tensors[:number], minlength=len(self._sizes))
            bits = entropy.mask_bits(kept, self._sizes) + number * math.log2(self.alphabet)
            return bits + _class_bits(_densities(kept, self._sizes)) <= room

        if fits(len(tensors)):
            return len(tensors)

        low = 0
        high = len(tensors)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)

        return low

    def _write(self, values: Floats, where: Indices) -> bytes:
        tensors = self._tensors(where)
        scales = self.scales(values[where], tensors)
        classes = _densities(np.bincount(tensors, minlength=len(self._sizes)), self._sizes)
        mask = np.zeros(len(values), dtype=np.int32)
        mask[where] = 1
        centre = _usual(classes)
        parts: list[tuple[NDArray[np.integer], entropy.Counts]] = [
            (classes, _class_frequencies(centre))
        ]

        for size, end, number in zip(self._sizes, self._ends, classes, strict=True):
            if number:
                parts.append((mask[end - size : end], _mask_counts(int(number))))

        symbols = self.to_symbols(values[where], tensors, from_bf16(scales))
        parts.append((symbols, np.ones(self.alphabet, dtype=np.int64)))
        return scales.astype("<u2").tobytes() + struct.pack("<B", centre) + entropy.encode(parts)


_EVEN = 33
"""The class of density 1/2."""
_CLASSES = 2 * _EVEN


def _densities(kept: NDArray[np.integer], sizes: Indices) -> Indices:
    """The class of every tensor: 0 where nothing is kept, else half octaves of kept / not kept
    around `_EVEN`."""
    odds = np.log2(np.maximum(kept, 0.5)) - np.log2(np.maximum(sizes - kept, 0.5))
    classes = np.clip(np.rint(2 * odds) + _EVEN, 1, _CLASSES - 1)
    return cast(Indices, np.where(kept > 0, classes, 0).astype(np.int64))


def _mask_counts(number: int) -> entropy.Counts:
    """Frequencies of zero and one in a mask of class `number`."""
    odds = 2.0 ** ((number - _EVEN) / 2)
    return entropy.mask_counts(
        min(max(round(entropy.UNIT * odds / (1 + odds)), 1), entropy.UNIT - 1)
    )


def _usual(classes: Indices) -> int:
    """The most frequent class."""
    return int(np.bincount(classes, minlength=1).argmax())


def _class_frequencies(centre: int) -> entropy.Counts:
    """Frequencies of the classes of density: half as often with each class away from `centre`."""
    return (1 << 12 >> np.abs(np.arange(_CLASSES) - centre).clip(max=12)) + 8


def _class_bits(classes: Indices) -> float:
    """Bits of the classes in the stream."""
    frequencies = _class_frequencies(_usual(classes))
    return -float(np.log2(frequencies[classes] / frequencies.sum()).sum())


class _Steps(Masked):
    """Kept values in 255 whole steps, relative to the largest of all."""

    alphabet = 255

    def __init__(self, settings: RateSettings, layout: Layout, *, mark: int = 0) -> None:
        super().__init__(settings, layout, num_scales=1, mark=mark)

    def weights(self, values: Floats) -> NDArray[np.floating]:
        return np.abs(values)

    def scales(self, kept: Floats, tensors: Indices) -> NDArray[np.uint16]:  # noqa: ARG002 - one for all
        return steps(np.abs(kept).max(initial=0, keepdims=True), 127)

    def to_symbols(self, kept: Floats, tensors: Indices, scales: Floats) -> NDArray[np.integer]:  # noqa: ARG002
        return to_levels(kept, np.broadcast_to(scales, kept.shape), 127).astype(np.int32) + 127

    def from_symbols(self, symbols: NDArray[np.int32], tensors: Indices, scales: Floats) -> Floats:  # noqa: ARG002
        return cast(Floats, (symbols - 127).astype(np.float32) * scales)


class _Codebook(Masked):
    """Kept values as a sign and one of a few magnitudes, which are fitted to the message
    (Lloyd)."""

    def __init__(self, settings: RateSettings, layout: Layout, *, bits: int, mark: int = 0) -> None:
        super().__init__(settings, layout, num_scales=_num_scales(bits), mark=mark)
        self.alphabet = 1 << bits

    def weights(self, values: Floats) -> NDArray[np.floating]:
        return np.abs(values)

    def best(self, weights: NDArray[np.floating], tensors: Indices) -> int:  # noqa: ARG002 - one for all
        """With one magnitude for k values, (sum of them)^2 / k is what they capture; more can be
        worse."""
        if self.num_scales > 1 or not len(weights):
            return len(weights)
        sums = np.cumsum(weights / weights[0], dtype=np.float64)
        return int(np.argmax(sums**2 / np.arange(1, len(sums) + 1))) + 1

    def scales(self, kept: Floats, tensors: Indices) -> NDArray[np.uint16]:  # noqa: ARG002 - one for all
        """Centroids, rising."""
        if not len(kept):
            return np.zeros(self.num_scales, dtype=np.uint16)

        ordered = np.sort(np.abs(kept)).astype(np.float64)
        sums = np.concatenate([[0.0], np.cumsum(ordered)])
        centroids = ordered[
            ((np.arange(self.num_scales) + 0.5) / self.num_scales * len(ordered)).astype(np.int64)
        ]

        for _ in range(20):
            edges = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
            edges = np.concatenate([[0], edges, [len(ordered)]])
            counts = np.diff(edges)
            centroids = np.where(
                counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), centroids
            )

        return bf16(centroids)

    def to_symbols(self, kept: Floats, tensors: Indices, scales: Floats) -> NDArray[np.integer]:  # noqa: ARG002
        """The nearest magnitude, plus `num_scales` for positive values."""
        wide = scales.astype(np.float64)
        return np.searchsorted((wide[1:] + wide[:-1]) / 2, np.abs(kept)) + self.num_scales * (
            kept > 0
        )

    def from_symbols(self, symbols: NDArray[np.int32], tensors: Indices, scales: Floats) -> Floats:  # noqa: ARG002
        return np.concatenate([-scales, scales])[symbols]


ValueBits = Annotated[Literal["best", 1, 2, 4, 8], EXACT]
_BITS = (1, 2, 4, 8)


class LargestSettings(RateSettings):
    """The largest values, or coefficients, in a few bits each."""

    value_bits: ValueBits
    """Bits of what is kept; fewer leave room for more of it."""


class Largest(Codec):
    """The largest magnitudes of the whole update in so many bits each. Body: that of `Masked`.

    With value_bits="best" every number of bits is tried, and the one of least error goes before it
    as a byte.
    """

    value_bits: ValueBits

    def __init__(self, settings: RateSettings, layout: Layout, *, value_bits: ValueBits) -> None:
        super().__init__(settings, layout)
        self._coders: dict[int, Masked] = {}
        self._marked = value_bits == "best"

        for bits in _BITS if value_bits == "best" else (value_bits,):
            try:
                self._coders[bits] = _coder(settings, layout, bits=bits, mark=int(self._marked))
            except ConfigError:
                if not self._marked or bits == 1:
                    raise

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """At most 4 * values / rate."""
        assert isinstance(settings, LargestSettings)
        marked = settings.value_bits == "best"
        bits = 1 if settings.value_bits == "best" else settings.value_bits
        least = masked_least(layout, num_scales=_num_scales(bits), mark=int(marked))

        return frame_room(layout, settings.rate, least)

    def body(self, vector: Tensor, seed: int) -> bytes:
        if not self._marked:
            (coder,) = self._coders.values()
            return coder.body(vector, seed)

        bodies = {bits: coder.body(vector, seed) for bits, coder in self._coders.items()}
        bits = min(bodies, key=lambda bits: self._error(vector, bodies[bits], bits))
        return struct.pack("<B", bits) + bodies[bits]

    def parse(self, reader: Reader) -> Tensor:
        bits = int(reader.number("B")) if self._marked else next(iter(self._coders))
        if bits not in self._coders:
            raise WireError(
                f"frame: {bits} bits for each value; expected one of {sorted(self._coders)}"
            )

        return self._coders[bits].parse(reader)

    def _error(self, vector: Tensor, body: bytes, bits: int) -> float:
        return float((self._coders[bits].parse(Reader(body)).double() - vector).square().sum())


def _num_scales(bits: int) -> int:
    """Magnitudes that values of so many bits are written with."""
    return 1 if bits == 8 else 1 << bits - 1


def _coder(settings: RateSettings, layout: Layout, *, bits: int, mark: int) -> Masked:
    if bits == 8:
        return _Steps(settings, layout, mark=mark)
    return _Codebook(settings, layout, bits=bits, mark=mark)


class TopKSettings(LargestSettings):
    """The largest values, in a few bits each."""

    name: Literal["top_k"] = "top_k"
    """Which codec."""
    value_bits: ValueBits = 8
    """Bits of a kept value; fewer leave room for more values. 1 is best at 1/32 and below."""


class TopK(Largest):
    """The largest magnitudes of the whole update, not normalised: that captures the most energy."""

    code: ClassVar[int] = 5

    def __init__(self, settings: TopKSettings, layout: Layout) -> None:
        super().__init__(settings, layout, value_bits=settings.value_bits)


class RandomKSettings(RateSettings):
    """Values at random positions, bf16 each."""

    name: Literal["random_k"] = "random_k"
    """Which codec."""
    unbiased: Literal["yes", "no"] = "no"
    """Whether values are scaled by numel / k, so that the expectation over seeds is the update."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if (
            self.unbiased == "yes" and self.error_feedback
        ):  # feedback around a codec that enlarges diverges
            yield "unbiased='yes' diverges with error_feedback=true; choose one of the two"


class RandomK(Codec):
    """k values at positions that the seed in the frame gives; only seed and values travel.

    Body: seed u64, then k values in bf16, in order of position.
    """

    code: ClassVar[int] = 6
    exact: ClassVar[bool] = True
    settings: RandomKSettings

    def __init__(self, settings: RandomKSettings, layout: Layout) -> None:
        super().__init__(settings, layout)
        self.kept = _drawn(settings, layout)

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """The seed, and two bytes for each value that is sent."""
        assert isinstance(settings, RandomKSettings)
        return OVERHEAD + SEED.size + 2 * _drawn(settings, layout)

    def body(self, vector: Tensor, seed: int) -> bytes:
        seed %= 1 << 64
        gain = self.layout.numel / self.kept if self.settings.unbiased == "yes" else 1.0
        values = to_numpy(vector)[slots(seed, self.kept, self.layout.numel)].astype(np.float64)
        return SEED.pack(seed) + bf16(values * gain).astype("<u2").tobytes()

    def parse(self, reader: Reader) -> Tensor:
        seed = int(reader.number("Q"))
        values = from_bf16(reader.array("u2", self.kept))
        vector = np.zeros(self.layout.numel, dtype=np.float32)
        vector[slots(seed, self.kept, self.layout.numel)] = values
        return torch.from_numpy(vector)


def _drawn(settings: RandomKSettings, layout: Layout) -> int:
    """Values that are sent; raises `ConfigError` if not one fits."""
    room = body_room(layout, settings.rate, least=SEED.size + 2)
    return min((room - SEED.size) // 2, layout.numel)
