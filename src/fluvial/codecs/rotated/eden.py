"""Codec `eden`: the whole update is rotated and quantised; one scale makes it unbiased.

Vargaftik, Ben Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher, "EDEN: Communication-Efficient
and Robust Distributed Mean Estimation for Federated Learning", ICML 2022, arXiv 2108.08842. The
expectation over rotations is the update itself.
"""

import struct
from collections.abc import Iterator
from functools import cache
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from fluvial.codecs import entropy
from fluvial.codecs.base import (
    CodecSettings,
    RatedCodec,
    RateSettings,
    SnrDrivenSettings,
    frame_room,
)
from fluvial.codecs.gaussian import Blocks, Doubles, Ints
from fluvial.codecs.rotated.rotation import LARGEST_FP32, Rotation
from fluvial.codecs.sparse.positions import slots
from fluvial.errors import WireError
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout

_MOST_BITS = 8
_AGAIN = 1 << 32
_SLOTS = 2 << 32
"""Added to the seed for the second rotation and for the positions that are sampled."""


class EdenSettings(RateSettings, SnrDrivenSettings):
    """Rotated values, quantised, with a scale that makes them unbiased.

    Bytes per value: 4 / rate. Lost: nothing on average over seeds; more than with the others in one
    update.
    """

    name: Literal["eden"] = "eden"
    """Name of the codec."""
    unbiased: Literal["yes", "no"] = "yes"
    """Scale of the values: "yes" makes the expectation over seeds the update, "no" takes the scale
    of least error."""
    levels: Literal["entropy", "fixed"] = "entropy"
    """Entropy-coded whole steps, or the paper's Lloyd-Max levels of 1 to 8 bits with sampling under
    1 bit."""

    @property
    def without_bias(self) -> bool:
        """See `CodecSettings.without_bias`."""
        return self.unbiased == "yes"

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        yield from super().conflicts()
        if (
            self.unbiased == "yes" and self.error_feedback
        ):  # feedback around a codec that enlarges diverges
            yield "unbiased='yes' diverges with error_feedback=true; choose one of the two"


class Eden(RatedCodec):
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
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, EdenSettings)
        bitmap = -(-len(layout.sizes) // 8) if len(layout.sizes) > 1 else 0
        return frame_room(layout, settings, least=9 + bitmap + Blocks.least_of_one)

    def body(self, vector: Tensor, seed: int) -> bytes:
        """Code the flattened update (numel,); see `Codec.body`."""
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

        return struct.pack("<If", seed, min(scale, LARGEST_FP32)) + head + data

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
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
            vector[chosen] = x.clamp(-LARGEST_FP32, LARGEST_FP32).float()

        return vector

    def _shares(self, count: int, seed: int, room: int) -> list[tuple[int, Ints]]:
        """Return the bits of the levels and the positions, of `count`, that have levels of so many
        bits."""
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
        """Return the stream of level numbers, and what they stand for in units of the RMS."""
        rms = float(np.sqrt(z @ z / len(z)))
        levels = np.zeros(len(z))
        coded = []

        for bits, where in self._shares(len(z), seed, room):
            levels_of = lloyd_max(bits)
            numbers = np.searchsorted((levels_of[1:] + levels_of[:-1]) / 2, z[where] / rms)
            levels[where] = levels_of[numbers]
            coded.append((numbers, np.ones(len(levels_of), dtype=np.int64)))

        return entropy.encode(coded), levels

    def _read_fixed(self, reader: Reader, count: int, seed: int, room: int) -> Doubles:
        """Invert `_fixed`."""
        stream = entropy.Stream(reader.take(reader.left))
        levels = np.zeros(count)

        for bits, where in self._shares(count, seed, room):
            levels_of = lloyd_max(bits)
            levels[where] = levels_of[
                stream.take(np.ones(len(levels_of), dtype=np.int64), len(where))
            ]

        stream.finish()
        return levels


def _twice(seed: int, count: int) -> tuple[Rotation, Rotation]:
    """Return two rotations of one row; after one alone, a few large values leave a bias that 2,000
    seeds show."""
    return Rotation(seed, 1, count), Rotation(seed + _AGAIN, 1, count)


@cache
def lloyd_max(bits: int) -> Doubles:
    """Return the 2^bits levels of least mean squared error for N(0, 1), rising; for no bits, 0."""
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
