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
from itertools import accumulate

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

        top_sizes = [batch.count * batch.rows * batch.kept for batch in self.batches]
        sizes = [batch.count * batch.rows * batch.features for batch in self.batches]
        self.num_tops = sum(top_sizes)
        rest_sizes = [size - top for size, top in zip(sizes, top_sizes, strict=True)]
        self._starts = list(
            zip(
                accumulate(sizes, initial=0),
                accumulate(top_sizes, initial=0),
                accumulate(rest_sizes, initial=self.num_tops),
                strict=True,
            )
        )[:-1]
        """First value of every batch among those in order of the batches, and its first coefficient
        of X U and of X R."""
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

        values = vector.view(-1, self._piece).index_select(0, self._order)
        latent = torch.from_numpy(np.zeros(size, np.float32))
        for batch, x, top, others in self._views(values, latent, columns):
            batch.forward(x, top, others)

        return latent

    def inverse(self, latent: Tensor, *, columns: Sequence[int] | None = None) -> Tensor:
        """Return the update (numel,) of coefficients; when there are only `num_tops`, or only
        `columns`, the others are 0."""
        if columns is None:
            columns = [
                batch.features if len(latent) > self.num_tops else batch.kept
                for batch in self.batches
            ]

        latent = latent.contiguous()
        values = latent.new_empty(len(self._order), self._piece)
        for batch, x, top, others in self._views(values, latent, columns):
            batch.inverse(x, top, others)

        return values.index_select(0, self._back).view(-1)

    def _views(
        self, values: Tensor, latent: Tensor, columns: Sequence[int]
    ) -> Iterator[tuple["Batch", Tensor, Tensor, Tensor | None]]:
        """Yield every batch with X (count, rows, features), the leading `columns` of X U, and X R,
        which is None unless there are more columns than X U has."""
        start = latent.storage_offset()
        for batch, most, (x, top, rest) in zip(self.batches, columns, self._starts, strict=True):
            count, rows, features, kept = batch.count, batch.rows, batch.features, batch.kept
            strides = (1, rows) if batch.transposed else (features, 1)
            others = (count, rows, features - kept)
            yield (
                batch,
                values.as_strided((count, rows, features), (rows * features, *strides), x),
                latent.as_strided(
                    (count, rows, min(most, kept)), (rows * kept, kept, 1), start + top
                ),
                latent[rest : rest + math.prod(others)].view(others) if most > kept else None,
            )


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write products of matrices; torch has a fast way into contiguous memory only."""
    if out.is_contiguous():
        torch.bmm(left, right, out=out)
    else:
        out.copy_(torch.bmm(left, right))


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
        _multiply(self._v_back, first, top)

        if others is not None:
            z, m = self._completion
            leading, rest = x.split_with_sizes(self._columns, 2)
            y = torch.bmm(torch.bmm(leading, z).add_(first), m)
            second = torch.bmm(y, self._lower_back)
            torch.sub(rest, second, out=second)
            _multiply(self._v_back, second, others)

    def inverse(self, x: Tensor, top: Tensor, others: Tensor | None) -> None:
        """Fill in X."""
        first = torch.bmm(self.v, top)
        if others is None:
            _multiply(_leading(self.u, top.shape[2]), first.mT, x.mT)
            return

        second = torch.bmm(self.v, others)
        z, m = self._completion
        y = torch.bmm(torch.bmm(second, self._lower), m)
        _multiply(self.u, (first - y).mT, x.mT)
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
