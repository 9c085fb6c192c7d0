"""A linear autoencoder that carries real updates: a Karhunen-Loeve transform learned at TGAP, and
ANS.

Ours. The local optimiser makes updates look white value by value, yet along the feature axis of
every module they stay near one subspace, the same for all ranks, sites and rounds. `klt_model`
learns it. Coefficients are quantised with one step for everything, which is reverse water-filling,
and entropy-coded by the variances that `fit` saw, with the tables of `klt_tables`. The decoder is
the transpose.

Scales are logarithmic whole numbers, in 1/16 octave, so that both ends agree on every entropy model
exactly.

    body   bytes             what
    epoch  1                 of the transform: how often it was refitted, modulo 256
    step   2                 i16, log2 of the step in 1/256 octave
    seed   0, dithered: 4    u32, from which both ends draw the dither
    loud   1                 u8, how the loudest group (target, factor) stands above `fit` and the step, in 1/16 octave,
                             plus 96
    gains  ceil(groups / 2)  4 bits for each group, low bits first: 1/4 octaves below the loudest; 15: nothing is sent
    stream the rest          ANS, 32-bit words: levels by class, in it by group, in it by falling expected variance

Mode "biased" has thresholds and centroids of least squared error and needs error feedback at low
rates. In mode "dithered" the mean over seeds of what is decoded is the update: dither is added
before rounding and subtracted after, and of coefficients far below the step the seed draws a share
q, which are sent as x / q.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fluvial.codecs import entropy
from fluvial.codecs.base import (
    AdaptiveCodec,
    CodecSettings,
    LatentCodec,
    RateSettings,
    SteppedCodec,
    is_finite,
)
from fluvial.codecs.klt.model import Model, Transform, learn, parts_of, power, spreads
from fluvial.codecs.klt.moments import MomentCodec, Moments
from fluvial.codecs.klt.tables import (
    CLASS,
    FAINTEST,
    HIGH,
    KNOWN,
    LEARNED,
    OCTAVE,
    REACH,
    Codes,
    Doubles,
    Learned,
    Mode,
    Tables,
    drawn,
)
from fluvial.errors import ConfigError, WireError
from fluvial.wire.frame import OVERHEAD, Reader, unseal
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named

Floats = NDArray[np.float32]

_FINE = 256 // OCTAVE  # units of step per code
_QUIET, _LOUD = -96, 159  # codes between which the loudest group stands above `fit` and the step
_SILENT = 15
_QUIETEST = 14
_FAR = 2.0**-20  # a group whose power is below this share of the loudest is not sent
_STEPS = 126 * 256  # beyond, fp32 ends
_CODES = 254  # the largest sum of a row's and a column's logarithm
_LOWEST = -_CODES - CLASS * _QUIETEST
_STICKY = 8  # codes that `loud` may be off before the search starts again from there
_START = 12  # bits that the coder takes before the first symbol, about
_FEW = 0.01  # share of what is coded that may be sent as zeros to save half a transform
_EXCESS = 2.0  # bits that a clipped step counts as, so that outliers make the step coarser
_PRIOR = 2000.0  # coefficients that the generic tables count as, against those that `fit` sees
_HEAD = struct.Struct("<Bh")
_SEED = struct.Struct("<I")


class KltSettings(RateSettings):
    """Ours; the paper has no such codec."""

    name: Literal["klt"] = "klt"
    """Which codec."""
    rate: float = Field(64, ge=4, le=4096)
    """Times smaller than fp32: a frame, its header included, has at most 4 * numel / rate bytes."""
    basis_share: float = Field(0.25, ge=1e-6, le=1)
    """Feature directions that are published, as a share of the features; the others need no
    bytes."""
    mode: Mode = "biased"
    """Least squared error, or no error on average over seeds."""
    noise_ratio: float | None = Field(None, ge=1e-6, le=1e6)
    """Set, the rate holds for the first round only; then the server sets the step so that the
    codec's noise is this many times the variance between sites (SNR-driven rate)."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.mode == "dithered" and self.noise_ratio is not None:
            yield "noise_ratio: needs mode='biased'"
        if (
            self.mode == "dithered" and self.error_feedback
        ):  # feedback around a codec that enlarges diverges
            yield "mode='dithered' diverges with error_feedback=true; choose one of the two"


@dataclass(frozen=True)
class Side:
    """What of a frame says which class every coefficient is of."""

    step: int
    """Logarithm of the step, in 1/256 octave."""
    loud: int
    """Of the loudest group's level against `fit` and the step, in codes."""
    gains: Codes
    """By how many classes each group is below; 15: silent."""


@dataclass(frozen=True)
class Runs:
    """The coefficients that are coded, in wire order."""

    sizes: Codes
    """How many are of each class."""
    where: NDArray[np.intp]
    """Index of each among the coefficients of `Transform`."""
    share: Floats | None = None
    """Mode "dithered": with which probability each is sent."""


class Klt(LatentCodec, AdaptiveCodec, SteppedCodec, MomentCodec):
    """Tied encoder and decoder: whoever can encode can decode."""

    code = 12
    settings: KltSettings

    def __init__(
        self, settings: CodecSettings, layout: Layout, model: Model, *, epoch: int = 0
    ) -> None:
        assert isinstance(settings, KltSettings)
        super().__init__(settings, layout)
        self.model = model
        self.epoch = epoch
        self.parts = parts_of(layout)
        self.num_groups = 1 + max(part.group for part in self.parts)
        self.budget = self.frame_size(settings, layout)
        self.tables = Tables(
            "feedback" if settings.error_feedback else settings.mode, model.learned
        )
        self.transform = Transform(self.parts, settings.basis_share, model)
        self._dithered = settings.mode == "dithered"
        self._zero_bits = _zero_bits(self.tables, self._dithered)
        self._overhead = _overhead(self.num_groups, settings)
        self._sort()
        published = [tensor.numpy().tobytes() for _, tensor in sorted(model.named().items())]
        marks = struct.pack("<IIB", layout.fingerprint, self.tables.digest, epoch)
        self._fingerprint = zlib.crc32(b"".join([marks, *published]))

    def _sort(self) -> None:
        """Coefficients by group, then by falling expected variance, then in layout order."""
        spread = spreads(self.parts, self.model)
        groups = np.repeat([part.group for part in self.parts], self.layout.sizes)
        order = np.argsort(groups * (2 * _CODES + 1) - spread, kind="stable")
        self._place = self.transform.place[order]
        cells = groups * (2 * _CODES + 1) + spread + _CODES
        self._histogram = np.bincount(cells, minlength=self.num_groups * (2 * _CODES + 1)).reshape(
            self.num_groups, -1
        )
        self._expected = (self._histogram * power(np.arange(-_CODES, _CODES + 1))).sum(1)
        self._above = np.zeros((self.num_groups, 2 * _CODES + 2), np.int64)
        """How many coefficients of a group have at least a logarithm, which is the column -
        _CODES."""
        self._above[:, :-1] = self._histogram[:, ::-1].cumsum(1)[:, ::-1]
        self._first = np.concatenate([[0], np.cumsum(self._above[:, 0])[:-1]])
        self._reach, self._beyond = self._reaches(spread)
        sizes = [part.rank * part.features for part in self.parts]
        self._piece = math.gcd(*sizes)
        self._owner = np.repeat([part.group for part in self.parts], np.array(sizes) // self._piece)
        """The group of every piece of the flattened update."""

    def _reaches(self, spread: Codes) -> tuple[Codes, NDArray[np.int64]]:
        """What says which columns of the transform are needed.

        The largest logarithm in each batch and group from each column on (batches, groups,
        features), and how many coefficients of each group have at least a logarithm among the
        directions that are not published.
        """
        widest = max(part.features for part in self.parts)
        reach = np.full((len(self.transform.batches), self.num_groups, widest), -10000)
        beyond = np.zeros((self.num_groups, 2 * _CODES + 2), np.int64)
        pieces = np.split(spread, np.cumsum(self.layout.sizes)[:-1])

        for found, batch in zip(reach, self.transform.batches, strict=True):
            for index in batch.where:
                group = self.parts[index].group
                codes = pieces[index].reshape(-1, batch.features)
                np.maximum(
                    found[group, : batch.features], codes.max(0), out=found[group, : batch.features]
                )
                beyond[group, :-1] += np.bincount(
                    codes[:, batch.kept :].ravel() + _CODES, minlength=2 * _CODES + 1
                )

        reach = np.maximum.accumulate(reach[..., ::-1], axis=2)[..., ::-1]
        beyond = beyond[:, ::-1].cumsum(1)[:, ::-1]
        return np.ascontiguousarray(reach, dtype=np.int32), beyond

    @property
    def fingerprint(self) -> int:
        """CRC-32 of the layout, the epoch and all that is published, entropy tables included."""
        return self._fingerprint

    @classmethod
    def fit(
        cls,
        settings: CodecSettings,
        layout: Layout,
        updates: Sequence[Named],
        *,
        seed: int,  # noqa: ARG003
    ) -> Self:
        """Principal directions, variances and tables of `updates`; every update counts the same."""
        assert isinstance(settings, KltSettings)
        if not updates:
            raise ConfigError(
                "codec: klt has no updates to learn from; TGAP must collect at least one"
            )

        cls.frame_size(settings, layout)
        codec = cls(
            settings.model_copy(update={"mode": "biased", "error_feedback": False}),
            layout,
            learn(layout, settings.basis_share, updates),
        )
        learned = codec._observe(updates)
        tables = {
            "counts": torch.from_numpy(learned.counts.reshape(-1).copy()),
            "centroids": torch.from_numpy(learned.centroids.reshape(-1).copy()),
        }

        return cls(settings, layout, Model(**{**codec.model.named(), **tables}))

    @classmethod
    def fit_moments(cls, settings: CodecSettings, layout: Layout, moments: Moments) -> Self:
        """Principal directions and variances alone; tables stay generic, because moments hold no
        histogram."""
        assert isinstance(settings, KltSettings)
        cls.frame_size(settings, layout)
        return cls(settings, layout, moments.fit(layout, settings.basis_share))

    def refit(self, updates: Sequence[Named], *, weight: float) -> Self:
        """The codec of the next epoch, for updates like `updates`, such as decoded ones or
        broadcast means.

        Their covariance counts `weight` (0 to 1), this codec's own the rest; entropy tables stay. A
        function of what is published and of `updates` alone, so that both ends can compute it.
        """
        if not updates:
            raise ConfigError("codec: klt has no updates to refit to")

        model = learn(
            self.layout, self.settings.basis_share, updates, prior=self.model, weight=weight
        )
        return type(self)(self.settings, self.layout, model, epoch=(self.epoch + 1) % 256)

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, KltSettings)
        groups = 1 + max(part.group for part in parts_of(layout))
        budget = int(layout.raw_bytes / settings.rate)
        overhead = _overhead(groups, settings)

        if budget < overhead + 16:
            raise ConfigError(
                f"codec: rate={settings.rate:g} leaves {budget} bytes for {layout.numel} values; a frame of klt "
                f"needs {overhead} before the first; choose a lower rate"
            )

        return budget

    def published(self, *, decoder: bool) -> Payload:  # noqa: ARG002 - the encoder is the decoder
        """The model, mostly `basis_share` of every feature axis at one byte per value, and the
        epoch."""
        return Payload(self.model.named(), {"epoch": self.epoch})

    @classmethod
    def from_published(cls, settings: CodecSettings, layout: Layout, payload: Payload) -> Self:
        """Rebuild; raises `WireError` if something is missing, left over, or of another type,
        length or range."""
        assert isinstance(settings, KltSettings)
        epoch = payload.value("epoch", int)

        if not 0 <= epoch < 256:
            raise WireError(f"klt: epoch {epoch} is not within 0 and 255")

        return cls(
            settings, layout, Model.check(layout, settings.basis_share, payload), epoch=epoch
        )

    def analyse(self, vector: Tensor) -> Tensor:
        """Coefficients (numel,); norms are kept."""
        return self.transform.forward(vector)

    def synthesise(self, latent: Tensor) -> Tensor:
        """Inverse of `analyse`."""
        return self.transform.inverse(latent)

    def encode_at(self, update: Named, step: float, *, seed: int = 0, round: int = 0) -> bytes:
        """The frame for `update` with a given step (> 0), whatever its bytes; a step is rounded to
        1/256 octave."""
        number = int(np.clip(np.rint(256 * np.log2(step)), -_STEPS, _STEPS))
        vector = self.flat(update)
        encoder = _Encoder(self, self._energies(vector), vector=vector)
        encoder.settle(number)

        return self.seal(encoder.write(number, seed), round=round)

    def body(self, vector: Tensor, seed: int) -> bytes:
        return _Encoder(self, self._energies(vector), vector=vector).best(seed)

    def pack(self, latent: Tensor, side: bytes = b"", *, seed: int = 0) -> bytes:
        """Quantise with the finest step whose frame is within the budget."""
        assert not side, "all side information is of the latent"
        assert is_finite(latent), "an update whose coefficients overflow fp32 must not be sent"
        sizes = self._above[:, 0]
        groups = np.repeat(np.arange(self.num_groups), sizes)
        values = latent.numpy()[self._place].astype(np.float64)
        energies = np.bincount(groups, values**2, self.num_groups).astype(np.float64)

        return _Encoder(self, energies, latent=latent).best(seed)

    def _energies(self, vector: Tensor) -> Doubles:
        """Sum of squares of every group; the transform keeps it."""
        small = not 1e-20 < float(vector @ vector) < 1e30  # squares end where fp32 ends
        norms = torch.linalg.vector_norm(
            vector.view(-1, self._piece), dim=1, dtype=torch.float64 if small else None
        )

        return np.bincount(self._owner, norms.double().square().numpy(), self.num_groups).astype(
            np.float64
        )

    def parse(self, reader: Reader) -> Tensor:
        """Entropy-decode class by class, then centroids and the transpose of the transform."""
        side, runs, levels, dither = self._read(reader)
        levels += np.repeat(self.tables.start, runs.sizes)
        values = self.tables.values.take(levels)

        if self._dithered:
            values -= dither

        columns = self._columns(
            side, rest=bool(values[runs.where >= self.transform.num_tops].any())
        )
        latent = np.zeros(self.layout.numel, np.float32)
        with np.errstate(over="ignore"):  # what overflows is refused
            latent[runs.where] = values * np.exp2(side.step / 256)
        return self.transform.inverse(torch.from_numpy(latent), columns=columns)

    def decode(self, wire: bytes, *, round: int | None = None) -> Named:
        """The update that `wire` carries; raises `WireError`, which says so if the sender has
        another transform."""
        self._check_epoch(wire)
        return super().decode(wire, round=round)

    def step_of(self, wire: bytes) -> float:
        """The quantiser's step."""
        return float(2 ** (self._read(self._unsealed(wire))[0].step / 256))

    def noise_of(self, wire: bytes) -> float:
        """Expected squared error of what `wire` carries, from its levels and the variances of
        `fit`.

        Reads the levels, but does not run the transform.
        """
        side, runs, levels, _ = self._read(self._unsealed(wire))
        coded = float(self.tables.noise[np.repeat(self.tables.start, runs.sizes) + levels].sum())
        codes = np.arange(-_CODES, _CODES + 1) + (side.loud - CLASS * side.gains)[:, None]
        below = np.minimum(codes // CLASS - self.tables.low, 0)
        below[side.gains == _SILENT] = 0
        missed = 1 / drawn(below) - 1 if self._dithered else below < 0
        lost = float((self._histogram * power(codes) * missed).sum())

        return (coded + lost) * float(4.0 ** (side.step / 256))

    def _unsealed(self, wire: bytes) -> Reader:
        self._check_epoch(wire)
        return unseal(wire, self.code, self.fingerprint)

    def _check_epoch(self, wire: bytes) -> None:
        whole = len(wire) > OVERHEAD and zlib.crc32(wire[:-4]) == struct.unpack("<I", wire[-4:])[0]
        if whole and wire[1] == self.code and wire[8] != self.epoch:
            raise WireError(
                f"klt: a frame of transform epoch {wire[8]}, this end has epoch {self.epoch}; both ends need the same "
                "published transform"
            )

    def _read(self, reader: Reader) -> tuple[Side, Runs, Codes, Floats | float]:
        """All of a body: side information, what is coded, its levels and their dither."""
        epoch = reader.number("B")
        step = int(reader.number("h"))

        if epoch != self.epoch:
            raise WireError(f"klt: transform epoch {epoch}, expected {self.epoch}")
        if abs(step) > _STEPS:
            raise WireError(f"klt: step 2^({step}/256) is beyond fp32")

        seed = int(reader.number("I")) if self._dithered else 0
        loud = int(reader.number("B")) + _QUIET
        packed = reader.array("u1", (self.num_groups + 1) // 2).astype(np.int32)
        gains = np.stack([packed & 15, packed >> 4], axis=1).ravel()

        if gains[self.num_groups :].any():
            raise WireError("klt: padding of the gains is not zero")

        side = Side(step, loud, gains[: self.num_groups])
        runs = self._runs(side)
        dither: Floats | float = 0.0

        if self._dithered:
            _, runs, dither = _draw(runs, seed)

        stream = entropy.Stream(reader.take(reader.left))
        levels = [
            stream.take_with(table.model, int(size)) - len(table.counts) + 1
            for table, size in zip(self.tables.tables, runs.sizes, strict=True)
            if size
        ]
        stream.finish()

        return side, runs, np.concatenate([np.zeros(0, np.int32), *levels]), dither

    def _runs(self, side: Side) -> Runs:
        """What is coded, in wire order; in mode "dithered" all that may be drawn."""
        least = FAINTEST if self._dithered else self.tables.low
        codes = (
            CLASS * np.arange(least, HIGH + 1)[:, None] - side.loud + CLASS * side.gains
        )  # (classes, groups)
        above = self._above[np.arange(self.num_groups), np.clip(codes + _CODES, 0, 2 * _CODES + 1)]

        if self._dithered:
            above[0] = self._above[:, 0]

        above[:, side.gains == _SILENT] = 0
        louder = np.concatenate([above[1:], np.zeros((1, self.num_groups), np.int64)])
        counts = (above - louder).ravel()
        sizes = (above - louder).sum(1)
        starts = (self._first + louder).ravel()
        where = self._place[
            np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        ]

        if not self._dithered:
            return Runs(sizes.astype(np.int32), where)

        faint = self.tables.low - least
        share = np.repeat(drawn(np.arange(-faint, len(sizes) - faint)), sizes).astype(np.float32)
        return Runs(
            np.append(sizes[: faint + 1].sum(), sizes[faint + 1 :]).astype(np.int32), where, share
        )

    def _columns(self, side: Side, *, rest: bool) -> list[int]:
        """How many columns of each batch hold what is coded; without `rest`, of those that are
        published."""
        most = [batch.features if rest else batch.kept for batch in self.transform.batches]
        if self._dithered:
            return most
        shift = np.where(side.gains == _SILENT, -10000, side.loud - CLASS * side.gains)[:, None]
        reached = (self._reach + shift >= CLASS * self.tables.low).any(1).sum(1)
        return [int(count) for count in np.minimum(reached, most)]

    def _needs_rest(self, side: Side) -> bool:
        """Whether more is coded along directions that are not published than is worth the time:
        sent as zeros."""
        if self._dithered:
            return True

        codes = CLASS * (self.tables.low + side.gains) - side.loud + _CODES
        cell = np.arange(self.num_groups), np.clip(codes, 0, 2 * _CODES + 1)
        sent = side.gains != _SILENT

        return bool(self._beyond[cell][sent].sum() > _FEW * self._above[cell][sent].sum())

    def _observe(self, updates: Sequence[Named]) -> Learned:
        """Tables from the levels of `updates`, at the rate's step and half an octave around it."""
        seen, sums = np.zeros((2, LEARNED * KNOWN))
        for update in updates:
            vector = self.layout.flatten(update)
            encoder = _Encoder(self, self._energies(vector), vector=vector)
            best = encoder.search()

            for step in (best - 128, best, best + 128):
                number, level, size = encoder.magnitudes(step)
                inside = (number < LEARNED) & (level < KNOWN)
                cell = number[inside] * KNOWN + level[inside]
                seen += np.bincount(cell, minlength=len(seen)) / 3
                sums += np.bincount(cell, size[inside], minlength=len(sums)) / 3

        return Learned.blend(seen.reshape(LEARNED, KNOWN), sums.reshape(LEARNED, KNOWN), _PRIOR)


class _Encoder:
    """One update on its way into a frame of `codec`."""

    def __init__(
        self,
        codec: Klt,
        energies: Doubles,
        *,
        vector: Tensor | None = None,
        latent: Tensor | None = None,
    ) -> None:
        """`energies` are those of the groups; either the update (numel,) or all its coefficients
        are given."""
        self.codec = codec
        self.tables = codec.tables
        self._vector = vector
        self._latent = latent
        loudness = OCTAVE / 2 * np.log2(np.maximum(energies, 1e-80) / codec._expected)
        self.top = float(loudness.max())
        gains = np.clip(np.rint((self.top - loudness) / CLASS), 0, _QUIETEST)
        silent = energies <= (0 if codec._dithered else _FAR * energies.max())
        self.gains = np.where(silent, _SILENT, gains).astype(np.int32)
        self._loud = 0
        self._columns: list[int] | None = None
        self._coded: _Coded | None = None

    def settle(self, step: int) -> None:
        """Choose what is coded at all: what the variances and loudness say for a step."""
        self._loud = min(max(round(self.top - step / _FINE), _QUIET), _LOUD)

    def best(self, seed: int) -> bytes:
        """The body with the finest step within the budget."""
        step = self.search()
        while step <= _STEPS:
            if len(body := self.write(step, seed)) + OVERHEAD <= self.codec.budget:
                return body
            step += 1

        self.gains[:], self._coded = (
            _SILENT,
            None,
        )  # only with variances that no `fit` has published
        return self.write(0, seed)

    def search(self) -> int:
        """The finest step that fits: expected bits give a first guess, exact bits of a few trials
        the rest.

        More than _STEPS if none does.
        """
        if (self.gains == _SILENT).all():
            return 0

        room = 32 * ((self.codec.budget - self.codec._overhead) // 4) - _START
        codes, slope = self._guess(room)
        step = min(max(round(_FINE * (self.top - codes)), -_STEPS), _STEPS)
        found: tuple[int, int] | None = None

        for _ in range(_QUIET, _LOUD, _STICKY):
            self.settle(step)
            fits, step = self._search_at(step, room, slope)
            if fits is not None:
                again = found is None and self._loud - self.top + step / _FINE < -_STICKY
                found = (fits, self._loud)
                if not again:
                    break
            elif found is not None:
                break

        if found is None:
            return _STEPS + 1

        self._loud = found[1]
        return found[0]

    def _search_at(self, step: int, room: float, slope: float) -> tuple[int | None, int]:
        """The same while what is coded at all stays, so that bits fall steadily with the step; and
        the last step tried.

        None if the step must be so much coarser that less should be coded.
        """
        if self._sum(self.codec._zero_bits, self._loud) > room:
            return None, step + _FINE * _STICKY

        fits = None
        fails = -_STEPS - 1
        before: tuple[int, float] | None = None

        for _ in range(16):
            if step / _FINE > self.top - self._loud + _STICKY or step > _STEPS:
                return None, min(step, _STEPS)

            bits = self.bits(step)
            if bits <= room:
                fits = step
            else:
                fails = step

            if 0.997 * room - 16 <= bits <= room or (fits is not None and fits - fails <= 1):
                break
            if before is not None and before[0] != step and before[1] != bits:
                slope = max((before[1] - bits) / (step - before[0]), slope / 4)

            before = step, bits
            step = max(step + math.ceil((bits - 0.998 * room) / slope), fails + 1)
            step = step if fits is None else min(step, fits - 1)

        return fits, step if fits is None else fits

    @cached_property
    def _histogram(self) -> NDArray[np.int64]:
        """How many coefficients are of each logarithm, gains counted in, from _LOWEST."""
        histogram = np.zeros(2 * _CODES + 1 + CLASS * _QUIETEST, np.int64)
        for gain, counts in zip(self.gains.tolist(), self.codec._histogram, strict=True):
            if gain != _SILENT:
                start = CLASS * (_QUIETEST - gain)
                histogram[start : start + len(counts)] += counts

        return histogram

    def _sum(self, bits: Doubles, loud: int) -> float:
        """Over all coefficients, of bits for each logarithm of sigma / step from -REACH to
        REACH."""
        first = REACH + _LOWEST + loud
        return float(self._histogram @ bits[first : first + len(self._histogram)])

    def _guess(self, room: float) -> tuple[float, float]:
        """Where the loudest group stands above the step, in codes, to take `room` bits, and bits
        per unit of step."""

        def expected(loud: int) -> float:
            return self._sum(self.tables.expected_bits, loud)

        quiet = _QUIET
        loud = _LOUD
        while loud - quiet > 1:
            middle = (quiet + loud) // 2
            quiet, loud = (quiet, middle) if expected(middle) > room else (middle, loud)

        below = expected(quiet)
        above = expected(loud)
        share = min(max((room - below) / max(above - below, 1e-9), 0), 1)

        if (
            above > 1.1 * room
        ):  # many coefficients are of one variance; better none than all of them
            share = 0.0

        rise = (expected(quiet + 2) - expected(quiet - 2)) / 4
        return quiet + share, max(rise, 1.0) / _FINE

    def coded(self, step: int) -> "_Coded":
        """What is coded; the same for all steps while `settle` has not been called."""
        if self._coded is None or self._coded.loud != self._loud:
            codec = self.codec
            side = Side(step, self._loud, self.gains)
            runs = codec._runs(side)

            if self._vector is not None:
                columns = codec._columns(side, rest=codec._needs_rest(side))
                if (
                    self._latent is None
                    or self._columns is None
                    or np.any(np.greater(columns, self._columns))
                ):
                    self._latent = codec.transform.forward(self._vector, columns=columns)
                    self._columns = columns

            assert self._latent is not None
            self._coded = _Coded(self._loud, runs, self._latent.numpy(), self.tables)

        return self._coded

    def bits(self, step: int) -> float:
        """What the levels take; in mode "dithered" what they take for nearly all seeds."""
        coded = self.coded(step)
        if not self.codec._dithered:
            level, excess = coded.levels(step)
            index = level.astype(np.intp)
            index += coded.start
            return float(self.tables.bits.take(index).sum(dtype=np.float64)) + _EXCESS * excess

        values = coded.scaled(step)
        start = coded.start
        most = coded.most
        whole = np.floor(values)
        share = values - whole
        lower = np.clip(whole, -most, most).astype(np.int32)
        upper = np.clip(whole + 1, -most, most).astype(np.int32)
        excess = float(np.maximum(np.abs(values) - most, 0).sum())
        low = self.tables.bits[start + lower]
        high = self.tables.bits[start + upper]
        bits = low + share * (high - low)
        sent = coded.runs.share
        assert sent is not None
        mean = float((sent * bits).sum(dtype=np.float64))
        variance = float(
            (sent * (share * (1 - share) * (high - low) ** 2 + (1 - sent) * bits**2)).sum(
                dtype=np.float64
            )
        )

        return mean + 2 * math.sqrt(variance) + 8 * _EXCESS * excess

    def magnitudes(self, step: int) -> tuple[Codes, Codes, Floats]:
        """Number of class, level and magnitude of all that is coded; mode "biased"."""
        self.settle(step)
        coded = self.coded(step)
        number = np.repeat(np.arange(len(self.tables), dtype=np.int32), coded.runs.sizes)
        return number, coded.levels(step)[0].astype(np.int32), np.abs(coded.scaled(step))

    def write(self, step: int, seed: int) -> bytes:
        """The body with a step."""
        codec = self.codec
        seed = seed % (1 << 32)
        coded = self.coded(step)
        runs = coded.runs
        most = coded.most

        if codec._dithered:
            sent, runs, dither = _draw(runs, seed)
            most = most[sent]
            level = np.clip(
                np.floor(coded.scaled(step)[sent] + dither + np.float32(0.5)), -most, most
            )
        else:
            level = np.copysign(coded.levels(step)[0], coded.values)

        symbols = (level + most).astype(np.int32)
        ends = np.cumsum(runs.sizes)
        parts = [
            (symbols[end - size : end], table.model)
            for end, size, table in zip(
                ends.tolist(), runs.sizes.tolist(), self.tables.tables, strict=True
            )
            if size
        ]
        head = _HEAD.pack(codec.epoch, step) + (_SEED.pack(seed) if codec._dithered else b"")
        gains = np.concatenate([self.gains, np.zeros(len(self.gains) % 2, np.int32)]).reshape(-1, 2)
        packed = (gains[:, 0] | gains[:, 1] << 4).astype(np.uint8).tobytes()

        return b"".join([head, bytes([self._loud - _QUIET]), packed, entropy.encode_with(parts)])


class _Coded:
    """What is coded of one update, in wire order, with the quantiser of each value's class."""

    def __init__(self, loud: int, runs: Runs, latent: Floats, tables: Tables) -> None:
        self.loud = loud
        self.runs = runs
        self.values: Floats = latent.take(runs.where)
        self._sizes: Floats = np.abs(self.values)
        self._zero_below, self._offset = (
            np.repeat(tables.zero_below, runs.sizes),
            np.repeat(tables.offset, runs.sizes),
        )
        self.start = np.repeat(tables.start.astype(np.intp), runs.sizes)
        self.most: Floats = np.repeat(tables.levels.astype(np.float32), runs.sizes)

    def scaled(self, step: int) -> Floats:
        """In steps; in mode "dithered" as large as if drawn."""
        values: Floats = self.values * np.float32(2.0 ** (-step / 256))
        return values if self.runs.share is None else values / self.runs.share

    def levels(self, step: int) -> tuple[Floats, float]:
        """Magnitudes, and by how many steps in all they are clipped; mode "biased"."""
        sizes: Floats = self._sizes * np.float32(2.0 ** (-step / 256))
        large = sizes >= self._zero_below
        sizes += self._offset
        np.floor(sizes, out=sizes)
        sizes *= large
        levels: Floats = np.minimum(sizes, self.most)

        return levels, float(sizes.sum() - levels.sum())


def _draw(runs: Runs, seed: int) -> tuple[NDArray[np.bool_], Runs, Floats]:
    """Which of `runs` are sent, these, and the dither of each, within half a step.

    From raw words of PCG64, which stay the same; both are multiples of 2^-24.
    """
    assert runs.share is not None
    words = np.random.PCG64(seed).random_raw(len(runs.where))
    sent = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24) < runs.share
    dither = (words & np.uint64(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24) - np.float32(
        0.5
    )
    sizes = runs.sizes.copy()
    sizes[0] = np.count_nonzero(sent[: sizes[0]])

    return sent, Runs(sizes, runs.where[sent], runs.share[sent]), dither[sent]


def _zero_bits(tables: Tables, dithered: bool) -> Doubles:
    """Bits of a coefficient that becomes 0, for each logarithm of sigma / step: no step makes it
    take fewer."""
    classes = np.arange(-REACH, REACH + 1) // CLASS - tables.low
    bits = tables.bits[tables.start].astype(np.float64)
    return np.where((classes < 0) | dithered, 0.0, bits[classes.clip(0, len(bits) - 1)])


def _overhead(num_groups: int, settings: KltSettings) -> int:
    """Bytes of a frame before the stream."""
    return (
        OVERHEAD
        + _HEAD.size
        + (_SEED.size if settings.mode == "dithered" else 0)
        + 1
        + (num_groups + 1) // 2
    )
