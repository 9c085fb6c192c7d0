"""Codecs that send every value, with fewer bits: identity, bf16, int8 and int4.

    name      bytes per value           what is lost
    identity  4                         nothing
    bf16      2                         relative error up to 2^-8
    int8      1 + 2 / block_size        up to 1/254 of the largest value of the block
    int4      1/2 + 2 / block_size      up to 1/14 of the largest value of the block

Scales are bf16 because updates of 1e-6 and below are usual and fp16 ends at 6e-8.
"""

from abc import abstractmethod
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fluvial.codecs.base import Codec, CodecSettings
from fluvial.codecs.frame import Reader
from fluvial.errors import WireError
from fluvial.tensors import Layout

Floats = NDArray[np.float32]

_BF16_MAX = 0x7F7F
_FP32 = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))


def bf16(values: NDArray[np.floating], *, rounding: Literal["nearest", "up"] = "nearest") -> NDArray[np.uint16]:
    """bf16 bit patterns of finite `values`, rounded to nearest even or away from zero; never to Inf."""
    bits = np.clip(values, *_FP32).astype(np.float32).view(np.uint32)
    magnitude = bits & 0x7FFFFFFF
    magnitude = magnitude + (0xFFFF if rounding == "up" else 0x7FFF + ((magnitude >> 16) & 1))
    rounded = np.minimum(magnitude >> 16, _BF16_MAX)
    return cast(NDArray[np.uint16], ((bits >> 16) & 0x8000 | rounded).astype(np.uint16))


def from_bf16(bits: NDArray[np.generic]) -> Floats:
    """fp32 values of bf16 bit patterns, exact."""
    return cast(Floats, (bits.astype(np.uint32) << 16).view(np.float32))


def read_scales(reader: Reader, count: int) -> Floats:
    """`count` bf16 scales as fp32; raises `WireError` unless all are finite and >= 0."""
    scales = from_bf16(reader.array("u2", count))
    if not bool(np.all((scales >= 0) & np.isfinite(scales))):
        raise WireError("frame: a scale is negative, NaN or Inf")
    return scales


def steps(largest: NDArray[np.floating], levels: int) -> NDArray[np.uint16]:
    """bf16 patterns of the step that codes magnitudes up to `largest` in `levels` steps.

    Rounded up, so that nothing is clipped, but no further than that `levels` steps are still an fp32 number.
    """
    most = bf16(np.array([_FP32[1] / levels / (1 + 2**-7)]))
    return np.minimum(bf16(largest.astype(np.float64) / levels, rounding="up"), most)


def to_levels(values: NDArray[np.floating], step: Floats, levels: int) -> NDArray[np.int8]:
    """`values` in whole steps, -levels to levels; a step of 0 gives level 0."""
    scaled = np.divide(values, step, out=np.zeros(len(values), dtype=np.float64), where=step > 0)
    return cast(NDArray[np.int8], np.clip(np.rint(scaled), -levels, levels).astype(np.int8))


def to_numpy(vector: Tensor) -> Floats:
    """The flattened update as NumPy sees it (numel,), fp32."""
    return cast(Floats, vector.detach().cpu().numpy())


class IdentitySettings(CodecSettings):
    """The update as it is."""

    name: Literal["identity"] = "identity"
    """Which codec."""


class Identity(Codec):
    """Raw fp32; exact to the bit."""

    code: ClassVar[int] = 1

    @classmethod
    def of(cls, layout: Layout) -> "Identity":
        """The exact codec for `layout`: how adapters travel to the sites."""
        return cls(IdentitySettings(), layout)

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """fp32, little endian."""
        return to_numpy(vector).astype("<f4").tobytes()

    def parse(self, reader: Reader) -> Tensor:
        """Inverse of `body`."""
        return torch.from_numpy(reader.array("f4", self.layout.numel).astype(np.float32))


class BFloat16Settings(CodecSettings):
    """Values rounded to bf16."""

    name: Literal["bf16"] = "bf16"
    """Which codec."""


class BFloat16(Codec):
    """bf16, rounded to nearest even; keeps the range of fp32, and 8 significant bits."""

    code: ClassVar[int] = 2

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """bf16, little endian."""
        return bf16(to_numpy(vector)).astype("<u2").tobytes()

    def parse(self, reader: Reader) -> Tensor:
        """Inverse of `body`."""
        return torch.from_numpy(from_bf16(reader.array("u2", self.layout.numel)))


class Int8Settings(CodecSettings):
    """Whole numbers from -127 to 127 with a scale per block."""

    name: Literal["int8"] = "int8"
    """Which codec."""
    block_size: int = Field(64, ge=1, le=65536)
    """Values that share one bf16 scale; the last block of a tensor may be shorter."""


class Int4Settings(CodecSettings):
    """Whole numbers from -7 to 7 with a scale per block."""

    name: Literal["int4"] = "int4"
    """Which codec."""
    block_size: int = Field(64, ge=1, le=65536)
    """Values that share one bf16 scale; the last block of a tensor may be shorter."""


class _Blocks(Codec):
    """Whole steps of a per-block scale; no block spans two tensors.

    Body: one bf16 step per block, then the levels of all values.
    """

    levels: ClassVar[int]
    settings: Int8Settings | Int4Settings

    def __init__(self, settings: Int8Settings | Int4Settings, layout: Layout) -> None:
        super().__init__(settings, layout)
        starts, end = [np.zeros(0, dtype=np.int64)], 0
        for size in layout.sizes:
            starts.append(np.arange(end, end + size, settings.block_size))
            end += size
        self._starts = np.concatenate(starts)
        self._lengths = np.diff(self._starts, append=end)

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        values = to_numpy(vector)
        bits = steps(np.maximum.reduceat(np.abs(values), self._starts), self.levels)
        coded = to_levels(values, np.repeat(from_bf16(bits), self._lengths), self.levels)
        return bits.astype("<u2").tobytes() + self._pack(coded)

    def parse(self, reader: Reader) -> Tensor:
        scales = read_scales(reader, len(self._starts))
        with np.errstate(over="ignore"):
            return torch.from_numpy(self._unpack(reader) * np.repeat(scales, self._lengths))

    @abstractmethod
    def _pack(self, coded: NDArray[np.int8]) -> bytes:
        """Levels as bytes."""

    @abstractmethod
    def _unpack(self, reader: Reader) -> Floats:
        """Inverse of `_pack`."""


class Int8(_Blocks):
    """One byte per value."""

    code: ClassVar[int] = 3
    levels: ClassVar[int] = 127

    def _pack(self, coded: NDArray[np.int8]) -> bytes:
        return coded.tobytes()

    def _unpack(self, reader: Reader) -> Floats:
        return reader.array("i1", self.layout.numel).astype(np.float32)


class Int4(_Blocks):
    """Two values per byte, the earlier one in the low half; levels are stored plus 8."""

    code: ClassVar[int] = 4
    levels: ClassVar[int] = 7

    def _pack(self, coded: NDArray[np.int8]) -> bytes:
        halves = (coded + 8).astype(np.uint8)
        halves = np.append(halves, np.uint8(8)) if len(halves) % 2 else halves
        return (halves[0::2] | halves[1::2] << 4).tobytes()

    def _unpack(self, reader: Reader) -> Floats:
        count = self.layout.numel
        packed = reader.array("u1", (count + 1) // 2).astype(np.uint8)
        halves = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:count]
        return halves.astype(np.float32) - np.float32(8)
