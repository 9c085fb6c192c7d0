"""Second moments of updates: what the transform of `klt` is fitted to, as sums that can be added
up.

Ours. A site that must not send an update can send these instead (`method.tgap.source =
"sites-covariance"`). Every update is scaled to unit norm first, as `klt_model.learn` does. The
server needs no more than their sum over sites. The moments of one site alone still say which
directions its few updates span, so what hides a site is secure aggregation, which these sums allow
and which is not done here. They grow with the square of the layers' width.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fluvial.codecs.base import CodecSettings, LearnedCodec
from fluvial.codecs.klt.factors import factors_of
from fluvial.codecs.klt.learn import learn_moments
from fluvial.codecs.klt.model import Model
from fluvial.errors import WireError
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, WeightedMean

_SLACK = 1e-3  # relative, for rounding


@dataclass(frozen=True)
class Shapes:
    """Sides of the symmetric matrices, and how many groups (target, factor) there are."""

    features: tuple[int, ...]
    """Features of every basis."""
    ranks: tuple[int, ...]
    """Rank of every factor."""
    groups: int

    @classmethod
    def of(cls, layout: Layout) -> "Shapes":
        """Return the sizes for a layout; raises `ConfigError` for what is no LoRA factor."""
        factors = factors_of(layout)
        features = {factor.basis: factor.features for factor in factors}

        return cls(
            tuple(features.values()),
            tuple(factor.rank for factor in factors),
            1 + max(factor.group for factor in factors),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Values of each tensor."""
        return {"grams": sum(map(_half, self.features)), "rows": sum(map(_half, self.ranks))}


@dataclass(frozen=True)
class Moments:
    """Sums over updates. Of symmetric matrices only the upper triangles, row by row, one after
    another."""

    grams: Tensor
    """fp32: X'X (features, features) of every basis, X being all that shares it."""
    rows: Tensor
    """fp32: XX' (rank, rank) of every factor."""
    energy: tuple[float, ...]
    """Sum of squares of every group (target, factor), before updates are scaled."""
    count: int
    """Updates."""

    @classmethod
    def of(cls, layout: Layout, update: Named) -> "Moments":
        """Return the moments of one update; raises `ConfigError` for what is no LoRA factor."""
        factors = factors_of(layout)
        shapes = Shapes.of(layout)
        size = max(float(layout.flatten(update).double().norm()), 1e-30)
        grams = [
            torch.zeros(features, features, dtype=torch.float64) for features in shapes.features
        ]
        rows = []
        energy = [0.0] * shapes.groups

        for factor in factors:
            x = update[factor.name].double()
            energy[factor.group] += float(x.square().sum())
            x = (x.mT if factor.transposed else x) / size
            grams[factor.basis] += x.mT @ x
            rows.append(_upper(x @ x.mT))

        return cls(
            torch.cat([_upper(gram) for gram in grams]).float(),
            torch.cat(rows).float(),
            tuple(energy),
            1,
        )

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of both, which have the same layout."""
        energy = tuple(
            mine + theirs for mine, theirs in zip(self.energy, other.energy, strict=True)
        )
        return Moments(
            self.grams + other.grams, self.rows + other.rows, energy, self.count + other.count
        )

    def payload(self) -> Payload:
        """Return the moments as they are on the wire and on a site's disk."""
        return Payload(self._named(), {"energy": list(self.energy), "count": self.count})

    @classmethod
    def read(cls, layout: Layout, payload: Payload, *, most: int) -> "Moments":
        """Invert `payload`, for at most `most` updates; raises `WireError` for what cannot
        be moments."""
        shapes = Shapes.of(layout)
        count = payload.value("count", int)
        energy = payload.value("energy", list)

        if not 1 <= count <= most:
            raise WireError(f"moments: of {count} updates, expected 1 to {most}")
        if len(energy) != shapes.groups or not all(
            isinstance(each, float) and 0 <= each < math.inf for each in energy
        ):
            raise WireError(
                f"moments: expected {shapes.groups} energies from 0 on, found {energy!s:.80}"
            )

        if set(payload.tensors) != set(shapes.sizes):
            raise WireError(
                f"moments: expected tensors {sorted(shapes.sizes)}, found "
                f"{sorted(payload.tensors)[:5]}"
            )

        for name, sides in (("grams", shapes.features), ("rows", shapes.ranks)):
            _check(payload.tensors[name], sides, name, count)
        return cls(payload.tensors["grams"], payload.tensors["rows"], tuple(energy), count)

    def _named(self) -> Named:
        return {"grams": self.grams, "rows": self.rows}

    def fit(self, layout: Layout, share: float) -> Model:
        """Return the transform for updates of these moments; entropy tables stay generic."""
        shapes = Shapes.of(layout)
        rows = list(_squares(self.rows, shapes.ranks))
        energy = torch.tensor(self.energy, dtype=torch.float64)

        return learn_moments(
            layout, share, _squares(self.grams, shapes.features), rows, energy, self.count
        )


class MomentsSum:
    """Moments of many sites, added as they arrive; the result does not depend on the order."""

    def __init__(self) -> None:
        self._mean, self._energies, self._count = WeightedMean(), list[tuple[float, ...]](), 0

    def add(self, moments: Moments) -> None:
        """Add the moments of one site, or of a sum of sites."""
        self._mean.add(moments._named(), 1)
        self._energies.append(moments.energy)
        self._count += moments.count

    def total(self) -> Moments:
        """Return the sum of all; at least one must have been added."""
        sums = {name: tensor * self._mean.count for name, tensor in self._mean.mean().items()}
        energy = tuple(math.fsum(each) for each in zip(*self._energies, strict=True))
        return Moments(sums["grams"], sums["rows"], energy, self._count)


class MomentCodec(LearnedCodec):
    """A learned codec that second moments are enough to fit."""

    @classmethod
    @abstractmethod
    def fit_moments(cls, settings: CodecSettings, layout: Layout, moments: Moments) -> Self:
        """Return a codec for updates with these moments; deterministic."""


def num_bytes(layout: Layout) -> int:
    """Return what the moments of a site take on the wire, about; raises `ConfigError` for what is
    no LoRA factor."""
    return 4 * sum(Shapes.of(layout).sizes.values())


def _check(found: Tensor, sides: Sequence[int], name: str, count: int) -> None:
    """Raise `WireError` unless these can be sums of X'X over `count` updates X of norm 1, all
    factors together."""
    length = sum(map(_half, sides))
    if found.dtype != torch.float32 or found.shape != (length,):
        raise WireError(
            f"moments: {name}: expected torch.float32 ({length},), found {found.dtype} "
            f"{tuple(found.shape)}; both ends "
            "need the same model and lora settings"
        )

    if not bool(torch.isfinite(found).all()):
        raise WireError(f"moments: {name}: NaN or Inf among the values")

    diagonals = torch.cat([each.diagonal() for each in _squares(found, sides)])
    if float(diagonals.min()) < 0 or float(diagonals.double().sum()) > count * (1 + _SLACK):
        raise WireError(f"moments: {name}: no sums of squares of {count} updates of norm 1")
    if float(found.abs().max()) > float(diagonals.max()) * (1 + _SLACK):
        raise WireError(f"moments: {name}: a product is larger than the largest square")


def _half(side: int) -> int:
    """Return the values of an upper triangle."""
    return side * (side + 1) // 2


def _upper(square: Tensor) -> Tensor:
    row, column = torch.triu_indices(*square.shape)
    return square[row, column]


def _squares(triangles: Tensor, sides: Sequence[int]) -> Iterator[Tensor]:
    """Yield the symmetric matrices of upper triangles, one after another."""
    for side, triangle in zip(
        sides, torch.split(triangles, [_half(side) for side in sides]), strict=True
    ):
        row, column = torch.triu_indices(side, side)
        square = triangles.new_empty(side, side)
        square[row, column] = triangle
        square[column, row] = triangle
        yield square
