"""The order in which `klt` codes coefficients: by group, then by falling expected variance."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fluvial.codecs import compiled
from fluvial.codecs.klt.factors import Factor
from fluvial.codecs.klt.model import Model
from fluvial.codecs.klt.settings import CODES, SILENT
from fluvial.codecs.klt.tables import (
    CLASS,
    FAINTEST,
    HIGH,
    REACH,
    Codes,
    Doubles,
    Tables,
    drawn,
)
from fluvial.codecs.klt.transform import Transform, power, spreads

Floats = NDArray[np.float32]

_FEW = 0.01
"""Share of what is coded that may be sent as zeros to save half a transform."""
_BEYOND = 1 << 20
"""Codes that no coefficient reaches."""


@dataclass(frozen=True)
class ClassSide:
    """Side information of a frame, from which the class of every coefficient follows."""

    step: int
    """Logarithm of the step, in 1/256 octave."""
    loud: int
    """Level of the loudest group against `fit` and the step, in codes."""
    gains: Codes
    """Classes by which each group is below the loudest (groups,); 15: silent."""


@dataclass(frozen=True)
class Runs:
    """The coefficients that are coded, in wire order."""

    sizes: Codes
    """Number of coefficients of each class."""
    where: NDArray[np.intp]
    """Index of each coefficient among those of `Transform`."""
    faintest: NDArray[np.int64]
    """Column of `above` of the faintest class that is coded, for each group (groups,)."""
    share: Floats | None = None
    """Probability with which each coefficient is sent, in mode "dithered"."""


class CoefficientOrder:
    """Coefficients by group, then by falling expected variance, then in layout order.

    Both ends compute it from what is published; with the side information of a frame it says which
    coefficients are coded, in which class, and which columns of the transform they need.
    """

    def __init__(
        self,
        factors: Sequence[Factor],
        model: Model,
        transform: Transform,
        tables: Tables,
        *,
        dithered: bool,
    ) -> None:
        self.transform = transform
        self.tables = tables
        self.dithered = dithered
        self.num_groups = 1 + max(factor.group for factor in factors)
        spread = spreads(factors, model)
        sizes = [factor.rank * factor.features for factor in factors]
        groups = np.repeat([factor.group for factor in factors], sizes)

        order = np.argsort(groups * (2 * CODES + 1) - spread, kind="stable")
        self.place = transform.place[order]
        """Index among those of `Transform` of each coefficient, in this order (numel,)."""

        cells = groups * (2 * CODES + 1) + spread + CODES
        counts = np.bincount(cells, minlength=self.num_groups * (2 * CODES + 1))
        histogram = counts.reshape(self.num_groups, -1)
        self.occupied = (*np.nonzero(histogram), histogram[histogram > 0])
        """Group, logarithm + CODES and number of coefficients, of each pair that has any."""
        self.expected = (histogram * power(np.arange(-CODES, CODES + 1))).sum(1)
        """Energy of each group (groups,), if all variances are those of `fit`."""

        self.above = np.zeros((self.num_groups, 2 * CODES + 2), np.int64)
        """Number of coefficients of a group with at least a logarithm, the column - CODES."""
        self.above[:, :-1] = histogram[:, ::-1].cumsum(1)[:, ::-1]
        self._first = np.cumsum(self.above[:, 0]) - self.above[:, 0]
        self._groups = np.arange(self.num_groups)
        self._columns, self._beyond = self._reaches(factors, spread)
        self._features = [batch.features for batch in transform.batches]
        self._kept = [batch.kept for batch in transform.batches]
        least = FAINTEST if dithered else tables.low
        self._classes = CLASS * np.arange(least, HIGH + 1)[:, None] + CODES
        """Columns of `above` of the classes (classes, 1), if sigma were the step."""

    @cached_property
    def zero_bits(self) -> Doubles:
        """Bits of a coefficient that becomes 0, for each logarithm of sigma / step from -REACH to
        REACH: no step makes it take fewer."""
        classes = np.arange(-REACH, REACH + 1) // CLASS - self.tables.low
        bits = self.tables.bits[self.tables.start].astype(np.float64)
        outside = (classes < 0) | self.dithered
        return np.where(outside, 0.0, bits[classes.clip(0, len(bits) - 1)])

    def _reaches(self, factors: Sequence[Factor], spread: Codes) -> tuple[Codes, NDArray[np.int64]]:
        """Return which columns of the transform a frame may need, for each logarithm as in `above`.

        How many leading columns of each batch hold all coefficients of a group with at least a
        logarithm (batches, groups, 2 CODES + 2), and how many such coefficients of each group are
        among the directions that are not published (groups, 2 CODES + 2).
        """
        columns = np.zeros((len(self.transform.batches), self.num_groups, 2 * CODES + 2), np.int32)
        beyond = np.zeros((self.num_groups, 2 * CODES + 2), np.int64)
        pieces = np.split(
            spread, np.cumsum([factor.rank * factor.features for factor in factors])[:-1]
        )

        for last, batch in zip(columns, self.transform.batches, strict=True):
            for index in batch.where:
                group = factors[index].group
                codes = pieces[index].reshape(-1, batch.features)
                np.maximum.at(last[group], codes.max(0) + CODES, np.arange(1, batch.features + 1))
                beyond[group, :-1] += np.bincount(
                    codes[:, batch.kept :].ravel() + CODES, minlength=2 * CODES + 1
                )

        columns = np.maximum.accumulate(columns[..., ::-1], axis=2)[..., ::-1]
        beyond = beyond[:, ::-1].cumsum(1)[:, ::-1]
        return columns, beyond

    def runs(self, side: ClassSide) -> Runs:
        """Return the coefficients that are coded, in wire order; in mode "dithered" all that may be
        drawn."""
        cells = self._cells(side)
        if self.dithered:
            cells[0, side.gains != SILENT] = 0

        sizes, where = self._select(cells)
        if not self.dithered:
            return Runs(sizes, where, cells[0])

        faint = self.tables.low - FAINTEST
        share = np.repeat(drawn(np.arange(-faint, len(sizes) - faint)), sizes).astype(np.float32)
        merged = np.append(sizes[: faint + 1].sum(), sizes[faint + 1 :]).astype(np.int32)
        return Runs(merged, where, cells[0], share)

    def _cells(self, side: ClassSide) -> NDArray[np.int64]:
        """Return the columns of `above` of every class by group (classes, groups); the last one,
        without coefficients, for silent groups."""
        lift = np.where(side.gains == SILENT, _BEYOND, CLASS * side.gains - side.loud)
        cells: NDArray[np.int64] = np.maximum(self._classes + lift, 0)
        return np.minimum(cells, 2 * CODES + 1, out=cells)

    def _select(self, cells: NDArray[np.int64]) -> tuple[Codes, NDArray[np.intp]]:
        """Return the number of coefficients of each class, and the place of each; `cells` (classes,
        groups) are the columns of `above` of the classes."""
        if compiled.available():
            from fluvial.codecs.klt import coded_compiled

            return coded_compiled.select(self.above, self.place, self._first, cells)

        above = self.above[self._groups, cells]
        louder = np.concatenate([above[1:], np.zeros((1, self.num_groups), np.int64)])
        counts = (above - louder).ravel()
        starts = np.repeat((self._first + louder).ravel() - np.cumsum(counts) + counts, counts)
        sizes = (above - louder).sum(1)
        return sizes.astype(np.int32), self.place[starts + np.arange(len(starts))]

    def columns(self, runs: Runs, *, rest: bool) -> list[int]:
        """Return how many columns of each batch hold what is coded; without `rest`, of those that
        are published."""
        most = self._features if rest else self._kept
        if self.dithered:
            return most
        reached = self._columns[:, self._groups, runs.faintest].max(1)
        return [min(pair) for pair in zip(reached.tolist(), most, strict=True)]

    def needs_rest(self, runs: Runs) -> bool:
        """Return whether the directions that are not published must be coded.

        They are sent as zeros where they hold at most the share `_FEW` of the coded values; a
        dithered frame codes them always.
        """
        if self.dithered:
            return True

        beyond = self._beyond[self._groups, runs.faintest].sum()
        return bool(beyond > _FEW * len(runs.where))


def draw_runs(runs: Runs, seed: int) -> tuple[NDArray[np.bool_], Runs, Floats]:
    """Return which of `runs` are sent, these, and the dither of each, within half a step.

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

    drawn_runs = Runs(sizes, runs.where[sent], runs.faintest, runs.share[sent])
    return sent, drawn_runs, dither[sent]
