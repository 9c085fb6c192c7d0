"""A linear autoencoder that carries real updates: a Karhunen-Loeve transform learned at TGAP, and
ANS.

Ours. The local optimiser makes updates look white value by value, yet along the feature axis of
every module they stay near one subspace, the same for all ranks, sites and rounds. `klt.learn`
learns it. Coefficients are quantised with one step for everything, which is reverse water-filling,
and entropy-coded by the variances that `fit` saw, with the tables of `klt.tables`. The decoder is
the transpose.

Scales are logarithmic whole numbers, in 1/16 octave, so that both ends agree on every entropy model
exactly.

    body   bytes             content
    epoch  1                 number of refits of the transform, modulo 256
    step   2                 i16, log2 of the step in 1/256 octave
    seed   0, dithered: 4    u32, from which both ends draw the dither
    loud   1                 u8, level of the loudest group (target, factor) against `fit` and the
                             step, in 1/16 octave, plus 96
    gains  ceil(groups / 2)  4 bits for each group, low bits first: 1/4 octaves below the loudest;
                             15: nothing is sent
    stream the rest          ANS, 32-bit words: levels by class, in it by group, in it by falling
                             expected variance

Mode "biased" has thresholds and centroids of least squared error and needs error feedback at low
rates. In mode "dithered" the mean over seeds of what is decoded is the update: dither is added
before rounding and subtracted after, and of coefficients far below the step the seed draws a share
q, which are sent as x / q.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fluvial.codecs import compiled, entropy
from fluvial.codecs.base import CodecSettings, LatentCodec, RatedCodec, is_finite, require_updates
from fluvial.codecs.klt.base import AdaptiveTransformCodec
from fluvial.codecs.klt.encoder import Encoder
from fluvial.codecs.klt.factors import factors_of
from fluvial.codecs.klt.learn import learn
from fluvial.codecs.klt.model import Model
from fluvial.codecs.klt.order import ClassSide, CoefficientOrder, Floats, Runs, draw_runs
from fluvial.codecs.klt.search import best_body, finest_step
from fluvial.codecs.klt.settings import MAX_STEP, QUIET, KltSettings, overhead_bytes
from fluvial.codecs.klt.tables import (
    KNOWN,
    LEARNED,
    Codes,
    Doubles,
    Learned,
    Tables,
)
from fluvial.errors import ConfigError, WireError
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout, Named

_START = 12
"""Bits that the coder takes before the first symbol, about."""
_PRIOR = 2000.0
"""Coefficients that the generic tables count as, against those that `fit` sees."""


class Klt(AdaptiveTransformCodec, LatentCodec, RatedCodec):
    """Tied encoder and decoder: whoever can encode can decode."""

    code = 12
    settings: KltSettings

    def __init__(
        self, settings: CodecSettings, layout: Layout, model: Model, *, epoch: int = 0
    ) -> None:
        assert isinstance(settings, KltSettings)
        super().__init__(settings, layout, model, epoch=epoch)
        self.budget = self.frame_size(settings, layout)
        self.tables = Tables(
            "feedback" if settings.error_feedback else settings.mode, model.learned
        )
        self._dithered = settings.mode == "dithered"
        self._order = CoefficientOrder(
            self.factors, model, self.transform, self.tables, dithered=self._dithered
        )
        overhead = overhead_bytes(self.num_groups, settings)
        self._room_bits = 32 * ((self.budget - overhead) // 4) - _START

        sizes = [factor.rank * factor.features for factor in self.factors]
        self._piece = math.gcd(*sizes)
        self._owner = np.repeat(
            [factor.group for factor in self.factors], np.array(sizes) // self._piece
        )
        """The group of every piece of the flattened update."""

        marks = struct.pack("<IIB", layout.fingerprint, self.tables.digest, epoch)
        self._fingerprint = self.checksum(marks)

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
        """Return the principal directions, variances and tables of `updates`; every update counts
        the same."""
        assert isinstance(settings, KltSettings)
        require_updates(settings, updates)
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
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, KltSettings)
        groups = 1 + max(factor.group for factor in factors_of(layout))
        budget = int(layout.raw_bytes / settings.rate)
        overhead = overhead_bytes(groups, settings)

        if budget < overhead + 16:
            raise ConfigError(
                f"codec: rate={settings.rate:g} leaves {budget} bytes for {layout.numel} values; "
                "a frame of klt "
                f"needs {overhead} before the first; choose a lower rate"
            )

        return budget

    def analyse(self, vector: Tensor) -> Tensor:
        """Return the coefficients (numel,); norms are kept."""
        return self.transform.forward(vector)

    def synthesise(self, latent: Tensor) -> Tensor:
        """Invert `analyse`."""
        return self.transform.inverse(latent)

    def body(self, vector: Tensor, seed: int) -> bytes:
        """Code the flattened update (numel,); see `Codec.body`."""
        return self._best(Encoder(self._order, self._energies(vector), vector=vector), seed)

    def pack(self, latent: Tensor, side: bytes = b"", *, seed: int = 0) -> bytes:
        """Quantise with the finest step whose frame is within the budget."""
        assert not side, "all side information is of the latent"
        assert is_finite(latent), "an update whose coefficients overflow fp32 must not be sent"
        sizes = self._order.above[:, 0]
        groups = np.repeat(np.arange(self.num_groups), sizes)
        values = latent.numpy()[self._order.place].astype(np.float64)
        energies = np.bincount(groups, values**2, self.num_groups).astype(np.float64)

        return self._best(Encoder(self._order, energies, latent=latent), seed)

    def _best(self, encoder: Encoder, seed: int) -> bytes:
        """Return the body with the finest step within the budget."""
        return best_body(
            encoder,
            room_bytes=self.budget - OVERHEAD,
            room_bits=self._room_bits,
            seed=seed,
            epoch=self.epoch,
        )

    def _energies(self, vector: Tensor) -> Doubles:
        """Sum of squares of every group; the transform keeps it."""
        small = not 1e-20 < float(vector @ vector) < 1e30  # squares end where fp32 ends
        norms = torch.linalg.vector_norm(
            vector.view(-1, self._piece), dim=1, dtype=torch.float64 if small else None
        )

        squares = norms.numpy().astype(np.float64) ** 2
        return np.bincount(self._owner, squares, self.num_groups).astype(np.float64)

    def parse(self, reader: Reader) -> Tensor:
        """Decode class by class, then apply centroids and the transpose of the transform."""
        side, runs, symbols, dither = self._read(reader)
        latent = np.zeros(self.layout.numel, np.float32)
        rest = self._scatter(symbols, runs, dither, float(np.exp2(side.step / 256)), latent)
        columns = self._order.columns(runs, rest=rest)
        return self.transform.inverse(torch.from_numpy(latent), columns=columns)

    def _scatter(
        self, symbols: Codes, runs: Runs, dither: Floats | None, step: float, latent: Floats
    ) -> bool:
        """Write the values of `symbols` into `latent` (numel,), and return whether directions that
        are not published have any."""
        tables = self.tables
        num_tops = self.transform.num_tops

        if dither is None and compiled.available():
            from fluvial.codecs.klt import coded_compiled

            return coded_compiled.scatter(
                symbols, runs.sizes, tables.base, tables.values, step, runs.where, num_tops, latent
            )

        values = tables.values.take(symbols + np.repeat(tables.base, runs.sizes))
        if dither is not None:
            values -= dither
        with np.errstate(over="ignore"):  # what overflows is refused
            latent[runs.where] = values * np.float64(step)
        return bool(values[runs.where >= num_tops].any())

    def decode(self, wire: bytes, *, round: int | None = None) -> Named:
        """Return the update that `wire` carries; raises `WireError`, which says so if the sender
        has another transform."""
        self._check_epoch(wire)
        return super().decode(wire, round=round)

    def _check_epoch(self, wire: bytes) -> None:
        whole = len(wire) > OVERHEAD and zlib.crc32(wire[:-4]) == struct.unpack("<I", wire[-4:])[0]
        if whole and wire[1] == self.code and wire[8] != self.epoch:
            raise WireError(
                f"klt: a frame of transform epoch {wire[8]}, this end has epoch {self.epoch}; "
                "both ends need the same "
                "published transform"
            )

    def _read(self, reader: Reader) -> tuple[ClassSide, Runs, Codes, Floats | None]:
        """Return all of a body: side information, what is coded, its symbols and their dither."""
        epoch = reader.number("B")
        step = int(reader.number("h"))

        if epoch != self.epoch:
            raise WireError(f"klt: transform epoch {epoch}, expected {self.epoch}")
        if abs(step) > MAX_STEP:
            raise WireError(f"klt: step 2^({step}/256) is beyond fp32")

        seed = int(reader.number("I")) if self._dithered else 0
        loud = int(reader.number("B")) + QUIET
        packed = reader.take((self.num_groups + 1) // 2)
        gains = np.array([half for two in packed for half in (two & 15, two >> 4)], np.int32)

        if gains[self.num_groups :].any():
            raise WireError("klt: padding of the gains is not zero")

        side = ClassSide(step, loud, gains[: self.num_groups])
        runs = self._order.runs(side)
        dither = None

        if self._dithered:
            _, runs, dither = draw_runs(runs, seed)

        stream = entropy.Stream(reader.take(reader.left))
        symbols = [np.zeros(0, np.int32)]
        symbols += [
            stream.take_with(table.model, size)
            for table, size in zip(self.tables.tables, runs.sizes.tolist(), strict=True)
            if size
        ]
        stream.finish()

        return side, runs, np.concatenate(symbols), dither

    def _observe(self, updates: Sequence[Named]) -> Learned:
        """Return the tables from the levels of `updates`, at the rate's step and half an octave
        around it."""
        seen, sums = np.zeros((2, LEARNED * KNOWN))
        for update in updates:
            vector = self.layout.flatten(update)
            encoder = Encoder(self._order, self._energies(vector), vector=vector)
            best = finest_step(encoder, self._room_bits)

            for step in (best - 128, best, best + 128):
                number, level, size = encoder.magnitudes(step)
                inside = (number < LEARNED) & (level < KNOWN)
                cell = number[inside] * KNOWN + level[inside]
                seen += np.bincount(cell, minlength=len(seen)) / 3
                sums += np.bincount(cell, size[inside], minlength=len(sums)) / 3

        return Learned.blend(seen.reshape(LEARNED, KNOWN), sums.reshape(LEARNED, KNOWN), _PRIOR)
