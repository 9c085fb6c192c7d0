"""One update on its way into a frame of `klt`: levels, their bits, and the body."""

import math
from functools import cached_property
from itertools import accumulate, zip_longest

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fluvial.codecs import compiled, entropy
from fluvial.codecs.klt.order import ClassSide, CoefficientOrder, Floats, Runs, draw_runs
from fluvial.codecs.klt.settings import (
    CODES,
    FINE,
    HEAD,
    LOUD,
    QUIET,
    QUIETEST,
    SEED,
    SILENT,
)
from fluvial.codecs.klt.tables import (
    CLASS,
    OCTAVE,
    REACH,
    Codes,
    Doubles,
    Tables,
)

_LOWEST = -CODES - CLASS * QUIETEST
_FAR = 2.0**-20
"""Share of the loudest group's power below which a group is not sent."""
_EXCESS = 2.0
"""Bits that a clipped step counts as, so that outliers make the step coarser."""


class Encoder:
    """One update on its way into a frame of `klt`."""

    def __init__(
        self,
        order: CoefficientOrder,
        energies: Doubles,
        *,
        vector: Tensor | None = None,
        latent: Tensor | None = None,
    ) -> None:
        """Take the energies of the groups, and either the update (numel,) or all its
        coefficients."""
        self.order = order
        self.tables = order.tables
        self._vector = vector
        self._latent = latent

        loudness = OCTAVE / 2 * np.log2(np.maximum(energies, 1e-80) / order.expected)
        self.top = float(loudness.max())
        """Level of the loudest group against `fit`, in codes."""
        gains = np.minimum(np.rint((self.top - loudness) / CLASS), QUIETEST)
        silent = energies <= (0 if order.dithered else _FAR * energies.max())
        self.gains = np.where(silent, SILENT, gains).astype(np.int32)

        self.loud = 0
        """Level of the loudest group against `fit` and the step, in codes: what is coded at all."""
        self._columns: list[int] | None = None
        self._coded: CodedValues | None = None

    @property
    def is_silent(self) -> bool:
        """True where nothing of any group is sent."""
        return bool((self.gains == SILENT).all())

    def silence(self) -> None:
        """Send nothing of any group."""
        self.gains[:] = SILENT
        self._coded = None

    def settle(self, step: int) -> None:
        """Choose what is coded at all: what the variances and loudness say for a step."""
        self.loud = min(max(round(self.top - step / FINE), QUIET), LOUD)

    @cached_property
    def _histogram(self) -> Doubles:
        """Number of coefficients of each logarithm, gains counted in, from _LOWEST."""
        groups, codes, counts = self.order.occupied
        places = codes + CLASS * (QUIETEST - self.gains)[groups]
        heard = np.where(self.gains == SILENT, 0.0, 1.0)[groups]
        length = 2 * CODES + 1 + CLASS * QUIETEST
        return np.bincount(places.clip(0), counts * heard, length).astype(np.float64)

    def sum_bits(self, bits: Doubles, loud: int) -> float:
        """Sum over all coefficients the `bits` for each logarithm of sigma / step from -REACH to
        REACH."""
        first = REACH + _LOWEST + loud
        return float(self._histogram @ bits[first : first + len(self._histogram)])

    def coded(self, step: int) -> "CodedValues":
        """Return the coded values; the same for all steps while `settle` has not been called."""
        if self._coded is None or self._coded.loud != self.loud:
            order = self.order
            side = ClassSide(step, self.loud, self.gains)
            runs = order.runs(side)

            if self._vector is not None:
                columns = order.columns(runs, rest=order.needs_rest(runs))
                if (
                    self._latent is None
                    or self._columns is None
                    or np.any(np.greater(columns, self._columns))
                ):
                    self._latent = order.transform.forward(self._vector, columns=columns)
                    self._columns = columns

            assert self._latent is not None
            self._coded = CodedValues(self.loud, runs, self._latent.numpy(), self.tables)

        return self._coded

    def bits(self, step: int) -> float:
        """Return the bits of the levels; in mode "dithered" as many as suffice for nearly all
        seeds."""
        coded = self.coded(step)
        if not self.order.dithered:
            bits_of_levels, excess = coded.bits(step)
            return bits_of_levels + _EXCESS * excess

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
        """Return the number of class, level and magnitude of all that is coded; mode "biased"."""
        self.settle(step)
        coded = self.coded(step)
        number = np.repeat(np.arange(len(self.tables), dtype=np.int32), coded.runs.sizes)
        return number, coded.levels(step)[0].astype(np.int32), np.abs(coded.scaled(step))

    def write(self, step: int, seed: int, *, epoch: int) -> bytes:
        """Return the body with a step."""
        order = self.order
        seed = seed % (1 << 32)
        coded = self.coded(step)
        runs = coded.runs

        if order.dithered:
            sent, runs, dither = draw_runs(runs, seed)
            most = coded.most[sent]
            level = np.clip(
                np.floor(coded.scaled(step)[sent] + dither + np.float32(0.5)), -most, most
            )
            symbols = (level + most).astype(np.int32)
        else:
            symbols = coded.symbols(step)

        sizes = runs.sizes.tolist()
        coded_runs = [
            (symbols[end - size : end], table.model)
            for end, size, table in zip(accumulate(sizes), sizes, self.tables.tables, strict=True)
            if size
        ]
        head = HEAD.pack(epoch, step) + (SEED.pack(seed) if order.dithered else b"")
        gains = self.gains.tolist()
        packed = bytes(
            low | high << 4 for low, high in zip_longest(gains[::2], gains[1::2], fillvalue=0)
        )

        return b"".join([head, bytes([self.loud - QUIET]), packed, entropy.encode_with(coded_runs)])


class CodedValues:
    """The values of one update that are coded, in wire order, with the quantiser of each value's
    class."""

    def __init__(self, loud: int, runs: Runs, latent: Floats, tables: Tables) -> None:
        self.loud = loud
        self.runs = runs
        self.values: Floats = latent.take(runs.where)
        self._tables = tables

    @cached_property
    def start(self) -> NDArray[np.intp]:
        """Index of level 0 of every value's class in the tables."""
        return np.repeat(self._tables.start.astype(np.intp), self.runs.sizes)

    @cached_property
    def most(self) -> Floats:
        """Largest magnitude of every value's class."""
        return np.repeat(self._tables.most, self.runs.sizes)

    def scaled(self, step: int) -> Floats:
        """Return the values in steps; in mode "dithered" as large as if drawn."""
        values: Floats = self.values * np.float32(2.0 ** (-step / 256))
        return values if self.runs.share is None else values / self.runs.share

    def levels(self, step: int) -> tuple[Floats, float]:
        """Return the magnitudes, and by how many steps in all they are clipped; mode "biased"."""
        sizes = np.abs(self.scaled(step))
        large = sizes >= np.repeat(self._tables.zero_below, self.runs.sizes)
        sizes += np.repeat(self._tables.offset, self.runs.sizes)
        np.floor(sizes, out=sizes)
        sizes *= large
        levels: Floats = np.minimum(sizes, self.most)

        return levels, float((sizes - levels).sum(dtype=np.float64))

    def bits(self, step: int) -> tuple[float, float]:
        """Return the bits of the levels, and by how many steps in all they are clipped; mode
        "biased"."""
        tables = self._tables
        if compiled.available():
            from fluvial.codecs.klt import coded_compiled

            return coded_compiled.measure(*self._quantiser(step), tables.start, tables.bits)

        levels, excess = self.levels(step)
        index = self.start + levels.astype(np.intp)
        return float(tables.bits.take(index).sum(dtype=np.float64)), excess

    def symbols(self, step: int) -> Codes:
        """Return the levels, those of each class from 0 on; mode "biased"."""
        if compiled.available():
            from fluvial.codecs.klt import coded_compiled

            return coded_compiled.symbols(*self._quantiser(step))

        return (np.copysign(self.levels(step)[0], self.values) + self.most).astype(np.int32)

    def _quantiser(self, step: int) -> tuple[Floats, Codes, np.float32, Floats, Floats, Floats]:
        """Return what the compiled passes take: values, sizes of classes, factor, thresholds."""
        tables = self._tables
        factor = np.float32(2.0 ** (-step / 256))
        return (
            self.values,
            self.runs.sizes,
            factor,
            tables.zero_below,
            tables.offset,
            tables.most,
        )
