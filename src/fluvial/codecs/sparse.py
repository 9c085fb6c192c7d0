"""Codecs that send some of the values: top-k by magnitude, random-k by a seed.

`Masked` is what codecs with entropy-coded positions share; ternary, in `sign`, is one too.
"""

import math
import struct
from abc import abstractmethod
from typing import ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor

from fluvial.codecs import entropy
from fluvial.codecs.base import Codec, RateSettings, body_room
from fluvial.codecs.frame import Reader
from fluvial.codecs.quantise import Floats, bf16, from_bf16, read_scales, steps, to_levels, to_numpy
from fluvial.tensors import Layout

Indices = NDArray[np.int64]

SEED = struct.Struct("<Q")
"""How a frame carries a seed."""


def slots(seed: int, count: int, total: int) -> Indices:
    """`count` different positions of `total`, in order, drawn from a u64 seed: those of the smallest words.

    Uses raw words of PCG64, which NumPy promises not to change, rather than `Generator.choice`, which it may.
    """
    words = np.random.PCG64(seed).random_raw(total)
    chosen = np.argpartition(words, count - 1)[:count] if count < total else np.arange(total)
    return np.sort(chosen).astype(np.int64)


class Masked(Codec):
    """Keeps the values that weigh most, as many as the rate allows, and entropy-codes where they are.

    Body: a bf16 scale per tensor (0: nothing kept), a uint16 density for each tensor with a scale, and a
    stream: the masks of these tensors, then a symbol for each kept value.
    """

    alphabet: ClassVar[int]
    """Different symbols for a kept value; all are taken to be equally frequent."""
    settings: RateSettings

    def __init__(self, settings: RateSettings, layout: Layout) -> None:
        super().__init__(settings, layout)
        self._sizes = np.array(layout.sizes, dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        self._room = body_room(layout, settings.rate, least=4 * len(self._sizes) + 12)

    @abstractmethod
    def weights(self, values: Floats) -> NDArray[np.floating]:
        """By what values compete (numel,); those that weigh 0 are never kept."""

    @abstractmethod
    def scales(self, kept: Floats, tensors: Indices) -> NDArray[np.uint16]:
        """bf16 patterns (number of tensors,) from the kept values and the tensor that each is of."""

    @abstractmethod
    def to_symbols(self, kept: Floats, scales: Floats) -> NDArray[np.integer]:
        """Symbols of the kept values, each with its scale."""

    @abstractmethod
    def from_symbols(self, symbols: NDArray[np.int32], scales: Floats) -> Floats:
        """Inverse of `to_symbols`, but for what is lost."""

    def best(self, weights: NDArray[np.floating], tensors: Indices) -> int:  # noqa: ARG002 - for ternary
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
        scales = read_scales(reader, len(self._sizes))
        used = np.flatnonzero((scales > 0) & (self._sizes > 0))
        densities = reader.array("u2", len(used)).astype(np.int64)
        stream = entropy.Stream(reader.take(reader.left))
        kept = [np.zeros(0, dtype=np.int64)]
        for tensor, ones in zip(used, densities, strict=True):
            mask = stream.take(entropy.mask_counts(int(ones)), int(self._sizes[tensor]))
            kept.append(np.flatnonzero(mask) + (self._ends[tensor] - self._sizes[tensor]))
        where = np.concatenate(kept)
        symbols = stream.take(np.ones(self.alphabet, dtype=np.int64), len(where))
        stream.finish()
        vector = np.zeros(self.layout.numel, dtype=np.float32)
        with np.errstate(over="ignore"):
            vector[where] = self.from_symbols(symbols, scales[self._tensors(where)])
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
        room = self._room - 4 * len(self._sizes) - 4

        def fits(number: int) -> bool:
            kept = np.bincount(tensors[:number], minlength=len(self._sizes))
            return entropy.mask_bits(kept, self._sizes) + number * math.log2(self.alphabet) <= 8 * room

        if fits(len(tensors)):
            return len(tensors)
        low, high = 0, len(tensors)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _write(self, values: Floats, where: Indices) -> bytes:
        tensors = self._tensors(where)
        bits = self.scales(values[where], tensors)
        where = where[bits[tensors] > 0]
        tensors = self._tensors(where)
        kept = np.bincount(tensors, minlength=len(bits))
        used = np.flatnonzero(bits)
        densities = entropy.densities(kept[used], self._sizes[used])
        mask = np.zeros(len(values), dtype=np.int32)
        mask[where] = 1
        parts: list[tuple[NDArray[np.integer], entropy.Counts]] = [
            (mask[self._ends[t] - self._sizes[t] : self._ends[t]], entropy.mask_counts(int(ones)))
            for t, ones in zip(used, densities, strict=True)
        ]
        symbols = self.to_symbols(values[where], from_bf16(bits)[tensors])
        parts.append((symbols, np.ones(self.alphabet, dtype=np.int64)))
        return bits.astype("<u2").tobytes() + densities.astype("<u2").tobytes() + entropy.encode(parts)


class TopKSettings(RateSettings):
    """The largest values, 8 bits each."""

    name: Literal["top_k"] = "top_k"
    """Which codec."""


class TopK(Masked):
    """The largest magnitudes of the whole update, in 8 bits relative to the largest of their tensor."""

    code: ClassVar[int] = 5
    alphabet: ClassVar[int] = 255

    def weights(self, values: Floats) -> NDArray[np.floating]:
        """Magnitudes, not normalised: that captures the most energy."""
        return np.abs(values)

    def scales(self, kept: Floats, tensors: Indices) -> NDArray[np.uint16]:
        """The step of each tensor, largest magnitude / 127."""
        largest = np.zeros(len(self.layout.sizes), dtype=np.float32)
        np.maximum.at(largest, tensors, np.abs(kept))
        return steps(largest, 127)

    def to_symbols(self, kept: Floats, scales: Floats) -> NDArray[np.integer]:
        """Levels -127 to 127, plus 127."""
        return to_levels(kept, scales, 127).astype(np.int32) + 127

    def from_symbols(self, symbols: NDArray[np.int32], scales: Floats) -> Floats:
        """Steps times level."""
        return cast(Floats, (symbols - 127).astype(np.float32) * scales)


class RandomKSettings(RateSettings):
    """Values at random positions, bf16 each."""

    name: Literal["random_k"] = "random_k"
    """Which codec."""
    unbiased: Literal["yes", "no"] = "no"
    """Whether values are scaled by numel / k, so that the expectation over seeds is the update."""

    @model_validator(mode="after")
    def _contracts(self) -> Self:
        """Error feedback around a codec that enlarges what it sends diverges."""
        if self.unbiased == "yes" and self.error_feedback:
            raise ValueError("unbiased='yes' diverges with error_feedback=true; choose one of the two")
        return self


class RandomK(Codec):
    """k values at positions that the seed in the frame gives; only seed and values travel.

    Body: seed u64, then k values in bf16, in order of position.
    """

    code: ClassVar[int] = 6
    settings: RandomKSettings

    def __init__(self, settings: RandomKSettings, layout: Layout) -> None:
        super().__init__(settings, layout)
        room = body_room(layout, settings.rate, least=SEED.size + 2)
        self.kept = min((room - SEED.size) // 2, layout.numel)

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
