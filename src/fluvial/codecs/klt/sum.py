"""The transform of `klt` under secure aggregation: frames are added modulo 2^b without being
decoded.

Ours. Only the coefficients with the largest published variance are sent, as many as the rate
allows, each in steps proportional to its published standard deviation, clipped, and rounded at
random so that its mean is exact. All of that is public and the same for every site, so that the sum
of the integers is the integer of the sum. There is no entropy coding: it would depend on what the
site alone knows, and a masked integer has no entropy to save.

    body      bytes           what
    epoch     1               of the transform, as in `klt`
    integers  ceil(K b / 8)   modulo 2^b, b bits each, lowest first, by falling published variance
"""

import math
import struct
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fluvial.codecs.base import CodecSettings, body_room
from fluvial.codecs.klt.base import TransformCodec, TransformSettings
from fluvial.codecs.klt.factors import factors_of
from fluvial.codecs.klt.model import Model
from fluvial.codecs.klt.tables import OCTAVE
from fluvial.codecs.klt.transform import spreads
from fluvial.errors import ConfigError, WireError
from fluvial.wire.frame import Reader, unseal
from fluvial.wire.tensors import Layout, Named

Integers = NDArray[np.int64]

_CLIP = 3.0
"""Standard deviations at which a coefficient is clipped."""


class KltSumSettings(TransformSettings):
    """The transform of klt, with frames that can be added up unread (ours; it needs a fit).

    Bytes per value: 4 / rate. Lost: more than with klt.
    """

    name: Literal["klt_sum"] = "klt_sum"
    """Name of the codec."""
    rate: float = Field(64, ge=2, le=4096)
    """Times smaller than fp32: a frame, its header included, has at most 4 * numel / rate bytes."""
    max_sites: int = Field(64, ge=1, le=65536)
    """Frames that can be added before the integers overflow."""
    levels: int = Field(7, ge=1, le=1023)
    """The largest integer of one site; an integer takes log2(2 * levels * max_sites + 1) bits."""

    @property
    def bits(self) -> int:
        """Bits of an integer."""
        return (2 * self.levels * self.max_sites).bit_length()


class KltSum(TransformCodec):
    """Sums of updates from sums of frames; updates should be about as large as those of the fit."""

    code = 21
    settings: KltSumSettings

    def __init__(
        self, settings: CodecSettings, layout: Layout, model: Model, *, epoch: int = 0
    ) -> None:
        assert isinstance(settings, KltSumSettings)
        super().__init__(settings, layout, model, epoch=epoch)
        self.kept = _kept(settings, layout)
        groups = model.groups.numpy().astype(np.int32)[[factor.group for factor in self.factors]]
        spread = spreads(self.factors, model) + np.repeat(groups, layout.sizes)
        chosen = np.argsort(-spread, kind="stable")[: self.kept]
        self._where = self.transform.place[chosen]
        self._rest = bool((self._where >= self.transform.num_tops).any())
        self._steps = np.exp2(spread[chosen] / OCTAVE) * (_CLIP / settings.levels)
        marks = struct.pack("<IHIB", layout.fingerprint, settings.levels, settings.max_sites, epoch)
        self._fingerprint = self.checksum(marks)

    @property
    def fingerprint(self) -> int:
        """CRC-32 of the layout, the epoch, the size of the integers and all that is published."""
        return self._fingerprint

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, KltSumSettings)
        factors_of(layout)
        _kept(settings, layout)
        return int(layout.raw_bytes / settings.rate)

    def body(self, vector: Tensor, seed: int) -> bytes:
        """Return the epoch and the integers of one site."""
        return self._pack(self.quantise(vector, seed))

    def quantise(self, vector: Tensor, seed: int) -> Integers:
        """Return the integers (kept,) within -levels and levels, whose mean over seeds is the
        clipped coefficient in steps."""
        latent = self.transform.forward(vector, rest=self._rest).numpy()[self._where]
        values = np.clip(latent / self._steps, -self.settings.levels, self.settings.levels)
        words = np.random.PCG64(seed % (1 << 64)).random_raw(self.kept) >> np.uint64(11)
        integers: Integers = np.floor(values + words * 2.0**-53).astype(np.int64)

        return np.minimum(integers, self.settings.levels)

    def synthesise(self, integers: Integers) -> Tensor:
        """Return the update (numel,) of integers (kept,), which may be a sum."""
        latent = np.zeros(self.layout.numel if self._rest else self.transform.num_tops, np.float32)
        latent[self._where] = integers * self._steps
        return self.transform.inverse(torch.from_numpy(latent))

    def parse(self, reader: Reader) -> Tensor:
        """Return the update of one site."""
        return self.synthesise(self._signed(self._unpack(reader), 1))

    def sum_frames(self, frames: Sequence[bytes]) -> bytes:
        """Return the frame of the sum, of at most `max_sites` frames of one round; masks that
        cancel in it may be added.

        Raises `WireError` if one of them is damaged, or of another round or codec than the first.
        """
        if not 1 <= len(frames) <= self.settings.max_sites:
            raise ConfigError(
                f"codec: {len(frames)} frames to add, codec.max_sites={self.settings.max_sites}; "
                "the sum would overflow"
            )

        round = struct.unpack_from("<H", frames[0], 2)[0] if len(frames[0]) >= 4 else 0
        total = np.zeros(self.kept, np.int64)
        for frame in frames:
            reader = unseal(frame, self.code, self.fingerprint, round=round)
            total += self._unpack(reader)
            reader.finish()

        return self.seal(self._pack(total), round=round)

    def decode_sum(self, wire: bytes, count: int, *, round: int | None = None) -> Named:
        """Return the sum of the updates of `count` sites from what `sum_frames` made of their
        frames."""
        reader = unseal(wire, self.code, self.fingerprint, round=round)
        vector = self.synthesise(self._signed(self._unpack(reader), count))
        reader.finish()

        if not bool(torch.isfinite(vector).all()):
            raise WireError("frame: decodes to NaN or Inf")
        return self.layout.unflatten(vector)

    def _pack(self, integers: Integers) -> bytes:
        """Return the integers modulo 2^b."""
        bits = (integers[:, None] >> np.arange(self.settings.bits)) & 1
        return (
            bytes([self.epoch])
            + np.packbits(bits.astype(np.uint8).ravel(), bitorder="little").tobytes()
        )

    def _unpack(self, reader: Reader) -> Integers:
        """Invert `_pack`, from 0 to 2^b - 1."""
        if reader.number("B") != self.epoch:
            raise WireError(f"klt_sum: of another transform epoch, expected {self.epoch}")

        bits = self.settings.bits
        count = self.kept * self.settings.bits
        flat = np.unpackbits(
            reader.array("u1", math.ceil(count / 8)).astype(np.uint8), bitorder="little"
        )

        if flat[count:].any():
            raise WireError("klt_sum: padding is not zero")

        integers: Integers = flat[:count].reshape(self.kept, bits).astype(np.int64) @ (
            1 << np.arange(bits)
        )
        return integers

    def _signed(self, integers: Integers, count: int) -> Integers:
        half = 1 << (self.settings.bits - 1)
        signed: Integers = (integers + half) % (2 * half) - half
        if (
            not 1 <= count <= self.settings.max_sites
            or int(np.abs(signed).max()) > count * self.settings.levels
        ):
            raise WireError(
                f"klt_sum: no sum of {count} sites with levels up to {self.settings.levels}; a "
                "mask is left, or sites "
                "are missing"
            )

        return signed


def _kept(settings: KltSumSettings, layout: Layout) -> int:
    """Return how many coefficients fit."""
    room = body_room(layout, settings, least=1 + math.ceil(settings.bits / 8))
    return min(8 * (room - 1) // settings.bits, layout.numel)
