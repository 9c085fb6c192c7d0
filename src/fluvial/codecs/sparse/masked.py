"""The base of codecs that keep the heaviest values and entropy-code their positions."""

import math
import struct
from abc import abstractmethod
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluvial.codecs import entropy
from fluvial.codecs.base import Codec, RateSettings, body_room
from fluvial.codecs.quantise import Floats, from_bf16, read_scales, to_numpy
from fluvial.codecs.sparse.positions import Indices
from fluvial.errors import WireError
from fluvial.wire.frame import Reader
from fluvial.wire.tensors import Layout


def masked_least(layout: Layout, *, num_scales: int, mark: int = 0) -> int:
    """Return the bytes of a body of `Masked` that keeps one value, `mark` bytes before it
    included."""
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
        """Return `mark` bytes of the body are somebody else's."""
        super().__init__(settings, layout)
        self.num_scales = num_scales
        self._sizes = np.array(layout.sizes, dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        self._room = (
            body_room(layout, settings, masked_least(layout, num_scales=num_scales, mark=mark))
            - mark
        )

    @abstractmethod
    def weights(self, values: Floats) -> NDArray[np.floating]:
        """Return the weights by which values compete (numel,); those that weigh 0 are never
        kept."""

    @abstractmethod
    def scales(self, kept: Floats, tensors: Indices) -> NDArray[np.uint16]:
        """Return bf16 patterns (num_scales,) from the kept values and the tensor that each is
        of."""

    @abstractmethod
    def to_symbols(self, kept: Floats, tensors: Indices, scales: Floats) -> NDArray[np.integer]:
        """Return the symbols of the kept values."""

    @abstractmethod
    def from_symbols(self, symbols: NDArray[np.int32], tensors: Indices, scales: Floats) -> Floats:
        """Invert `to_symbols`, but for what is lost."""

    def best(
        self,
        weights: NDArray[np.floating],
        tensors: Indices,  # noqa: ARG002 - for signs
    ) -> int:
        """Return how many of the heaviest values, sorted, to keep: for most codecs, all that
        fit."""
        return len(weights)

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """Code the flattened update (numel,); see `Codec.body`."""
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
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        scales = read_scales(reader, self.num_scales)
        centre = int(reader.number("B"))
        if centre >= _CLASSES:
            raise WireError(f"frame: density class {centre}; there are {_CLASSES}")

        stream = entropy.Stream(reader.take(reader.left))
        classes = stream.take(_class_frequencies(centre), len(self._sizes))
        positions = [np.zeros(0, dtype=np.int64)]

        for size, end, number in zip(self._sizes, self._ends, classes, strict=True):
            if number:
                positions.append(
                    np.flatnonzero(stream.take(_mask_counts(int(number)), int(size))) + (end - size)
                )

        where = np.concatenate(positions)
        symbols = stream.take(np.ones(self.alphabet, dtype=np.int64), len(where))
        stream.finish()
        vector = np.zeros(self.layout.numel, dtype=np.float32)

        with np.errstate(over="ignore"):
            vector[where] = self.from_symbols(symbols, self._tensors(where), scales)
        return torch.from_numpy(vector)

    def _tensors(self, positions: Indices) -> Indices:
        """Return the tensor that each position of the flattened update is in."""
        return np.searchsorted(self._ends, positions, side="right")

    def _heaviest(self, weights: NDArray[np.floating]) -> Indices:
        """Return the positions by falling weight, without those of weight 0; as many as could fit
        at all."""
        limit = min(int(8 * self._room / math.log2(self.alphabet)), int(np.count_nonzero(weights)))
        if limit == 0:
            return np.zeros(0, dtype=np.int64)
        chosen = np.sort(np.argpartition(-weights, limit - 1)[:limit])
        return chosen[np.argsort(-weights[chosen], kind="stable")]

    def _most(self, tensors: Indices) -> int:
        """Return how many of the heaviest values fit, by the entropy; `tensors` says which each is
        of."""
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
        coded: list[tuple[NDArray[np.integer], entropy.Counts]] = [
            (classes, _class_frequencies(centre))
        ]

        for size, end, number in zip(self._sizes, self._ends, classes, strict=True):
            if number:
                coded.append((mask[end - size : end], _mask_counts(int(number))))

        symbols = self.to_symbols(values[where], tensors, from_bf16(scales))
        coded.append((symbols, np.ones(self.alphabet, dtype=np.int64)))
        return scales.astype("<u2").tobytes() + struct.pack("<B", centre) + entropy.encode(coded)


_EVEN = 33
"""The class of density 1/2."""
_CLASSES = 2 * _EVEN


def _densities(kept: NDArray[np.integer], sizes: Indices) -> Indices:
    """Return the class of every tensor: 0 where nothing is kept, else half octaves of kept / not
    kept around `_EVEN`."""
    odds = np.log2(np.maximum(kept, 0.5)) - np.log2(np.maximum(sizes - kept, 0.5))
    classes = np.clip(np.rint(2 * odds) + _EVEN, 1, _CLASSES - 1)
    return cast(Indices, np.where(kept > 0, classes, 0).astype(np.int64))


def _mask_counts(number: int) -> entropy.Counts:
    """Return the frequencies of zero and one in a mask of class `number`."""
    odds = 2.0 ** ((number - _EVEN) / 2)
    return entropy.mask_counts(
        min(max(round(entropy.UNIT * odds / (1 + odds)), 1), entropy.UNIT - 1)
    )


def _usual(classes: Indices) -> int:
    """Return the most frequent class."""
    return int(np.bincount(classes, minlength=1).argmax())


def _class_frequencies(centre: int) -> entropy.Counts:
    """Return the frequencies of the classes of density: half as often with each class away from
    `centre`."""
    return (1 << 12 >> np.abs(np.arange(_CLASSES) - centre).clip(max=12)) + 8


def _class_bits(classes: Indices) -> float:
    """Return the bits of the classes in the stream."""
    frequencies = _class_frequencies(_usual(classes))
    return -float(np.log2(frequencies[classes] / frequencies.sum()).sum())
