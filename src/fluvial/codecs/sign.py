"""Codecs that send signs and a magnitude per tensor: sign, half_sign and ternary.

With the mean magnitude as the scale, ||u - D(E(u))||^2 = ||u||^2 - sum over tensors of kept *
scale^2, so all three contract, and error feedback is safe with them.
"""

from typing import ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fluvial.codecs.base import Codec, CodecSettings, RateSettings, frame_room
from fluvial.codecs.quantise import Floats, bf16, read_scales, to_numpy
from fluvial.codecs.sparse.masked import Masked, masked_least
from fluvial.codecs.sparse.positions import SEED, Indices, slots
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout


def mean_magnitudes(kept: Floats, tensors: Indices, number: int) -> NDArray[np.uint16]:
    """Return bf16 patterns of mean |value| for each of `number` tensors; `tensors` says which a
    value is of."""
    sums = np.bincount(tensors, weights=np.abs(kept).astype(np.float64), minlength=number)
    return bf16(sums / np.maximum(np.bincount(tensors, minlength=number), 1))


def pack_signs(values: Floats) -> bytes:
    """Return one bit per value, 1 for values >= 0, lowest bit first."""
    return np.packbits(values >= 0, bitorder="little").tobytes()


def read_signs(reader: Reader, scales: Floats) -> Floats:
    """Return +-`scales`, one bit read for each."""
    packed = reader.array("u1", (len(scales) + 7) // 8).astype(np.uint8)
    positive = np.unpackbits(packed, count=len(scales), bitorder="little").astype(bool)
    return np.where(positive, scales, -scales)


class SignSettings(CodecSettings):
    """The sign of every value.

    Bytes per value: 1/8, and 2 bytes of scale per tensor. Lost: magnitudes.
    """

    name: Literal["sign"] = "sign"
    """Name of the codec."""


class Sign(Codec):
    """One bit per value, the mean magnitude per tensor. Body: a bf16 scale per tensor, then the
    bits."""

    code: ClassVar[int] = 7
    exact: ClassVar[bool] = True

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:  # noqa: ARG003
        """Return one bit a value, and two bytes a tensor."""
        return OVERHEAD + 2 * len(layout.sizes) + -(-layout.numel // 8)

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """Code the flattened update (numel,); see `Codec.body`."""
        values = to_numpy(vector)
        sizes = self.layout.sizes
        scales = mean_magnitudes(values, np.repeat(np.arange(len(sizes)), sizes), len(sizes))
        return scales.astype("<u2").tobytes() + pack_signs(values)

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        sizes = self.layout.sizes
        scales = read_scales(reader, len(sizes))
        return torch.from_numpy(read_signs(reader, np.repeat(scales, sizes)))


class HalfSignSettings(CodecSettings):
    """The sign of a random share of the values.

    Bytes per value: share / 8, with 2 bytes of scale per tensor and 8 of seed. Lost: magnitudes,
    and all but values at random positions.
    """

    name: Literal["half_sign"] = "half_sign"
    """Name of the codec."""
    share: float = Field(0.5, ge=1e-6, le=1)
    """Part of the values whose sign is sent, at least one; bits per value but for header, seed and
    scales."""


class HalfSign(Codec):
    """Signs at positions that the seed in the frame gives; the other values decode to 0.

    Body: seed u64, a bf16 scale per tensor (mean magnitude of what is sent of it), then the bits.
    """

    code: ClassVar[int] = 8
    exact: ClassVar[bool] = True
    settings: HalfSignSettings

    def __init__(self, settings: HalfSignSettings, layout: Layout) -> None:
        super().__init__(settings, layout)
        self.kept = _kept(settings, layout)

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the seed, two bytes a tensor, and one bit for each value that is sent."""
        assert isinstance(settings, HalfSignSettings)
        return OVERHEAD + SEED.size + 2 * len(layout.sizes) + -(-_kept(settings, layout) // 8)

    def body(self, vector: Tensor, seed: int) -> bytes:
        """Code the flattened update (numel,); see `Codec.body`."""
        seed %= 1 << 64
        where, tensors = self._where(seed)
        values = to_numpy(vector)[where]
        scales = mean_magnitudes(values, tensors, len(self.layout.sizes))
        return SEED.pack(seed) + scales.astype("<u2").tobytes() + pack_signs(values)

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        where, tensors = self._where(int(reader.number("Q")))
        scales = read_scales(reader, len(self.layout.sizes))
        vector = np.zeros(self.layout.numel, dtype=np.float32)
        vector[where] = read_signs(reader, scales[tensors])
        return torch.from_numpy(vector)

    def _where(self, seed: int) -> tuple[Indices, Indices]:
        """Return the positions whose sign is sent, and the tensor that each is of."""
        where = slots(seed, self.kept, self.layout.numel)
        return where, np.searchsorted(np.cumsum(self.layout.sizes), where, side="right")


def _kept(settings: HalfSignSettings, layout: Layout) -> int:
    """Return the values whose sign is sent."""
    return min(max(round(settings.share * layout.numel), 1), layout.numel)


class TernarySettings(RateSettings):
    """Three levels, +scale, 0 and -scale, entropy-coded.

    Bytes per value: 4 / rate. Lost: magnitudes, and values in a dead zone.
    """

    name: Literal["ternary"] = "ternary"
    """Name of the codec."""


class Ternary(Masked):
    """Values beyond a dead zone become +-scale, the others 0.

    The threshold is one multiple of the RMS of each tensor, as low as the rate allows; the scale is
    the mean magnitude of what is kept of a tensor.
    """

    code: ClassVar[int] = 9
    fills: ClassVar[bool] = False
    alphabet = 2

    def __init__(self, settings: TernarySettings, layout: Layout) -> None:
        super().__init__(settings, layout, num_scales=len(layout.sizes))

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, TernarySettings)
        return frame_room(layout, settings, masked_least(layout, num_scales=len(layout.sizes)))

    def weights(self, values: Floats) -> NDArray[np.floating]:
        """Return the magnitudes over the RMS of their tensor."""
        sizes = self.layout.sizes
        tensors = np.repeat(np.arange(len(sizes)), sizes)
        squares = np.bincount(tensors, weights=values.astype(np.float64) ** 2, minlength=len(sizes))
        rms = np.sqrt(squares / np.maximum(sizes, 1))[tensors]

        return np.divide(np.abs(values), rms, out=np.zeros(len(values)), where=rms > 0)

    def best(self, weights: NDArray[np.floating], tensors: Indices) -> int:
        """Return the part of what fits that captures most energy: with bits to spare, a dead zone
        still helps."""

        def captured(number: int) -> float:
            kept = np.bincount(tensors[:number])
            sums = np.bincount(tensors[:number], weights=weights[:number])
            return float((sums**2 / np.maximum(kept, 1)).sum())

        return max((round(len(weights) * tenths / 10) for tenths in range(10, 0, -1)), key=captured)

    def scales(self, kept: Floats, tensors: Indices) -> NDArray[np.uint16]:
        """Return the mean magnitude of the kept values."""
        return mean_magnitudes(kept, tensors, len(self.layout.sizes))

    def to_symbols(
        self,
        kept: Floats,
        tensors: Indices,  # noqa: ARG002
        scales: Floats,  # noqa: ARG002
    ) -> NDArray[np.integer]:
        """Return 1 for positive values."""
        return (kept > 0).astype(np.int32)

    def from_symbols(self, symbols: NDArray[np.int32], tensors: Indices, scales: Floats) -> Floats:
        """Return +-scale of the tensor."""
        return cast(Floats, np.where(symbols == 1, scales[tensors], -scales[tensors]))
