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

import struct
from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from fluvial.codecs.base import Codec, CodecSettings, RateSettings, frame_room
from fluvial.codecs.learned.canvas import target
from fluvial.codecs.rotated.rotation import Rotation
from fluvial.errors import WireError
from fluvial.settings import EXACT
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout, factor

Floats = NDArray[np.float32]
Bits = NDArray[np.uint8]

_BLOCK = 1024  # values of one path; the paths of a group are searched side by side
_SIDE_BY_SIDE = 64
_LONGEST = 64  # values for one step
_MOST = 6  # bits for one value
_ROW = 1 << 16  # values that are rotated together
_OCTAVE = 8
_FINE = 1024  # parts of a code in which the water level is sought
_SILENT = 255
_HEAD = struct.Struct("<IBh")
_GAIN = 128


class TrellisSettings(RateSettings):
    """Rotated values, coded jointly by a path on a trellis (ours in this use).

    Bytes per value: 4 / rate. Lost: less than with hadamard.
    """

    name: Literal["trellis"] = "trellis"
    """Name of the codec."""
    memory: Annotated[Literal[6, 8, 10, 12], EXACT] = 10
    """Bits of the state. Two more take up to four times as long to encode and come nearer to the
    bound."""


class Trellis(Codec):
    """Contracts, whatever the update."""

    code: ClassVar[int] = 22
    settings: TrellisSettings

    def __init__(self, settings: TrellisSettings, layout: Layout) -> None:
        super().__init__(settings, layout)
        numbers, owner = _groups(layout)
        spread = np.repeat(np.array(owner, dtype=np.int64), layout.sizes)
        order = np.argsort(spread, kind="stable")
        self._sizes = np.bincount(spread, minlength=len(numbers))
        self._where = [
            torch.from_numpy(each) for each in np.split(order, np.cumsum(self._sizes)[:-1])
        ]
        self._room = self.frame_size(settings, layout) - OVERHEAD

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, TrellisSettings)
        return frame_room(layout, settings.rate, least=_HEAD.size + len(_groups(layout)[0]) + 1)

    def body(self, vector: Tensor, seed: int) -> bytes:
        """Code the flattened update (numel,); see `Codec.body`."""
        seed %= 1 << 32
        rotated = [
            rotate(vector[where].double(), seed + number).numpy()
            for number, where in enumerate(self._where)
        ]
        top, lower = _loudness(rotated)
        bits = self._allocate(lower)
        paths = []
        decoded = []

        for values, low, count in zip(rotated, lower, bits, strict=True):
            scale = 2.0 ** ((top - int(low)) / _OCTAVE)
            path, unit = search(values / scale, int(count), self.settings.memory)
            paths.append(path)
            decoded.append(unit * scale)

        product = sum(float(x @ y) for x, y in zip(rotated, decoded, strict=True))
        energy = sum(float(y @ y) for y in decoded)
        gain = int(np.clip(np.rint(_GAIN * product / energy), 0, 255)) if energy > 0 else 0

        return (
            _HEAD.pack(seed, gain, top)
            + lower.astype(np.uint8).tobytes()
            + np.packbits(np.concatenate(paths)).tobytes()
        )

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        seed = int(reader.number("I"))
        gain = int(reader.number("B"))
        top = int(reader.number("h"))

        if abs(top) > 126 * _OCTAVE:
            raise WireError(f"frame: loudness {top} is beyond fp32")

        lower = reader.array("u1", len(self._sizes)).astype(np.int64)
        plans = [
            Plan.of(len(where), int(count))
            for where, count in zip(self._where, self._allocate(lower), strict=True)
        ]
        ends = np.cumsum([plan.total for plan in plans])
        bits = np.unpackbits(
            reader.array("u1", -(-int(ends[-1]) // 8)).astype(np.uint8), count=int(ends[-1])
        )
        vector = torch.zeros(self.layout.numel)

        for number, (where, low, plan, end) in enumerate(
            zip(self._where, lower, plans, ends, strict=True)
        ):
            if plan.total:
                unit = follow(bits[end - plan.total : end], plan, self.settings.memory)
                values = torch.from_numpy(
                    unit * (gain / _GAIN * 2.0 ** ((top - int(low)) / _OCTAVE))
                )
                vector[where] = rotate(values, seed + number, back=True).clamp(-3e38, 3e38).float()

        return vector

    def _allocate(self, lower: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the bits of every group: half of log2(variance / water level) for each value, in
        whole-number arithmetic."""
        live = lower < _SILENT
        loud = np.where(live, -_FINE * lower.astype(np.int64), 0)
        room = 8 * (self._room - _HEAD.size - len(lower))
        least, most = -_FINE * _OCTAVE * 64, 0  # of the water level

        def bits(level: int) -> NDArray[np.int64]:
            found = self._sizes * np.maximum(loud - level, 0) // (_FINE * _OCTAVE)
            found = np.minimum(found, _MOST * self._sizes)
            return np.where(live & (found * _LONGEST >= self._sizes), found, 0)

        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if int(bits(middle).sum()) > room else (least, middle)

        return bits(most)


@dataclass(frozen=True)
class Plan:
    """The values that the bits of a path go to: `steps` of (bits, values), the same for each of
    `blocks`."""

    size: int
    blocks: int
    length: int
    """Values of a block; the last ones of all are padding."""
    shifts: NDArray[np.int64]
    spans: NDArray[np.int64]
    scales: Floats
    """RMS of the numbers that stand for the values of a step."""

    @classmethod
    def of(cls, size: int, bits: int) -> "Plan":
        """Plan at most `bits` bits for `size` values of RMS 1, spread evenly; what is decoded has
        the energy that they carry."""
        blocks = max(-(-size // _BLOCK), 1)
        length = -(-size // blocks)
        each = bits // blocks
        steps = min(each, length)
        edges = np.arange(steps + 1)
        spans = (
            np.diff(edges * length // max(steps, 1))
            if each <= length
            else np.ones(length, np.int64)
        )
        shifts = np.ones(steps, np.int64) if each <= length else np.diff(edges * each // length)
        scale = (1 - 4.0 ** (-int(shifts.sum()) / max(length, 1))) ** 0.5

        return cls(size, blocks, length, shifts, spans, np.full(len(spans), scale, np.float32))

    @property
    def bits(self) -> int:
        """Bits of one block."""
        return int(self.shifts.sum())

    @property
    def total(self) -> int:
        """Bits of all blocks."""
        return self.blocks * self.bits


@cache
def codebook(memory: int) -> Floats:
    """Return Gaussian numbers (_LONGEST, 2^memory), of mean 0 and RMS 1 in each row; the same on
    every machine."""
    words = np.random.PCG64(memory).random_raw(_LONGEST << memory)
    numbers = ndtri(((words >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53).reshape(
        _LONGEST, -1
    )
    numbers -= numbers.mean(1, keepdims=True)
    found: Floats = (numbers / np.sqrt((numbers**2).mean(1, keepdims=True))).astype(np.float32)

    return found


def search(values: NDArray[np.float64], bits: int, memory: int) -> tuple[Bits, NDArray[np.float64]]:
    """Return the best path for `values` (n,) of about unit RMS in at most `bits` bits, and what it
    decodes to (n,)."""
    plan = Plan.of(len(values), bits)
    if plan.total == 0:
        return np.zeros(0, np.uint8), np.zeros(len(values))

    padded = np.zeros(plan.blocks * plan.length, dtype=np.float32)
    padded[: plan.size] = values
    rows = padded.reshape(plan.blocks, plan.length)
    path = best_path(rows, plan, memory)

    return path, follow(path, plan, memory)


def best_path(rows: Floats, plan: Plan, memory: int) -> Bits:
    """Return the bits (plan.total,) of the path of least squared error for every row of (blocks,
    length)."""
    paths = [
        _viterbi(rows[i : i + _SIDE_BY_SIDE], plan, memory)
        for i in range(0, plan.blocks, _SIDE_BY_SIDE)
    ]
    return np.concatenate(paths).reshape(-1)


def follow(path: Bits, plan: Plan, memory: int) -> NDArray[np.float64]:
    """Return the values (n,) of a path (plan.total,)."""
    if plan.total == 0:
        return np.zeros(plan.size)

    path = path.reshape(plan.blocks, plan.bits)
    padded = np.concatenate([np.zeros((plan.blocks, memory), np.uint8), path], axis=1)
    last = (
        memory + np.cumsum(plan.shifts) - 1
    )  # a step's state is made of the `memory` bits up to its last
    states = np.zeros((plan.blocks, len(last)), np.int16)

    for bit in range(memory):
        states |= padded[:, last - bit].astype(np.int16) << bit
    step = np.repeat(np.arange(len(plan.spans)), plan.spans)
    place = np.arange(plan.length) - np.repeat(np.cumsum(plan.spans) - plan.spans, plan.spans)
    decoded = codebook(memory)[place, states[:, step]] * plan.scales[step]
    values: NDArray[np.float64] = decoded.reshape(-1)[: plan.size].astype(np.float64)

    return values


def _viterbi(rows: Floats, plan: Plan, memory: int) -> Bits:
    """Return the bits (rows, plan.bits) of the path of least squared error for each row, from state
    0."""
    count = len(rows)
    states = 1 << memory
    book = codebook(memory)
    sums = {int(span): (book[:span] ** 2).sum(0) for span in np.unique(plan.spans)}
    cost = np.full((count, states), 1e30, dtype=np.float32)
    cost[:, 0] = 0
    best = np.empty_like(cost)
    metric = np.empty_like(cost)
    chosen = []
    position = 0

    for shift, span, scale in zip(
        plan.shifts.tolist(), plan.spans.tolist(), plan.scales, strict=True
    ):
        np.matmul(rows[:, position : position + span] * (-2 * scale), book[:span], out=metric)
        metric += sums[span] * (scale * scale)
        position += span

        if shift:
            left = states >> shift
            from_each = cost.reshape(count, 1 << shift, left)
            if shift == 1:
                chosen.append(from_each[:, 1] < from_each[:, 0])
                least = np.minimum(from_each[:, 0], from_each[:, 1], out=best[:, :left])
            else:
                chosen.append(from_each.argmin(1).astype(np.uint8))
                least = from_each.min(1)

            np.add(
                metric.reshape(count, left, 1 << shift),
                least[:, :, None],
                out=metric.reshape(count, left, -1),
            )
        else:
            chosen.append(np.zeros(0, bool))
            metric += cost

        cost, metric = metric, cost

    path = np.zeros((count, plan.bits), np.uint8)
    every = np.arange(count)
    state = cost.argmin(1)
    end = plan.bits

    for shift, choice in zip(plan.shifts.tolist()[::-1], chosen[::-1], strict=True):
        if not shift:
            continue
        for bit in range(shift):
            path[:, end - 1 - bit] = state >> bit & 1
        end -= shift
        before = state >> shift
        state = before | choice[every, before].astype(np.int64) << memory - shift

    return path


def _groups(layout: Layout) -> tuple[dict[object, int], list[int]]:
    """Return the number of every group, and the group of every tensor."""
    numbers: dict[object, int] = {}
    owner = [
        numbers.setdefault((target(name), factor(name)) if factor(name) else name, len(numbers))
        for name, _ in layout.shapes
    ]

    return numbers, owner


def _loudness(groups: list[NDArray[np.float64]]) -> tuple[int, NDArray[np.int64]]:
    """Code of the loudest group's RMS, and how far below it each group is."""
    rms = np.array([float(np.sqrt(values @ values / max(len(values), 1))) for values in groups])
    if not rms.any():
        return 0, np.full(len(rms), _SILENT, dtype=np.int64)
    top = int(np.clip(np.rint(_OCTAVE * np.log2(rms.max())), -126 * _OCTAVE, 126 * _OCTAVE))
    codes = np.rint(top - _OCTAVE * np.log2(np.maximum(rms, 1e-300))).clip(0, _SILENT)
    return top, np.where(rms > 0, codes, _SILENT).astype(np.int64)


def rotate(values: Tensor, seed: int, *, back: bool = False) -> Tensor:
    """Return a random rotation of (n,), fp64, in rows that each hold a sample of everything."""
    if not len(values):
        return values

    rows = -(-len(values) // _ROW)
    even = len(values) // rows * rows
    rotation = Rotation(seed, rows, even // rows)

    if back:
        turned = rotation.inverse(values[:even].view(rows, -1)).T.reshape(-1)
    else:
        turned = rotation.forward(values[:even].view(-1, rows).T.contiguous()).reshape(-1)

    return torch.cat([turned, values[even:]])
