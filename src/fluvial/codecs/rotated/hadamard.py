"""Codec `hadamard`: every tensor is rotated, then quantised with one step and entropy-coded.

One step for everything is reverse water-filling; the entropy coder has the table of N(0, 1) at the
RMS of each tensor.
"""

import struct
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fluvial.codecs.base import (
    CodecSettings,
    RatedCodec,
    RateSettings,
    SnrDrivenSettings,
    frame_room,
)
from fluvial.codecs.gaussian import Blocks
from fluvial.codecs.rotated.rotation import LARGEST_FP32, Rotation
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout


class HadamardSettings(RateSettings, SnrDrivenSettings):
    """Rotated values, quantised with one step and entropy-coded.

    Bytes per value: 4 / rate. Lost: what a dead-zone quantiser loses on rotated, hence Gaussian,
    values.
    """

    name: Literal["hadamard"] = "hadamard"
    """Name of the codec."""


class Hadamard(RatedCodec):
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
        sizes = np.array(layout.sizes, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        self._alike = {int(size): starts[sizes == size] for size in np.unique(sizes[sizes > 0])}
        """First values of all tensors of each size, by rising size."""

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, HadamardSettings)
        return frame_room(layout, settings, least=4 + Blocks.least + len(layout.sizes))

    def body(self, vector: Tensor, seed: int) -> bytes:
        """Code the flattened update (numel,); see `Codec.body`."""
        seed %= 1 << 32
        least, most = torch.aminmax(vector)
        large = max(-float(least), float(most)) > LARGEST_FP32 / 2**32
        rotated = vector.double() if large else vector.clone()  # sums end where fp32 ends
        self._rotate(rotated, seed)
        return struct.pack("<I", seed) + self._blocks.encode(rotated.numpy(), self._room - 4)

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        seed = int(reader.number("I"))
        values = torch.from_numpy(self._blocks.decode(reader, fp32=True))
        self._rotate(values, seed, back=True)
        return values.clamp_(-LARGEST_FP32, LARGEST_FP32).float()

    def _rotate(self, vector: Tensor, seed: int, *, back: bool = False) -> None:
        """Rotate every tensor in place."""
        for number, (size, starts) in enumerate(self._alike.items()):
            Rotation(seed + number, len(starts), size).turn(vector, starts, back=back)
