"""The transform of `klt`: a separable Karhunen-Loeve transform of LoRA factors.

Each factor, seen as X (rank, features), becomes Z = V' X Q with orthonormal V (rank, rank) and Q
(features, features). Q = [U, R]: the leading directions U (features, kept) are learned and
published; R completes them to a basis and costs no bytes. A factors that read the same input share
Q.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluvial.codecs.klt.factors import Factor, basis_features, num_published
from fluvial.codecs.klt.linalg import orthonormal
from fluvial.codecs.klt.model import Model
from fluvial.codecs.klt.tables import OCTAVE, Codes, Doubles


class Transform:
    """Q and V of all factors, and the order of the coefficients.

    Coefficients stand in two halves, first X U of all factors, then X R; the second can be left
    out. Factors of equal shapes are one batched product.
    """

    def __init__(self, factors: Sequence[Factor], share: float, model: Model) -> None:
        shapes = [
            (features, num_published(features, share)) for features in basis_features(factors)
        ]
        tops = torch.split(model.tops, [rows * cols for rows, cols in shapes])
        rotations = [
            orthonormal(v.view(factor.rank, factor.rank))
            for v, factor in _pairs(model.rotations, factors)
        ]
        members: dict[int, list[int]] = {}

        for index, factor in enumerate(factors):
            members.setdefault(factor.basis, []).append(index)
        kinds: dict[tuple[int, tuple[int, ...], bool], list[int]] = {}
        for basis, those in members.items():
            kind = (
                factors[those[0]].features,
                tuple(factors[i].rank for i in those),
                factors[those[0]].transposed,
            )
            kinds.setdefault(kind, []).append(basis)

        self.batches = []
        for (features, ranks, transposed), bases in kinds.items():
            u = torch.stack([orthonormal(tops[basis].view(shapes[basis])) for basis in bases])
            v = torch.stack(
                [_block_diagonal([rotations[i] for i in members[basis]]) for basis in bases]
            )
            where = [i for basis in bases for i in members[basis]]
            self.batches.append(Batch(features, ranks, transposed, where, u, v))

        rows = [batch.count * batch.rows for batch in self.batches]
        self._sizes = [n * batch.features for n, batch in zip(rows, self.batches, strict=True)]
        self._halves = [n * batch.kept for n, batch in zip(rows, self.batches, strict=True)]
        self.num_tops = sum(self._halves)
        self._halves += [x - top for x, top in zip(self._sizes, self._halves, strict=True)]
        """Coefficients X U of every batch, then X R of every batch."""
        self.place = self._place(
            factors, [members[basis] for bases in kinds.values() for basis in bases]
        )
        self._piece, self._order, self._back = _pieces(
            [factor.rank * factor.features for factor in factors],
            [i for batch in self.batches for i in batch.where],
        )

    def _place(self, factors: Sequence[Factor], order: list[list[int]]) -> NDArray[np.intp]:
        """Return where the coefficients of the factors are, factor by factor in layout order, each
        as (rank, features)."""
        place: dict[int, NDArray[np.intp]] = {}
        top = 0
        rest = self.num_tops
        each = iter(order)

        for batch in self.batches:
            for _ in range(batch.count):
                for index in next(each):
                    rank = factors[index].rank
                    others = batch.features - batch.kept
                    first = top + np.arange(rank * batch.kept).reshape(rank, batch.kept)
                    second = rest + np.arange(rank * others).reshape(rank, others)
                    place[index] = np.concatenate([first, second], axis=1).ravel()
                    top = top + first.size
                    rest = rest + second.size

        return np.concatenate([place[index] for index in range(len(factors))])

    def forward(
        self, vector: Tensor, *, rest: bool = True, columns: Sequence[int] | None = None
    ) -> Tensor:
        """Return the coefficients of a flattened update: all (numel,), or without `rest` the first
        `num_tops`.

        With `columns`, all, but filled in only for so many leading directions of each batch, and
        for its others if these are more than it has; 0 elsewhere.
        """
        size = len(vector) if rest or columns is not None else self.num_tops
        if columns is None:
            columns = [batch.features if rest else batch.kept for batch in self.batches]

        values = vector.view(-1, self._piece).index_select(0, self._order).view(-1)
        latent = torch.from_numpy(np.zeros(size, np.float32))
        for batch, count, (x, top, others) in zip(
            self.batches, columns, self._views(values, latent), strict=True
        ):
            batch.forward(x, _leading(top, count), others if count > batch.kept else None)

        return latent

    def inverse(self, latent: Tensor, *, columns: Sequence[int] | None = None) -> Tensor:
        """Return the update (numel,) of coefficients; when there are only `num_tops`, or only
        `columns`, the others are 0."""
        if columns is None:
            columns = [
                batch.features if len(latent) > self.num_tops else batch.kept
                for batch in self.batches
            ]

        values = latent.new_empty(self._piece * len(self._order))
        for batch, count, (x, top, others) in zip(
            self.batches, columns, self._views(values, latent), strict=True
        ):
            batch.inverse(x, _leading(top, count), others if count > batch.kept else None)

        return values.view(-1, self._piece).index_select(0, self._back).view(-1)

    def _views(
        self, values: Tensor, latent: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield for every batch X (count, rows, features), X U and X R, the last None if `latent`
        has only `num_tops`."""
        count = len(self.batches)
        whole = latent.numel() > self.num_tops
        halves = latent.split_with_sizes(self._halves if whole else self._halves[:count])
        seconds = halves[count:] if whole else (None,) * count
        xs = values.split_with_sizes(self._sizes)

        for batch, x, top, second in zip(self.batches, xs, halves[:count], seconds, strict=True):
            form = (batch.count, batch.rows)
            if batch.transposed:
                x = x.view(batch.count, batch.features, batch.rows).mT
            else:
                x = x.view(*form, batch.features)

            others = second if second is None else second.view(*form, batch.features - batch.kept)
            yield x, top.view(*form, batch.kept), others


def _leading(x: Tensor, count: int) -> Tensor:
    """Return the leading columns of x (..., columns), at most `count`."""
    return x if count >= x.shape[-1] else x[..., :count]


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    diagonal = torch.zeros(sum(len(block) for block in blocks), sum(len(block) for block in blocks))
    start = 0
    for block in blocks:
        diagonal[start : start + len(block), start : start + len(block)] = block
        start += len(block)

    return diagonal


def _pieces(sizes: Sequence[int], order: Sequence[int]) -> tuple[int, Tensor, Tensor]:
    """Return the largest piece that divides all factors, and the pieces in `order` of the factors,
    and back."""
    piece = math.gcd(*sizes)
    counts = np.array(sizes) // piece
    starts = np.cumsum(counts) - counts
    there = np.concatenate([starts[index] + np.arange(counts[index]) for index in order])

    return piece, torch.from_numpy(there), torch.from_numpy(np.argsort(there))


@dataclass
class Batch:
    """Bases of one shape, each with the factors that share it: X (count, rows, features)."""

    features: int
    ranks: tuple[int, ...]
    """Ranks of the first, second, ... factor of every basis."""
    transposed: bool
    where: list[int]
    """Indices of the factors in the layout, basis by basis."""
    u: Tensor
    """(count, features, kept)"""
    v: Tensor
    """(count, rows, rows), block by block for the factors of every basis."""

    def __post_init__(self) -> None:
        self.count, self.rows, self.kept = len(self.u), sum(self.ranks), self.u.shape[2]
        self._columns = [self.kept, self.features - self.kept]
        self._lower = self.u[:, self.kept :]
        self._lower_back = self._lower.mT
        self._v_back = self.v.mT

    def forward(self, x: Tensor, top: Tensor, others: Tensor | None) -> None:
        """Fill in V' X U, as many columns as there are, and V' X R."""
        first = torch.bmm(x, _leading(self.u, top.shape[2]))
        top.copy_(torch.bmm(self._v_back, first))

        if others is not None and others.numel():
            z, m = self._completion
            leading, rest = x.split_with_sizes(self._columns, 2)
            y = torch.bmm(torch.bmm(leading, z).add_(first), m)
            second = rest - torch.bmm(y, self._lower_back)
            others.copy_(torch.bmm(self._v_back, second))

    def inverse(self, x: Tensor, top: Tensor, others: Tensor | None) -> None:
        """Fill in X."""
        first = torch.bmm(self.v, top)
        if others is None or not others.numel():
            x.copy_(torch.bmm(_leading(self.u, top.shape[2]), first.mT).mT)
            return

        second = torch.bmm(self.v, others)
        z, m = self._completion
        y = torch.bmm(torch.bmm(second, self._lower), m)
        x.copy_(torch.bmm(self.u, (first - y).mT).mT)
        leading, rest = x.split_with_sizes(self._columns, 2)
        leading -= torch.bmm(y, z.mT)
        rest += second

    @cached_property
    def _completion(self) -> tuple[Tensor, Tensor]:
        """Z and (I + P)^-1 of the polar decomposition Z P of U's first rows.

        The block reflector that takes minus Z' of the first axes to U takes the other axes to R
        (Schreiber and Parlett, Block reflectors: theory and computation, 1988, section 2).
        """
        left, values, right = torch.linalg.svd(self.u[:, : self.kept].double())
        z = left @ right
        m = right.mT @ (right / (1 + values)[..., None])

        return z.float(), m.float()


def spreads(factors: Sequence[Factor], model: Model) -> Codes:
    """Return the logarithm of every coefficient's expected standard deviation, factor by factor in
    layout order."""
    rows = torch.split(model.rows.int(), [factor.rank for factor in factors])
    cols = torch.split(model.cols.int(), [factor.features for factor in factors])
    logarithms: Codes = torch.cat(
        [(r[:, None] + c).reshape(-1) for r, c in zip(rows, cols, strict=True)]
    ).numpy()

    return logarithms


def power(codes: NDArray[np.integer] | Doubles) -> Doubles:
    """Return the variance of a logarithm."""
    variances: Doubles = np.exp2(np.asarray(codes) / (OCTAVE / 2))
    return variances


def _pairs(rotations: Tensor, factors: Sequence[Factor]) -> list[tuple[Tensor, Factor]]:
    return list(
        zip(torch.split(rotations, [factor.rank**2 for factor in factors]), factors, strict=True)
    )
