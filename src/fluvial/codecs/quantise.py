"""Codecs that send every value, with fewer bits: identity, bf16, int8, int4 and nf4.

Scales are bf16 because updates of 1e-6 and below are usual and fp16 ends at 6e-8.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import ndtri
from torch import Tensor

from fluvial.codecs.base import Codec, CodecSettings
from fluvial.errors import WireError
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout

Floats = NDArray[np.float32]

_PIECE = 4096
"""Blocks that are coded at a time."""
_BF16_MAX = 0x7F7F
_FP32 = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))


def bf16(
    values: NDArray[np.floating], *, rounding: Literal["nearest", "up"] = "nearest"
) -> NDArray[np.uint16]:
    """Return bf16 bit patterns of finite `values`, rounded to nearest even or away from zero; never
    to Inf."""
    bits = np.clip(values, *_FP32).astype(np.float32, copy=False).view(np.uint32)
    sign = (bits >> 16 & 0x8000).astype(np.uint16)
    bits &= 0x7FFFFFFF
    bits += 0xFFFF if rounding == "up" else (bits >> 16 & 1) + 0x7FFF
    bits >>= 16

    return cast(NDArray[np.uint16], sign | np.minimum(bits, _BF16_MAX).astype(np.uint16))


def from_bf16(bits: NDArray[np.generic]) -> Floats:
    """Return fp32 values of bf16 bit patterns, exact."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return cast(Floats, wide.view(np.float32))


def read_scales(reader: Reader, count: int) -> Floats:
    """Return `count` bf16 scales as fp32; raises `WireError` unless all are finite and >= 0."""
    scales = from_bf16(reader.array("u2", count))
    if not bool(np.all((scales >= 0) & np.isfinite(scales))):
        raise WireError("frame: a scale is negative, NaN or Inf")
    return scales


def steps(largest: NDArray[np.floating], levels: int) -> NDArray[np.uint16]:
    """Return bf16 patterns of the step that codes magnitudes up to `largest` in `levels` steps.

    Rounded up, so that nothing is clipped, but no further than that `levels` steps are still an
    fp32 number.
    """
    most = bf16(np.array([_FP32[1] / levels / (1 + 2**-7)]))
    return np.minimum(bf16(largest.astype(np.float64) / levels, rounding="up"), most)


def to_levels(values: NDArray[np.floating], step: Floats, levels: int) -> NDArray[np.int8]:
    """Return `values` in whole steps, -levels to levels; a step of 0 gives level 0."""
    scaled = np.divide(values, step, out=np.zeros(len(values), dtype=np.float64), where=step > 0)
    return cast(NDArray[np.int8], np.clip(np.rint(scaled), -levels, levels).astype(np.int8))


def to_numpy(vector: Tensor) -> Floats:
    """Return the flattened update as NumPy sees it (numel,), fp32."""
    return cast(Floats, vector.detach().cpu().numpy())


class IdentitySettings(CodecSettings):
    """The update as it is.

    Bytes per value: 4. Lost: nothing.
    """

    name: Literal["identity"] = "identity"
    """Name of the codec."""


class Identity(Codec):
    """Raw fp32; exact to the bit."""

    code: ClassVar[int] = 1
    exact: ClassVar[bool] = True

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:  # noqa: ARG003
        """Return four bytes a value."""
        return OVERHEAD + 4 * layout.numel

    @classmethod
    def of(cls, layout: Layout) -> "Identity":
        """Return the exact codec for `layout`: the codec of adapters in the downlink."""
        return cls(IdentitySettings(), layout)

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """Return fp32, little endian."""
        return to_numpy(vector).astype("<f4", copy=False).tobytes()

    def parse(self, reader: Reader) -> Tensor:
        """Invert `body`."""
        values = reader.array("f4", self.layout.numel)
        return torch.from_numpy(values.astype(np.float32, copy=False))


class BFloat16Settings(CodecSettings):
    """Values rounded to bf16.

    Bytes per value: 2. Lost: a relative error up to 2^-8.
    """

    name: Literal["bf16"] = "bf16"
    """Name of the codec."""


class BFloat16(Codec):
    """bf16, rounded to nearest even; keeps the range of fp32, and 8 significant bits."""

    code: ClassVar[int] = 2
    exact: ClassVar[bool] = True

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:  # noqa: ARG003
        """Return two bytes a value."""
        return OVERHEAD + 2 * layout.numel

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """Return bf16, little endian."""
        return bf16(to_numpy(vector)).astype("<u2", copy=False).tobytes()

    def parse(self, reader: Reader) -> Tensor:
        """Invert `body`."""
        return torch.from_numpy(from_bf16(reader.array("u2", self.layout.numel)))


class Int8Settings(CodecSettings):
    """Whole numbers from -127 to 127 with a scale per block.

    Bytes per value: 1 + 2 / block_size. Lost: up to 1/254 of the largest value of a block.
    """

    name: Literal["int8"] = "int8"
    """Name of the codec."""
    block_size: int = Field(64, ge=1, le=65536)
    """Values that share one bf16 scale; the last block of a tensor may be shorter."""


class Int4Settings(CodecSettings):
    """Whole numbers from -7 to 7 with a scale per block.

    Bytes per value: 1/2 + 2 / block_size. Lost: up to 1/14 of the largest value of a block.
    """

    name: Literal["int4"] = "int4"
    """Name of the codec."""
    block_size: int = Field(64, ge=1, le=65536)
    """Values that share one bf16 scale; the last block of a tensor may be shorter."""


class NF4Settings(CodecSettings):
    """Sixteen levels at the quantiles of a Gaussian, with a scale per block.

    Bytes per value: 1/2 + 2 / block_size. Lost: up to 1/6 of the largest value of a block, less
    near zero.
    """

    name: Literal["nf4"] = "nf4"
    """Name of the codec."""
    block_size: int = Field(64, ge=1, le=65536)
    """Values that share one bf16 scale; the last block of a tensor may be shorter."""


class _Blocks(Codec):
    """Levels relative to a per-block scale; no block spans two tensors.

    Body: one bf16 scale per block (of int8 and int4 a step, of nf4 the largest value), then the
    levels of all values.
    """

    levels: ClassVar[int]
    """Steps from zero to the largest value of a block."""
    per_byte: ClassVar[int] = 2
    """Levels in one byte."""
    exact: ClassVar[bool] = True
    settings: Int8Settings | Int4Settings | NF4Settings

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return two bytes a block, and the levels."""
        assert isinstance(settings, Int8Settings | Int4Settings | NF4Settings)
        blocks = sum(-(-size // settings.block_size) for size in layout.sizes)
        return OVERHEAD + 2 * blocks + -(-layout.numel // cls.per_byte)

    def __init__(self, settings: Int8Settings | Int4Settings | NF4Settings, layout: Layout) -> None:
        super().__init__(settings, layout)
        starts = [np.zeros(0, dtype=np.int64)]
        end = 0

        for size in layout.sizes:
            starts.append(np.arange(end, end + size, settings.block_size))
            end += size

        self._starts = np.concatenate(starts)
        self._lengths = np.diff(self._starts, append=end)

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        values = to_numpy(vector)
        bits = np.empty(len(self._starts), dtype=np.uint16)
        coded = np.empty(len(values), dtype=np.int8)

        for blocks, here in self._pieces():
            piece = values[here]
            lengths = self._lengths[blocks]
            largest = np.maximum.reduceat(np.abs(piece), self._starts[blocks] - here.start)
            bits[blocks] = steps(largest, self.levels)
            coded[here] = self._quantise(piece, np.repeat(from_bf16(bits[blocks]), lengths))

        return bits.astype("<u2").tobytes() + self._pack(coded)

    def parse(self, reader: Reader) -> Tensor:
        scales = read_scales(reader, len(self._starts))
        values = self._unpack(reader)
        with np.errstate(over="ignore"):
            for blocks, here in self._pieces():
                values[here] *= np.repeat(scales[blocks], self._lengths[blocks])

        return torch.from_numpy(values)

    def _pieces(self) -> Iterator[tuple[slice, slice]]:
        """Yield the runs of blocks and their values, so that what is computed for each value does
        not need memory for all."""
        for first in range(0, len(self._starts), _PIECE):
            blocks = slice(first, min(first + _PIECE, len(self._starts)))
            yield (
                blocks,
                slice(
                    int(self._starts[first]), int(self._starts[first] + self._lengths[blocks].sum())
                ),
            )

    def _quantise(self, values: Floats, scales: Floats) -> NDArray[np.int8]:
        """Return the levels of `values`, each with its scale."""
        return to_levels(values, scales, self.levels)

    @abstractmethod
    def _pack(self, coded: NDArray[np.int8]) -> bytes:
        """Return the levels as bytes."""

    @abstractmethod
    def _unpack(self, reader: Reader) -> Floats:
        """Invert `_pack`."""


class Int8(_Blocks):
    """One byte per value."""

    code: ClassVar[int] = 3
    levels: ClassVar[int] = 127
    per_byte: ClassVar[int] = 1

    def _pack(self, coded: NDArray[np.int8]) -> bytes:
        return coded.tobytes()

    def _unpack(self, reader: Reader) -> Floats:
        return reader.array("i1", self.layout.numel).astype(np.float32)


class Int4(_Blocks):
    """Two values per byte, the earlier one in the low half; levels are stored plus 8."""

    code: ClassVar[int] = 4
    levels: ClassVar[int] = 7

    def _pack(self, coded: NDArray[np.int8]) -> bytes:
        return _pack_halves((coded + 8).astype(np.uint8), fill=8)

    def _unpack(self, reader: Reader) -> Floats:
        return _read_halves(reader, self.layout.numel).astype(np.float32) - np.float32(8)


class NF4(_Blocks):
    """NormalFloat-4 (QLoRA, Dettmers et al., NeurIPS 2023, arXiv 2305.14314, section 3 and appendix
    E).

    Two values per byte, as int4. A level is the number of a quantile; number 7 is exactly zero.
    """

    code: ClassVar[int] = 13
    levels: ClassVar[int] = 1

    def _quantise(self, values: Floats, scales: Floats) -> NDArray[np.int8]:
        scaled = np.divide(values, scales, out=np.zeros_like(values), where=scales > 0)
        between = (_NORMAL_FLOAT[1:] + _NORMAL_FLOAT[:-1]) / 2
        return cast(NDArray[np.int8], np.searchsorted(between, scaled).astype(np.int8))

    def _pack(self, coded: NDArray[np.int8]) -> bytes:
        return _pack_halves(coded.view(np.uint8), fill=7)

    def _unpack(self, reader: Reader) -> Floats:
        return _NORMAL_FLOAT[_read_halves(reader, self.layout.numel)]


def _normal_float() -> Floats:
    """Return the 16 levels: 7 below zero, zero and 8 above at evenly spaced probabilities of N(0,
    1), over the largest.

    The outermost probability is the mean of 1 - 1/32 and 1 - 1/30, as QLoRA has it, so that all
    levels are finite.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above = ndtri(np.linspace(0.5, outermost, 9)[1:])
    below = -ndtri(np.linspace(0.5, outermost, 8)[:0:-1])

    return cast(Floats, (np.concatenate([below, [0.0], above]) / above[-1]).astype(np.float32))


_NORMAL_FLOAT = _normal_float()


def _pack_halves(halves: NDArray[np.uint8], *, fill: int) -> bytes:
    """Return two values of 0 to 15 per byte, the earlier one in the low half; an odd last one is
    paired with `fill`."""
    halves = np.append(halves, np.uint8(fill)) if len(halves) % 2 else halves
    return (halves[0::2] | halves[1::2] << 4).tobytes()


def _read_halves(reader: Reader, count: int) -> NDArray[np.uint8]:
    """Invert `_pack_halves` for `count` values."""
    packed = reader.array("u1", (count + 1) // 2).astype(np.uint8)
    return np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:count]
