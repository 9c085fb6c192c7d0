"""The transform of `klt`, coded by a trellis, with variances that know error feedback.

Ours. With error feedback a site codes u = update + residual, and what earlier rounds left behind is
not spread like an update: every direction that was sent keeps about the same residual, every other
one grows. So there are profiles of variances for a few ages, which is for how many rounds the
residual has gathered:

    v_0 = what `fit` saw,   v_(a + 1) = v_0 + v_a * 4^-(bits that v_a gets),

with the bits of reverse water-filling at the nominal rate; each also as v^0.75 and v^0.5, because
updates are less regular than `fit` believes; and a flat one, for updates unlike those of `fit`. The
encoder takes the profile that leaves the least error. Bits and their order follow from profile and
loudness, in whole numbers. A fixed rotation of every class (coefficients of one expected variance)
makes it Gaussian, and the paths of `trellis` code all classes in one, the loudest first.

    body     bytes   content
    profile  1       age and power
    gain     1       factor on what is decoded, 1/128: least squares, so that an error never
                     exceeds the update
    floor    1       u8, how far below the loudest class the faintest that is sent lies, 1/8 octave
    top      2       i16, log2 of the RMS of the loudest group (target, factor), 1/8 octave
    lower    groups  u8, 1/8 octaves below it; 255: the group is zero
    paths    rest    bits of every path
"""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fluvial.codecs.base import CodecSettings, RatedCodec, SnrDrivenSettings, body_room
from fluvial.codecs.klt.base import AdaptiveTransformCodec, TransformSettings
from fluvial.codecs.klt.factors import factors_of
from fluvial.codecs.klt.model import Model
from fluvial.codecs.klt.transform import power, spreads
from fluvial.codecs.klt.trellis_search import (
    FAINT,
    FAINTEST,
    NOTHING,
    OCTAVE,
    SILENT,
    best_layout,
    loudness,
    rotated,
    water_level,
    worth,
)
from fluvial.codecs.rotated.paths import BLOCK, LONGEST, Plan, best_path, follow
from fluvial.errors import WireError
from fluvial.settings import EXACT
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout

Ints = NDArray[np.int64]

_AGES = (0, 1, 2, 4, 8, 20)
_POWERS = (1.0, 0.75, 0.5)
_GAIN = 128
_CODES = 254  # the largest sum of a row's and a column's logarithm
_CELLS = 2 * _CODES + 1
_MOST = 8  # bits for one value
_HEAD = struct.Struct("<BBBh")


class KltTrellisSettings(TransformSettings, SnrDrivenSettings):
    """The transform of klt, coded jointly by a trellis (ours; it needs a fit).

    Bytes per value: 4 / rate. Lost: less than with klt; the variances follow error feedback.
    """

    name: Literal["klt_trellis"] = "klt_trellis"
    """Name of the codec."""
    rate: float = Field(64, ge=16, le=1024)
    """Times smaller than fp32: a frame, its header included, has at most 4 * numel / rate bytes."""
    memory: Annotated[Literal[6, 8, 10, 12], EXACT] = 10
    """Bits of the trellis's state. Two more take four times as long to encode, as long to decode,
    and come nearer to the bound."""


@dataclass(frozen=True)
class LayoutSide:
    """Side information of a frame, from which the layout of its bits follows; see the table
    above."""

    profile: int
    floor: int
    lower: Ints


class KltTrellis(AdaptiveTransformCodec, RatedCodec):
    """Contracts, whatever the update. Whoever can encode can decode."""

    code = 23
    settings: KltTrellisSettings

    def __init__(
        self, settings: CodecSettings, layout: Layout, model: Model, *, epoch: int = 0
    ) -> None:
        assert isinstance(settings, KltTrellisSettings)
        super().__init__(settings, layout, model, epoch=epoch)
        self.budget = self.frame_size(settings, layout)
        self._bits = 8 * (self.budget - OVERHEAD - _HEAD.size - self.num_groups)
        cells = (
            np.repeat([factor.group for factor in self.factors], layout.sizes) * _CELLS
            + spreads(self.factors, model)
            + _CODES
        )
        order = np.argsort(cells, kind="stable")
        self._place = self.transform.place[order]
        self._cells = cells[order]
        self._most = min(_MOST, settings.memory)
        self._counts = np.bincount(cells, minlength=self.num_groups * _CELLS).reshape(
            self.num_groups, _CELLS
        )
        self._first = (np.cumsum(self._counts) - self._counts.ravel()).reshape(self._counts.shape)
        self._profiles = self._foresee()
        marks = struct.pack(
            "<IIBB",
            layout.fingerprint,
            zlib.crc32(self._profiles.tobytes()),
            settings.memory,
            epoch,
        )
        self._fingerprint = self.checksum(marks)

    def _foresee(self) -> Ints:
        """Return the logarithms of standard deviations (profiles, groups, cells), 1/8 octave, of
        unit mean power in a group."""
        groups = self.model.groups.numpy().astype(np.float64)
        update = (
            power(np.arange(-_CODES, _CODES + 1))
            * power((groups - groups.max()).clip(-_CODES))[:, None]
        )
        variance = update
        profiles = []

        for age in range(max(_AGES) + 1):
            for exponent in _POWERS if age in _AGES else ():
                flattened = variance**exponent
                mean = (flattened * self._counts).sum(1) / self._counts.sum(1)
                profiles.append(np.rint(OCTAVE / 2 * np.log2(flattened / mean[:, None])))

            bits = np.maximum(
                np.log2(variance / water_level(variance, self._counts, self._bits)) / 2, 0
            )
            variance = update + variance * 4.0 ** -worth(bits)

        return np.stack([*profiles, np.zeros_like(update)]).astype(np.int64)

    @property
    def fingerprint(self) -> int:
        """CRC-32 of the layout, the epoch, all that is published and the profiles that this machine
        computed of it."""
        return self._fingerprint

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, KltTrellisSettings)
        groups = 1 + max(factor.group for factor in factors_of(layout))
        return OVERHEAD + body_room(layout, settings, least=_HEAD.size + groups + 1)

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """Code the flattened update (numel,); see `Codec.body`."""
        shift = math.frexp(float(vector.abs().max()))[1]  # squares end where fp32 ends
        latent = (
            self.transform.forward((vector.double() * 2.0**-shift).float())
            .numpy()
            .astype(np.float64)
        )
        energies = np.bincount(self._cells, latent[self._place] ** 2, self._counts.size).reshape(
            self._counts.shape
        )
        top, lower = loudness(energies.sum(1) / self._counts.sum(1))
        unit = 2.0 ** (top / OCTAVE)
        profiles = (self._classes(profile, lower) for profile in range(len(self._profiles)))
        profile, floor = best_layout(
            profiles,
            self._counts,
            energies / unit**2,
            room_bits=self._bits,
            most_bits=self._most,
        )
        side = LayoutSide(profile, floor, lower)
        where, classes = self._sent(side)
        path = b""
        gain = 0

        if len(where):
            plan = self._plan(classes)
            padded = np.zeros(plan.size, dtype=np.float32)
            padded[: len(where)] = rotated(latent[where] / unit, classes)
            rows = np.ascontiguousarray(padded.reshape(plan.length, plan.blocks).T)
            bits = best_path(rows, plan, self.settings.memory)
            decoded = follow(bits, plan, self.settings.memory).reshape(rows.shape)
            path = np.packbits(bits).tobytes()
            gain = int(
                np.clip(np.rint(_GAIN * (rows * decoded).sum() / (decoded**2).sum()), 0, 255)
            )

        head = _HEAD.pack(side.profile, gain, side.floor, top + shift * OCTAVE)
        return head + lower.astype(np.uint8).tobytes() + path

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        profile, gain, floor, top = (int(reader.number(form)) for form in "BBBh")
        if profile >= len(self._profiles):
            raise WireError(f"klt_trellis: profile {profile}, there are {len(self._profiles)}")
        if top > OCTAVE * 128:
            raise WireError(f"klt_trellis: loudness {top} is beyond fp32")

        where, classes = self._sent(
            LayoutSide(profile, floor, reader.array("u1", self.num_groups).astype(np.int64))
        )
        if not len(where):
            return torch.zeros(self.layout.numel)

        plan = self._plan(classes)
        if plan.spans.max() > LONGEST:
            raise WireError(f"klt_trellis: floor {floor} lies too far below the water level")

        path = np.unpackbits(
            np.frombuffer(reader.take(-(-plan.total // 8)), np.uint8), count=plan.total
        )
        decoded = (
            follow(path, plan, self.settings.memory).reshape(plan.blocks, plan.length).T.reshape(-1)
        )
        leading = bool((where < self.transform.num_tops).all())
        latent = np.zeros(self.transform.num_tops if leading else self.layout.numel, np.float32)
        latent[where] = rotated(decoded[: len(where)], classes, back=True)
        vector = self.transform.inverse(torch.from_numpy(latent))
        size = gain / _GAIN * 2.0 ** (top / OCTAVE)
        vector_fp32: Tensor = (size * vector.double()).clamp(-3e38, 3e38).float()

        return vector_fp32

    def _classes(self, profile: int, lower: Ints) -> Ints:
        """Return the log2 of every cell's expected standard deviation over the loudest group's RMS,
        1/8 octave; or `NOTHING`."""
        codes = self._profiles[profile] - lower[:, None]
        return np.where((lower[:, None] < SILENT) & (self._counts > 0), codes, NOTHING)

    def _sent(self, side: LayoutSide) -> tuple[NDArray[np.intp], Ints]:
        """Return what is sent, by falling class: the index of each among the coefficients of
        `Transform`, and its class."""
        codes = self._classes(side.profile, side.lower).ravel()
        loudest = int(codes.max())

        if loudest == NOTHING:
            return np.zeros(0, np.intp), np.zeros(0, np.int64)

        cells = np.flatnonzero(codes >= max(loudest - side.floor, NOTHING + 1))
        cells = cells[np.argsort(-codes[cells], kind="stable")]
        counts = self._counts.ravel()[cells]
        starts = np.repeat(self._first.ravel()[cells] - np.cumsum(counts) + counts, counts)
        most = FAINT * self._bits
        where = self._place[(starts + np.arange(len(starts)))[:most]]

        return where, np.repeat(codes[cells], counts)[:most]

    def _plan(self, classes: Ints) -> Plan:
        """Return how bits go to values of falling `classes`: each gets log2 of its standard
        deviation over the water level.

        Paths take values in turn, so that all are alike.
        """
        blocks = -(-len(classes) // BLOCK)
        column = classes[::blocks]
        bits = self._bits // blocks
        length = len(column)
        shares = length * column - int(column.sum()) + OCTAVE * bits  # 1 / (8 length) bits
        shares = np.maximum(shares, length * OCTAVE // FAINTEST + 1)
        ends = bits * np.cumsum(shares) // int(shares.sum())
        each = np.minimum(np.diff(ends, prepend=0), self._most)
        last = np.flatnonzero(each)
        spans = np.diff(last, prepend=-1)
        first = last - spans + 1
        variance = np.add.reduceat(4.0 ** (column / OCTAVE), first) / spans
        rate = np.add.reduceat(shares, first) / spans * (bits / int(shares.sum()))
        scales = np.sqrt(variance * (1 - 4.0**-rate)).astype(np.float32)

        return Plan(blocks * length, blocks, length, each[last], spans, scales)
