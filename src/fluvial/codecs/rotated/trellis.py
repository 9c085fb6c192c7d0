"""Trellis-coded quantisation: a rotation makes values Gaussian, a path through a shift register
codes them jointly.

A scalar quantiser with an entropy coder stays 0.1 bit or more above what a Gaussian source needs,
which at half a bit per value is a quarter of the bytes. Here a state of `memory` bits is shifted by
some bits for every few values; each state stands for that many Gaussian numbers from one fixed
table; the encoder finds the best path (Viterbi), and the bits shifted in are the frame. Random
codes on a trellis come near the Gaussian bound as the memory grows (Marcellin and Fischer, 1990;
the bit-shift trellis is that of Tseng et al., QTIP, NeurIPS 2024). There is nothing to learn,
nothing to entropy-code and nothing to download.

    body   bytes   content
    seed   4       u32, seed of the rotation
    gain   1       factor on what is decoded, 1/128: least squares, so that an error never exceeds
                   the update
    top    2       i16, log2 of the RMS of the loudest group, 1/8 octave
    lower  groups  u8, 1/8 octaves below it; 255: the group is zero
    paths  rest    bits of every group, block by block, one after another, highest bit first

Groups are the tensors of one target and factor, as LoRA names them; bits go to groups by reverse
water-filling on these codes, in whole numbers, so that both ends agree.
"""

import math
import struct
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluvial.codecs.base import (
    CodecSettings,
    RatedCodec,
    RateSettings,
    SnrDrivenSettings,
    frame_room,
)
from fluvial.codecs.learned.canvas import target
from fluvial.codecs.rotated.paths import BLOCK, LONGEST, Plan, follow, search
from fluvial.codecs.rotated.rotation import Rotation
from fluvial.errors import WireError
from fluvial.settings import EXACT
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout, factor

MOST_BITS = 6
"""Most bits that a value takes: a frame is never larger than 6/32 of fp32."""
_ROW = 1 << 16  # values that are rotated together
_OCTAVE = 8
_FINE = 1024  # parts of a code in which the water level is sought
_SILENT = 255
_HEAD = struct.Struct("<IBh")
_GAIN = 128


class TrellisSettings(RateSettings, SnrDrivenSettings):
    """Rotated values, coded jointly by a path on a trellis (ours in this use).

    Bytes per value: 4 / rate. Lost: less than with hadamard.
    """

    name: Literal["trellis"] = "trellis"
    """Name of the codec."""
    memory: Annotated[Literal[6, 8, 10, 12], EXACT] = 10
    """Bits of the state. Two more take up to four times as long to encode and come nearer to the
    bound."""


class Trellis(RatedCodec):
    """Contracts, whatever the update."""

    code: ClassVar[int] = 22
    settings: TrellisSettings

    def __init__(self, settings: TrellisSettings, layout: Layout) -> None:
        super().__init__(settings, layout)
        numbers, owner = _groups(layout)
        self._owner = owner
        self._sizes = np.zeros(len(numbers), np.int64)
        np.add.at(self._sizes, owner, layout.sizes)
        self._room = self.frame_size(settings, layout) - OVERHEAD

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, TrellisSettings)
        return frame_room(layout, settings, least=_HEAD.size + len(_groups(layout)[0]) + 1)

    def body(self, vector: Tensor, seed: int) -> bytes:
        """Code the flattened update (numel,); see `Codec.body`."""
        seed %= 1 << 32
        device = None if vector.device.type == "cpu" else vector.device
        groups = self._parted(vector.cpu())
        top, lower = _loudness(groups, self._sizes)
        bits = self._allocate(lower)
        paths = np.zeros(8 * self._room, np.uint8)
        end = 0
        product = 0.0
        energy = 0.0

        for number, (low, count) in enumerate(zip(lower, bits, strict=True)):
            scale = 2.0 ** ((top - int(low)) / _OCTAVE)
            path, of_product, of_energy = self._path(
                groups[number], seed + number, scale, int(count), device
            )
            product += of_product
            energy += of_energy
            paths[end : end + len(path)] = path
            end += len(path)

        gain = int(np.clip(np.rint(_GAIN * product / energy), 0, 255)) if energy > 0 else 0

        return (
            _HEAD.pack(seed, gain, top)
            + lower.astype(np.uint8).tobytes()
            + np.packbits(paths[:end]).tobytes()
        )

    def _path(
        self,
        tensors: list[Tensor],
        seed: int,
        scale: float,
        count: int,
        device: torch.device | None,
    ) -> tuple[NDArray[np.uint8], float, float]:
        """Return the path of a group (bits,), the product of the group with what the path decodes
        to, and the energy of the latter.

        One group at a time is held in fp64, so that memory does not grow with the update.
        """
        values = rotate(torch.cat(tensors), seed).numpy()
        path, decoded = search(values, count, self.settings.memory, scale=scale, device=device)
        return path, float(values @ decoded), float(decoded @ decoded)

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        seed = int(reader.number("I"))
        gain = int(reader.number("B"))
        top = int(reader.number("h"))

        if abs(top) > 126 * _OCTAVE:
            raise WireError(f"frame: loudness {top} is beyond fp32")

        lower = reader.array("u1", len(self._sizes)).astype(np.int64)
        plans = [
            Plan.of(int(size), int(count))
            for size, count in zip(self._sizes, self._allocate(lower), strict=True)
        ]
        ends = np.cumsum([plan.total for plan in plans])
        bits = np.unpackbits(
            reader.array("u1", -(-int(ends[-1]) // 8)).astype(np.uint8), count=int(ends[-1])
        )
        vector = torch.zeros(self.layout.numel)

        for number, (tensors, low, plan, end) in enumerate(
            zip(self._parted(vector), lower, plans, ends, strict=True)
        ):
            if plan.total:
                unit = follow(bits[end - plan.total : end], plan, self.settings.memory)
                unit *= gain / _GAIN * 2.0 ** ((top - int(low)) / _OCTAVE)
                values = rotate(torch.from_numpy(unit), seed + number, back=True)
                values.clamp_(-3e38, 3e38)
                pieces = torch.split(values, [tensor.numel() for tensor in tensors])
                for tensor, piece in zip(tensors, pieces, strict=True):
                    tensor.copy_(piece)

        return vector

    def _parted(self, vector: Tensor) -> list[list[Tensor]]:
        """Return views of the tensors of every group in a vector (numel,)."""
        groups: list[list[Tensor]] = [[] for _ in self._sizes]
        tensors = torch.split(vector, list(self.layout.sizes))
        for number, tensor in zip(self._owner, tensors, strict=True):
            groups[number].append(tensor)

        return groups

    def _allocate(self, lower: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the bits of every group: half of log2(variance / water level) for each value, in
        whole-number arithmetic."""
        live = lower < _SILENT
        loud = np.where(live, -_FINE * lower.astype(np.int64), 0)
        room = 8 * (self._room - _HEAD.size - len(lower))
        least, most = -_FINE * _OCTAVE * 64, 0  # of the water level
        blocks = np.maximum(-(-self._sizes // BLOCK), 1)
        lengths = -(-self._sizes // blocks)

        def bits(level: int) -> NDArray[np.int64]:
            found = self._sizes * np.maximum(loud - level, 0) // (_FINE * _OCTAVE)
            found = np.minimum(found, MOST_BITS * self._sizes)
            return np.where(live & (found // blocks * LONGEST >= lengths), found, 0)

        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if int(bits(middle).sum()) > room else (least, middle)

        return bits(most)


def _groups(layout: Layout) -> tuple[dict[object, int], list[int]]:
    """Return the number of every group, and the group of every tensor."""
    numbers: dict[object, int] = {}
    owner = [
        numbers.setdefault((target(name), factor(name)) if factor(name) else name, len(numbers))
        for name, _ in layout.shapes
    ]

    return numbers, owner


def _loudness(
    groups: list[list[Tensor]], sizes: NDArray[np.int64]
) -> tuple[int, NDArray[np.int64]]:
    """Code of the loudest group's RMS, and how far below it each group is; a rotation keeps it."""
    rms = np.sqrt(np.array([_energy(values) for values in groups]) / np.maximum(sizes, 1))
    if not rms.any():
        return 0, np.full(len(rms), _SILENT, dtype=np.int64)
    top = int(np.clip(np.rint(_OCTAVE * np.log2(rms.max())), -126 * _OCTAVE, 126 * _OCTAVE))
    codes = np.rint(top - _OCTAVE * np.log2(np.maximum(rms, 1e-300))).clip(0, _SILENT)
    return top, np.where(rms > 0, codes, _SILENT).astype(np.int64)


def _energy(tensors: list[Tensor]) -> float:
    """Return the sum of squares of 1-D tensors, in fp64."""
    return math.fsum(float(values @ values) for values in (each.double() for each in tensors))


def rotate(values: Tensor, seed: int, *, back: bool = False) -> Tensor:
    """Return a random rotation of `values` (n,), in fp64, by rows that each hold a sample of
    everything; or with `back` its inverse, in fp32, for which `values` are overwritten."""
    size = values.numel()
    if not size:
        return values

    rows = -(-size // _ROW)
    even = size // rows * rows  # the values behind these are not rotated
    rotation = Rotation(seed, rows, even // rows)
    starts = np.arange(rows) * (even // rows)
    turned = torch.empty(size, dtype=torch.float32 if back else torch.float64)
    turned[even:] = values[even:]

    if back:
        rotation.turn(values, starts, back=True)
        turned[:even].view(-1, rows).copy_(values[:even].view(rows, -1).T)
    else:
        turned[:even].view(rows, -1).copy_(values[:even].view(-1, rows).T)
        rotation.turn(turned, starts)

    return turned
