"""Quantisers and frequencies of the coefficients of `klt`: one table for every class of scale.

A class is a quarter octave of sigma / step, where sigma is the expected standard deviation of a
coefficient. Codes are logarithms in 1/16 octave, so class = code // 4. Classes below `low` have no
table: in mode "biased" sending nothing costs least there (under error feedback `low` is so low that
there are none), in mode "dithered" a few are drawn and scaled up to the lowest class. `HIGH` stands
for all above. Every table is half Gaussian, half Laplacian; those of the lowest `LEARNED` classes
that are worth coding are refined by `fit` and published.

Frequencies are whole numbers and the only thing that the entropy decoder sees. Both ends compute
the same ones: their CRC-32 is part of a frame's fingerprint.
"""

import math
import zlib
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluvial.codecs import entropy

Mode = Literal["biased", "dithered"]
Kind = Literal["biased", "dithered", "feedback"]
"""A mode, or "biased" under error feedback: all classes are coded, because what is never sent piles
up at the site."""
Codes = NDArray[np.int32]
Doubles = NDArray[np.float64]

OCTAVE = 16
"""Codes per factor of 2 in sigma."""
CLASS = 4
"""Codes per class: a quarter octave, 1.5 dB."""
REACH = 640
"""More than a coefficient's logarithm against the step can be, up or down."""
HIGH = 44
LEARNED = 14
KNOWN = 16
"""Levels 0 to 15 of a learned class have learned frequencies; levels beyond are rare."""
TOTAL = 1 << 22
_WORTH_OF_ZERO = 0.1
_WORTH = 0.08
"""Squared steps that one bit is worth, between 0 and 1 and between larger levels; both measured on
real updates, flat around these. They set the thresholds, which are the encoder's business, and the
generic centroids."""
_LOW = {"biased": -5, "dithered": -5, "feedback": -24}
FAINTEST = -40
"""Faintest of the classes that mode "dithered" distinguishes below the lowest it codes."""


def low(kind: Kind) -> int:
    """Return the lowest class that is coded."""
    return _LOW[kind]


def levels(number: int) -> int:
    """Return the largest magnitude that a class codes, in steps: some 8 sigma, and at least 15."""
    return int(min(max(2 ** math.ceil(math.log2(8 * _sigma(number))) - 1, 15), 16383))


def _sigma(number: int) -> float:
    return float(2 ** ((CLASS * number + (CLASS - 1) / 2) / OCTAVE))


@dataclass(frozen=True)
class Table:
    """One class. Index l is the magnitude in steps, 0 to `levels`."""

    counts: Codes
    """Frequencies of magnitudes; a nonzero magnitude's is that of each of its signs."""
    centroids: Doubles
    """Values that magnitudes decode to, in steps."""
    zero_below: float
    """Magnitudes below become 0."""
    offset: float
    """Other magnitudes become floor(magnitude + offset)."""

    @cached_property
    def signed(self) -> Codes:
        """Frequencies of the levels -L to L."""
        return np.concatenate([self.counts[:0:-1], self.counts])

    @cached_property
    def bits(self) -> Doubles:
        """Bits of the magnitudes."""
        bits: Doubles = -np.log2(self.counts / self.signed.sum())
        return bits

    @cached_property
    def expected_bits(self) -> float:
        """Bits of a coefficient, on average."""
        share = self.signed / self.signed.sum()
        return float(-(share * np.log2(share)).sum())

    @cached_property
    def model(self) -> Any:
        """The entropy coder's view of `signed`."""
        return entropy.model(self.signed)


class Tables:
    """Tables of all classes, with those that `fit` learned in place."""

    def __init__(self, kind: Kind, learned: "Learned | None" = None) -> None:
        self.low = low(kind)
        self.tables = list(generic(kind))
        if learned is not None and kind != "dithered":
            first = low("biased") - self.low
            for number in range(LEARNED):
                self.tables[first + number] = learned.refine(number, self.tables[first + number])

        sizes = np.array([len(table.counts) for table in self.tables])
        self.levels = (sizes - 1).astype(np.int32)
        self.most = self.levels.astype(np.float32)
        """Largest magnitude of every class."""
        self.base = np.concatenate([[0], np.cumsum(2 * sizes - 1)[:-1]]).astype(np.int32)
        """Index of the lowest level of every class in the flat arrays below."""
        self.start = self.base + self.levels
        """Index of level 0 of every class."""
        self.bits = np.concatenate([_both(table.bits) for table in self.tables]).astype(np.float32)
        self.values = np.concatenate([_odd(table.centroids) for table in self.tables]).astype(
            np.float32
        )
        self.zero_below = np.array([table.zero_below for table in self.tables], np.float32)
        self.offset = np.array([table.offset for table in self.tables], np.float32)
        costs = np.array([table.expected_bits for table in self.tables])
        codes = np.arange(-REACH, REACH + 1) // CLASS - self.low
        faint = costs[0] * drawn(codes) if kind == "dithered" else 0
        self.expected_bits = np.where(codes < 0, faint, costs[codes.clip(0, len(costs) - 1)])
        """Bits that a coefficient takes on average, for every logarithm of sigma / step from -REACH
        to REACH."""

    def __len__(self) -> int:
        return len(self.tables)

    @cached_property
    def digest(self) -> int:
        """CRC-32 of all frequencies."""
        return zlib.crc32(b"".join(table.signed.astype("<i4").tobytes() for table in self.tables))


@dataclass(frozen=True)
class Learned:
    """The published tables of the lowest classes."""

    counts: NDArray[np.int16]
    """(LEARNED, KNOWN), frequencies of magnitudes, each nonzero one counted for one sign; at least
    1."""
    centroids: NDArray[np.int8]
    """(LEARNED, KNOWN - 1), of magnitudes from 1, as 256 * (centroid - magnitude)."""

    @classmethod
    def blend(cls, seen: Doubles, sums: Doubles, weight: float) -> "Learned":
        """Blend the generic tables with counts of magnitudes and their sums in steps, both
        (LEARNED, KNOWN).

        The generic table counts as `weight` coefficients.
        """
        counts = np.empty((LEARNED, KNOWN))
        centroids = np.empty((LEARNED, KNOWN))

        for number, table in enumerate(generic("biased")[:LEARNED]):
            prior = _mass(table)[:KNOWN] * weight
            both = seen[number] + prior
            centroids[number] = (sums[number] + prior * table.centroids[:KNOWN]) / both.clip(1e-9)
            both[1:] /= 2
            counts[number] = both * (2**15 - 1) / both.max()

        shift = centroids[:, 1:] - np.arange(1, KNOWN)
        return cls(
            np.rint(counts).clip(1).astype(np.int16),
            np.rint(256 * shift).clip(-127, 127).astype(np.int8),
        )

    def refine(self, number: int, table: Table) -> Table:
        """Return `table` with the learned frequencies and centroids."""
        known = self.counts[number].astype(np.int32) * (TOTAL >> 15)
        counts = np.concatenate([known, np.ones(len(table.counts) - KNOWN, np.int32)])
        centroids = table.centroids.copy()
        centroids[1:KNOWN] = np.arange(1, KNOWN) + self.centroids[number] / 256
        bits = -np.log2(counts / (2 * counts.sum() - counts[0]))
        zero_below, offset = _thresholds(centroids, bits)

        return Table(counts, centroids, zero_below, offset)


@cache
def generic(kind: Kind) -> tuple[Table, ...]:
    """Return the tables before any learning, of the classes from `low`."""
    make = _dithered if kind == "dithered" else _quantiser
    return tuple(make(number) for number in range(low(kind), HIGH + 1))


def _quantiser(number: int) -> Table:
    """Return the entropy-constrained: thresholds lie where squared error and the worth of bits
    balance, found by iteration."""
    sigma = _sigma(number)
    top = levels(number)
    zero_below = 0.65
    offset = 0.4

    for _ in range(
        20 if top < 64 else 3
    ):  # wide classes are uniform within a cell and settle at once
        mass, centroids = _cells(zero_below, offset, sigma, top)
        zero_below, offset = _thresholds(centroids, -np.log2(_halves(mass).clip(1e-12)))

    # Rounded, so that machines whose functions differ in the last bit agree.
    mass, centroids = _cells(round(256 * zero_below) / 256, round(256 * offset) / 256, sigma, top)
    return Table(_counts(mass), centroids, zero_below, offset)


def _cells(zero_below: float, offset: float, sigma: float, top: int) -> tuple[Doubles, Doubles]:
    """Return the mass and centroid of each magnitude."""
    edges = torch.cat([torch.tensor([zero_below]), torch.arange(2, top + 1) - offset]).double()
    mass, first = _moments(edges, sigma)
    seen = mass > 1e-9
    centroids = torch.where(
        seen, first / mass.clamp_min(1e-9), torch.arange(top + 1).double()
    ).clamp(max=top + 0.5)
    centroids[0] = 0

    return mass.numpy(), centroids.numpy()


def _thresholds(centroids: Doubles, bits: Doubles) -> tuple[float, float]:
    """Return `zero_below` and `offset` for these centroids and costs."""

    def edge(level: int, worth: float) -> float:
        low, high = centroids[level - 1 : level + 1]
        return float(
            (high**2 - low**2 + worth * (bits[level] - bits[level - 1])) / (2 * (high - low))
        )

    offset = min(max(2 - edge(2, _WORTH), 0.2), 0.5)
    return max(edge(1, _WORTH_OF_ZERO), 1 - offset), offset


def drawn(classes: NDArray[np.integer]) -> Doubles:
    """Return the share of the coefficients that are sent, of classes given relative to the lowest;
    scaled up, they are of that."""
    share: Doubles = np.exp2(np.minimum(classes, 0) * (CLASS / OCTAVE))
    return share


def _dithered(number: int) -> Table:
    """Return the levels of x + dither; the dither is subtracted again, which leaves an even error
    of one step."""
    sigma = _sigma(number)
    top = levels(number)
    ramp = _ramp(torch.arange(-1, top + 2).double(), sigma)
    mass = ramp[2:] - 2 * ramp[1:-1] + ramp[:-2]
    mass[1:] *= 2

    return Table(
        _counts(mass.numpy()),
        np.arange(top + 1, dtype=np.float64),
        0.0,
        0.5,
    )


def _counts(mass: Doubles) -> Codes:
    counts: Codes = np.rint(_halves(mass) * TOTAL).clip(1).astype(np.int32)
    return counts


def _halves(mass: Doubles) -> Doubles:
    """Return the mass of each magnitude with one of its signs."""
    halves = mass.copy()
    halves[1:] /= 2
    return halves


def _mass(table: Table) -> Doubles:
    both = table.counts.astype(np.float64)
    both[1:] *= 2
    mass: Doubles = both / both.sum()
    return mass


def _moments(edges: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Return the mass and the first moment of |x| in the cells that `edges` part, of the
    mixture."""
    edges = torch.cat([torch.zeros(1).double(), edges])
    width = sigma / 2**0.5
    gauss = torch.exp(-((edges / sigma) ** 2) / 2) * sigma * (2 / math.pi) ** 0.5
    tail = torch.erfc(edges / (sigma * 2**0.5))
    laplace = torch.exp(-edges / width)
    beyond = torch.stack([tail + laplace, gauss + (edges + width) * laplace])
    cells = torch.cat([beyond[:, :-1] - beyond[:, 1:], beyond[:, -1:]], dim=1) / 2

    return cells[0], cells[1]


def _ramp(edges: Tensor, sigma: float) -> Tensor:
    """Return the mean of max(x - t, 0) for every t of `edges`, of the mixture."""
    width = sigma / 2**0.5
    t = edges.abs()
    gauss = sigma / (2 * math.pi) ** 0.5 * torch.exp(-((t / sigma) ** 2) / 2)
    gauss = gauss - t * torch.erfc(t / (sigma * 2**0.5)) / 2
    positive: Tensor = (gauss + width / 2 * torch.exp(-t / width)) / 2

    return positive - edges.clamp(max=0)


def _both(magnitudes: Doubles) -> Doubles:
    return np.concatenate([magnitudes[:0:-1], magnitudes])


def _odd(magnitudes: Doubles) -> Doubles:
    return np.concatenate([-magnitudes[:0:-1], magnitudes])
