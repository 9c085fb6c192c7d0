"""The order in which `klt` codes coefficients: by group, then by falling expected variance."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

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
        self.histogram = counts.reshape(self.num_groups, -1)
        """Number of coefficients by group and logarithm (groups, 2 CODES + 1)."""
        self.expected = (self.histogram * power(np.arange(-CODES, CODES + 1))).sum(1)
        """Energy of each group (groups,), if all variances are those of `fit`."""

        self.above = np.zeros((self.num_groups, 2 * CODES + 2), np.int64)
        """Number of coefficients of a group with at least a logarithm, the column - CODES."""
        self.above[:, :-1] = self.histogram[:, ::-1].cumsum(1)[:, ::-1]
        self._first = np.concatenate([[0], np.cumsum(self.above[:, 0])[:-1]])
        self._reach, self._beyond = self._reaches(factors, spread)

    @cached_property
    def zero_bits(self) -> Doubles:
        """Bits of a coefficient that becomes 0, for each logarithm of sigma / step from -REACH to
        REACH: no step makes it take fewer."""
        classes = np.arange(-REACH, REACH + 1) // CLASS - self.tables.low
        bits = self.tables.bits[self.tables.start].astype(np.float64)
        outside = (classes < 0) | self.dithered
        return np.where(outside, 0.0, bits[classes.clip(0, len(bits) - 1)])

    def _reaches(self, factors: Sequence[Factor], spread: Codes) -> tuple[Codes, NDArray[np.int64]]:
        """Return which columns of the transform any frame may need.

        The largest logarithm in each batch and group from each column on (batches, groups,
        features), and how many coefficients of each group have at least a logarithm among the
        directions that are not published.
        """
        widest = max(factor.features for factor in factors)
        reach = np.full((len(self.transform.batches), self.num_groups, widest), -10000)
        beyond = np.zeros((self.num_groups, 2 * CODES + 2), np.int64)
        pieces = np.split(
            spread, np.cumsum([factor.rank * factor.features for factor in factors])[:-1]
        )

        for largest, batch in zip(reach, self.transform.batches, strict=True):
            for index in batch.where:
                group = factors[index].group
                codes = pieces[index].reshape(-1, batch.features)
                np.maximum(
                    largest[group, : batch.features],
                    codes.max(0),
                    out=largest[group, : batch.features],
                )
                beyond[group, :-1] += np.bincount(
                    codes[:, batch.kept :].ravel() + CODES, minlength=2 * CODES + 1
                )

        reach = np.maximum.accumulate(reach[..., ::-1], axis=2)[..., ::-1]
        beyond = beyond[:, ::-1].cumsum(1)[:, ::-1]
        return np.ascontiguousarray(reach, dtype=np.int32), beyond

    def runs(self, side: ClassSide) -> Runs:
        """Return the coefficients that are coded, in wire order; in mode "dithered" all that may be
        drawn."""
        least = FAINTEST if self.dithered else self.tables.low
        codes = (
            CLASS * np.arange(least, HIGH + 1)[:, None] - side.loud + CLASS * side.gains
        )  # (classes, groups)
        above = self.above[np.arange(self.num_groups), np.clip(codes + CODES, 0, 2 * CODES + 1)]

        if self.dithered:
            above[0] = self.above[:, 0]

        above[:, side.gains == SILENT] = 0
        louder = np.concatenate([above[1:], np.zeros((1, self.num_groups), np.int64)])
        counts = (above - louder).ravel()
        sizes = (above - louder).sum(1)
        starts = (self._first + louder).ravel()
        where = self.place[
            np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        ]

        if not self.dithered:
            return Runs(sizes.astype(np.int32), where)

        faint = self.tables.low - least
        share = np.repeat(drawn(np.arange(-faint, len(sizes) - faint)), sizes).astype(np.float32)
        return Runs(
            np.append(sizes[: faint + 1].sum(), sizes[faint + 1 :]).astype(np.int32), where, share
        )

    def columns(self, side: ClassSide, *, rest: bool) -> list[int]:
        """Return how many columns of each batch hold what is coded; without `rest`, of those that
        are published."""
        most = [batch.features if rest else batch.kept for batch in self.transform.batches]
        if self.dithered:
            return most
        shift = np.where(side.gains == SILENT, -10000, side.loud - CLASS * side.gains)[:, None]
        reached = (self._reach + shift >= CLASS * self.tables.low).any(1).sum(1)
        return [int(count) for count in np.minimum(reached, most)]

    def needs_rest(self, side: ClassSide) -> bool:
        """Return whether the directions that are not published must be coded.

        They are sent as zeros where they hold at most the share `_FEW` of the coded values; a
        dithered frame codes them always.
        """
        if self.dithered:
            return True

        codes = CLASS * (self.tables.low + side.gains) - side.loud + CODES
        cell = np.arange(self.num_groups), np.clip(codes, 0, 2 * CODES + 1)
        sent = side.gains != SILENT

        return bool(self._beyond[cell][sent].sum() > _FEW * self.above[cell][sent].sum())


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

    return sent, Runs(sizes, runs.where[sent], runs.share[sent]), dither[sent]
