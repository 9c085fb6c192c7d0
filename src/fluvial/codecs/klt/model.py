"""The transform of `klt`, and how it is learned: a separable Karhunen-Loeve transform of LoRA
factors.

Each factor, seen as X (rank, features), becomes Z = V' X Q with orthonormal V (rank, rank) and Q
(features, features). Q = [U, R]: the leading directions U (features, kept) are learned and
published; R completes them to a basis and costs no bytes. A factors that read the same input share
Q.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluvial.codecs.klt.tables import KNOWN, LEARNED, OCTAVE, Codes, Doubles, Learned
from fluvial.codecs.learned.canvas import path, target
from fluvial.errors import ConfigError, WireError
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, factor

_SAME_INPUT = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}
_UNSEEN = 10 * OCTAVE
_NOISE = 1e-10  # of the largest eigenvalue
_NOISE_FP32 = 1e-6  # the same where sums were sent in fp32
_FLOOR = 1e-4  # of a factor's mean variance, for a direction that `fit` hardly saw


@dataclass(frozen=True)
class Part:
    """One factor as the transform sees it: X (rank, features)."""

    name: str
    rank: int
    features: int
    transposed: bool
    basis: int
    group: int


def parts_of(layout: Layout) -> list[Part]:
    """The factors in layout order; raises `ConfigError` for what is no LoRA factor."""
    bases: dict[tuple[str, int], int] = {}
    groups: dict[tuple[str, str], int] = {}
    parts = []

    for name, shape in layout.shapes:
        kind = factor(name)
        module = target(name)
        if kind is None or len(shape) != 2 or 0 in shape:
            raise ConfigError(
                f"codec: {name!r} with shape {shape} is no LoRA factor; klt codes only A and B"
            )

        rank, features = shape if kind == "A" else shape[::-1]
        shared = kind == "A" and module in _SAME_INPUT
        key = path(name).removesuffix(module) + _SAME_INPUT[module] if shared else name
        basis = bases.setdefault((key, features), len(bases))
        group = groups.setdefault((module, kind), len(groups))
        parts.append(Part(name, rank, features, kind == "B", basis, group))

    if not parts:
        raise ConfigError("codec: the adapter has no tensors")

    return parts


def kept(features: int, share: float) -> int:
    """Published directions of an axis."""
    return max(int(share * features), 1)


@dataclass(frozen=True)
class Model:
    """What `fit` learns and `published` carries; pieces stand one after another in layout order.

    Logarithms are of standard deviations, in 1/16 octave.
    """

    tops: Tensor
    """int8: U (features, kept) of every basis, each column up to a factor."""
    rotations: Tensor
    """int8: 127 V (rank, rank) of every factor."""
    rows: Tensor
    """int8: logarithm for each row of Z; row + column is the entry's, of about unit mean power in
    every group."""
    cols: Tensor
    """int8: the same for each column."""
    groups: Tensor
    """int16: logarithm for each group (target, factor) of its root mean square over the updates of
    `fit`."""
    counts: Tensor
    """int16 (LEARNED * KNOWN): see `Learned`."""
    centroids: Tensor
    """int8 (LEARNED * (KNOWN - 1))."""

    def named(self) -> Named:
        """As named tensors."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def learned(self) -> Learned:
        """The tables of the lowest classes."""
        return Learned(
            self.counts.numpy().reshape(LEARNED, KNOWN),
            self.centroids.numpy().reshape(LEARNED, KNOWN - 1),
        )

    @classmethod
    def check(cls, layout: Layout, share: float, payload: Payload) -> "Model":
        """From what was published; raises `WireError` if a tensor is missing, left over or of
        another form."""
        parts = parts_of(layout)
        expected = {
            "tops": (torch.int8, sum(n * kept(n, share) for n in _basis_features(parts))),
            "rotations": (torch.int8, sum(part.rank**2 for part in parts)),
            "rows": (torch.int8, sum(part.rank for part in parts)),
            "cols": (torch.int8, sum(part.features for part in parts)),
            "groups": (torch.int16, 1 + max(part.group for part in parts)),
            "counts": (torch.int16, LEARNED * KNOWN),
            "centroids": (torch.int8, LEARNED * (KNOWN - 1)),
        }

        if set(payload.tensors) != set(expected):
            raise WireError(
                f"klt: expected tensors {sorted(expected)}, found {sorted(payload.tensors)[:8]}"
            )

        for name, (dtype, length) in expected.items():
            found = payload.tensors[name]
            if found.dtype != dtype or found.shape != (length,):
                raise WireError(
                    f"klt: {name}: expected {dtype} ({length},), found {found.dtype} {tuple(found.shape)}; both "
                    "ends need the same codec settings"
                )

        if int(payload.tensors["counts"].min()) < 1:
            raise WireError("klt: counts: a frequency is below 1")

        return cls(**payload.tensors)


class Transform:
    """Q and V of all factors, and the order of the coefficients.

    Coefficients stand in two halves, first X U of all factors, then X R; the second can be left
    out. Factors of equal shapes are one batched product.
    """

    def __init__(self, parts: Sequence[Part], share: float, model: Model) -> None:
        shapes = [(features, kept(features, share)) for features in _basis_features(parts)]
        tops = torch.split(model.tops, [rows * cols for rows, cols in shapes])
        rotations = [
            _orthonormal(v.view(part.rank, part.rank)) for v, part in _pairs(model.rotations, parts)
        ]
        members: dict[int, list[int]] = {}

        for index, part in enumerate(parts):
            members.setdefault(part.basis, []).append(index)
        kinds: dict[tuple[int, tuple[int, ...], bool], list[int]] = {}
        for basis, those in members.items():
            kind = (
                parts[those[0]].features,
                tuple(parts[i].rank for i in those),
                parts[those[0]].transposed,
            )
            kinds.setdefault(kind, []).append(basis)

        self.batches = []
        for (features, ranks, transposed), bases in kinds.items():
            u = torch.stack([_orthonormal(tops[basis].view(shapes[basis])) for basis in bases])
            v = torch.stack(
                [_block_diagonal([rotations[i] for i in members[basis]]) for basis in bases]
            )
            where = [i for basis in bases for i in members[basis]]
            self.batches.append(Batch(features, ranks, transposed, where, u, v))

        self.num_tops = sum(batch.count * batch.rows * batch.kept for batch in self.batches)
        self.place = self._place(
            parts, [members[basis] for bases in kinds.values() for basis in bases]
        )
        self._piece, self._order, self._back = _pieces(
            [part.rank * part.features for part in parts],
            [i for batch in self.batches for i in batch.where],
        )

    def _place(self, parts: Sequence[Part], order: list[list[int]]) -> NDArray[np.intp]:
        """Where the coefficients of the factors are, factor by factor in layout order, each as
        (rank, features)."""
        place: dict[int, NDArray[np.intp]] = {}
        top = 0
        rest = self.num_tops
        each = iter(order)

        for batch in self.batches:
            for _ in range(batch.count):
                for index in next(each):
                    rank = parts[index].rank
                    others = batch.features - batch.kept
                    first = top + np.arange(rank * batch.kept).reshape(rank, batch.kept)
                    second = rest + np.arange(rank * others).reshape(rank, others)
                    place[index] = np.concatenate([first, second], axis=1).ravel()
                    top = top + first.size
                    rest = rest + second.size

        return np.concatenate([place[index] for index in range(len(parts))])

    def forward(
        self, vector: Tensor, *, rest: bool = True, columns: Sequence[int] | None = None
    ) -> Tensor:
        """Coefficients of a flattened update: all (numel,), or without `rest` the first `num_tops`.

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
            batch.forward(x, top[..., :count], others if count > batch.kept else None)

        return latent

    def inverse(self, latent: Tensor, *, columns: Sequence[int] | None = None) -> Tensor:
        """The update (numel,) of coefficients; when there are only `num_tops`, or only `columns`,
        the others are 0."""
        if columns is None:
            columns = [
                batch.features if len(latent) > self.num_tops else batch.kept
                for batch in self.batches
            ]

        values = latent.new_empty(self._piece * len(self._order))
        for batch, count, (x, top, others) in zip(
            self.batches, columns, self._views(values, latent), strict=True
        ):
            batch.inverse(x, top[..., :count], others if count > batch.kept else None)

        return values.view(-1, self._piece).index_select(0, self._back).view(-1)

    def _views(self, values: Tensor, latent: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of every batch: X (count, rows, features), X U and X R, the last empty if `latent` has
        only `num_tops`."""
        start = 0
        top = 0
        rest = self.num_tops

        for batch in self.batches:
            each = batch.count * batch.rows
            tops = batch.count * batch.rows * batch.kept
            size = each * batch.features
            others = each * batch.features - tops
            x = values[start : start + size]

            if batch.transposed:
                x = x.view(batch.count, batch.features, batch.rows).mT
            else:
                x = x.view(batch.count, batch.rows, batch.features)

            second = latent[rest : rest + others].reshape(batch.count, batch.rows, -1)
            yield x, latent[top : top + tops].view(batch.count, batch.rows, -1), second
            start = start + size
            top = top + tops
            rest = rest + others


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    diagonal = torch.zeros(sum(len(block) for block in blocks), sum(len(block) for block in blocks))
    start = 0
    for block in blocks:
        diagonal[start : start + len(block), start : start + len(block)] = block
        start += len(block)

    return diagonal


def _pieces(sizes: Sequence[int], order: Sequence[int]) -> tuple[int, Tensor, Tensor]:
    """The largest piece that divides all factors, and the pieces in `order` of the factors, and
    back."""
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
    """Of the first, second, ... factor of every basis."""
    transposed: bool
    where: list[int]
    """Which factors of the layout, basis by basis."""
    u: Tensor
    """(count, features, kept)"""
    v: Tensor
    """(count, rows, rows), block by block for the factors of every basis."""

    def __post_init__(self) -> None:
        self.count, self.rows, self.kept = len(self.u), sum(self.ranks), self.u.shape[2]

    def forward(self, x: Tensor, top: Tensor, others: Tensor | None) -> None:
        """Fill in V' X U, as many columns as there are, and V' X R."""
        first = x @ self.u[..., : top.shape[2]]
        top.copy_(self.v.mT @ first)

        if others is not None and others.numel():
            z, m = self._completion
            second = (
                x[..., self.kept :]
                - (first + x[..., : self.kept] @ z) @ m @ self.u[:, self.kept :].mT
            )
            others.copy_(self.v.mT @ second)

    def inverse(self, x: Tensor, top: Tensor, others: Tensor | None) -> None:
        """Fill in X."""
        first = self.v @ top
        if others is None or not others.numel():
            x.copy_((self.u[..., : top.shape[2]] @ first.mT).mT)
            return

        second = self.v @ others
        z, m = self._completion
        y = second @ self.u[:, self.kept :] @ m
        x.copy_((self.u @ (first - y).mT).mT)
        x[..., : self.kept] -= y @ z.mT
        x[..., self.kept :] += second

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


def spreads(parts: Sequence[Part], model: Model) -> Codes:
    """Logarithm of every coefficient's expected standard deviation, factor by factor in layout
    order."""
    rows = torch.split(model.rows.int(), [part.rank for part in parts])
    cols = torch.split(model.cols.int(), [part.features for part in parts])
    found: Codes = torch.cat(
        [(r[:, None] + c).reshape(-1) for r, c in zip(rows, cols, strict=True)]
    ).numpy()

    return found


def power(codes: NDArray[np.integer] | Doubles) -> Doubles:
    """Variance of a logarithm."""
    found: Doubles = np.exp2(np.asarray(codes) / (OCTAVE / 2))
    return found


def learn(
    layout: Layout,
    share: float,
    updates: Sequence[Named],
    *,
    prior: Model | None = None,
    weight: float = 1.0,
) -> Model:
    """Principal directions and variances of `updates`, every update counting the same; tables stay
    generic.

    With a `prior`, its own covariance counts 1 - weight and its tables are kept.
    """
    parts = parts_of(layout)
    old = None if prior is None else _Old(parts, share, prior)
    norms = [max(float(layout.flatten(update).norm()), 1e-30) for update in updates]
    energy = np.zeros(1 + max(part.group for part in parts))
    seen = []

    for part in parts:
        x = torch.stack([update[part.name].float() for update in updates])
        energy[part.group] += float(x.double().square().sum())
        seen.append((x.mT if part.transposed else x) / torch.tensor(norms)[:, None, None])

    each = max(sum(float(x.double().square().sum()) for x in seen), 1e-60)
    grams: dict[int, Tensor] = {}
    for index, (x, part) in enumerate(zip(seen, parts, strict=True)):
        rows = x.flatten(0, 1).double()
        gram = rows.T @ rows * (weight / each)
        if old is not None:
            gram += (1 - weight) * old.columns(index)
        grams[part.basis] = grams[part.basis] + gram if part.basis in grams else gram

    tops = [
        _to_int8(_leading(grams[basis], kept(len(grams[basis]), share)))
        for basis in range(len(grams))
    ]
    del grams
    rotations = []

    for index, (x, part) in enumerate(zip(seen, parts, strict=True)):
        covariance = torch.einsum("urf,usf->rs", x.double(), x.double()) * (weight / each)
        if old is not None:
            covariance += (1 - weight) * old.rows(index)
        rotations.append(torch.round(127 * _leading(covariance, part.rank)).to(torch.int8))

    groups = _levels(torch.from_numpy(energy) / (_sizes(parts) * len(updates)))
    if old is not None:
        groups = torch.round((1 - weight) * old.model.groups + weight * groups)

    blank = (
        _blank_tables() if prior is None else {"counts": prior.counts, "centroids": prior.centroids}
    )
    zeros = {
        "rows": torch.zeros(sum(part.rank for part in parts), dtype=torch.int8),
        "cols": torch.zeros(sum(part.features for part in parts), dtype=torch.int8),
    }
    shape = {
        "tops": torch.cat([top.reshape(-1) for top in tops]),
        "groups": groups.to(torch.int16),
        **blank,
    }
    shape["rotations"] = torch.cat([rotation.reshape(-1) for rotation in rotations])
    transform = Transform(parts, share, Model(**shape, **zeros))
    total = np.zeros(layout.numel)

    for number in range(len(updates)):
        latent = transform.forward(
            torch.cat([_flat(x[number], part) for x, part in zip(seen, parts, strict=True)])
        )
        total += latent.double().numpy()[transform.place] ** 2

    mean = total * (weight / each)
    if old is not None:
        mean += (1 - weight) * old.variances(transform)

    rows, cols = _separate(mean, parts)
    return Model(**shape, rows=rows, cols=cols)


def learn_moments(
    layout: Layout,
    share: float,
    grams: Iterable[Tensor],
    rows: Sequence[Tensor],
    energy: Tensor,
    count: int,
) -> Model:
    """The same from second moments of `count` updates; variances are a product of rows and columns
    from the start.

    Both are shrunk, because what weighs the samples of one is the other's energy: they are fewer
    than `learn` has. Sums over updates of unit norm: X'X (features, features) of every basis and
    XX' (rank, rank) of every factor, of fp32 precision; `energy` (groups,) is that of the updates
    as they were.
    """
    parts = parts_of(layout)
    rotations = []
    along = []

    for each in rows:
        values, vectors = torch.linalg.eigh(each.double())
        rotations.append(
            torch.round(127 * _leading_of(values, vectors, len(each), _NOISE_FP32)).to(torch.int8)
        )
        v = _orthonormal(rotations[-1]).double()
        along.append((v.T @ each.double() @ v).diagonal().clamp_min(0))

    tops = []
    columns = []
    for basis, gram in enumerate(grams):
        values, vectors = torch.linalg.eigh(gram.double())
        tops.append(_to_int8(_leading_of(values, vectors, kept(len(gram), share), _NOISE_FP32)))
        members = torch.cat(
            [found for part, found in zip(parts, along, strict=True) if part.basis == basis]
        )
        values = _shrunk(values.clamp_min(0), count * _spread_over(members))
        columns.append(_along(tops[-1], vectors * values.sqrt()))

    variances = []
    for part, found in zip(parts, along, strict=True):
        cols = columns[part.basis]
        shrunk = _shrunk(found, count * _spread_over(cols))
        variances.append(torch.outer(shrunk, cols / cols.sum().clamp_min(1e-60)).reshape(-1))

    mean = torch.cat(variances)
    row_codes, col_codes = _separate((mean / mean.sum().clamp_min(1e-60)).numpy(), parts)
    return Model(
        tops=torch.cat([top.reshape(-1) for top in tops]),
        rotations=torch.cat([rotation.reshape(-1) for rotation in rotations]),
        rows=row_codes,
        cols=col_codes,
        groups=_levels(energy.double() / (_sizes(parts) * count)).to(torch.int16),
        **_blank_tables(),
    )


def _along(top: Tensor, root: Tensor) -> Tensor:
    """Diagonal of Q'GQ (features,) for the basis Q that `top` (features, kept) leads; G = root
    root'."""
    features, count = top.shape
    batch = Batch(
        features, (features,), False, [0], _orthonormal(top)[None], torch.eye(features)[None]
    )
    latent = torch.zeros(1, features, features)
    batch.forward(root.mT.float()[None], latent[..., :count], latent[..., count:])

    return latent[0].double().square().sum(0)


def _spread_over(variances: Tensor) -> float:
    """Over how many directions the energy is spread: their number if all are equal, 1 if one has it
    all."""
    return float(variances.sum().square() / variances.square().sum().clamp_min(1e-60))


def _shrunk(variances: Tensor, seen: float) -> Tensor:
    """Variances along principal directions, which few samples make too unequal, moved towards their
    mean.

    The oracle approximating shrinkage of Chen, Wiesel, Eldar and Hero, Shrinkage algorithms for
    MMSE covariance estimation, 2010. An update gives X'X as many of the `seen` samples as its
    energy is spread over rows, and XX' as many as it is spread over columns.
    """
    p = len(variances)
    total = float(variances.sum())
    squares = float(variances.square().sum())
    unequal = (seen + 1 - 2 / p) * (squares - total**2 / p)
    share = min(((1 - 2 / p) * squares + total**2) / unequal, 1.0) if unequal > 0 else 1.0

    return (1 - share) * variances + share * total / p


def _levels(power: Tensor) -> Tensor:
    """Logarithm of every group's root mean square."""
    groups = _log(power, 2**11)
    # A group that hardly moved says nothing about its level later, as A does in a first round,
    # where B is still zero.
    return torch.where(groups < groups.max() - _UNSEEN, groups.max(), groups)


class _Old:
    """The covariance that a model stands for, with a trace of 1 over all factors."""

    def __init__(self, parts: Sequence[Part], share: float, model: Model) -> None:
        self.parts = parts
        self.share = share
        self.model = model
        groups = power(model.groups.numpy().astype(np.float64) - float(model.groups.max()))
        factors = np.repeat(
            groups[[part.group for part in parts]], [part.rank * part.features for part in parts]
        )
        variance = power(spreads(parts, model)) * factors
        self.variance = variance / variance.sum()
        self.transform = Transform(parts, share, model)
        self.ends = np.cumsum([part.rank * part.features for part in parts])

    def _of(self, index: int) -> Tensor:
        part = self.parts[index]
        flat = self.variance[self.ends[index] - part.rank * part.features : self.ends[index]]
        return torch.from_numpy(flat.copy()).view(part.rank, part.features)

    def _bases(self, transform: Transform, index: int) -> tuple[Tensor, Tensor]:
        """U and V of a factor."""
        for batch in transform.batches:
            if index in batch.where:
                basis, slot = divmod(batch.where.index(index), len(batch.ranks))
                rows = slice(sum(batch.ranks[:slot]), sum(batch.ranks[: slot + 1]))
                return batch.u[basis].double(), batch.v[basis, rows, rows].double()

        raise AssertionError("every factor is in a batch")

    def columns(self, index: int) -> Tensor:
        """(features, features): the leading directions, and what is left spread evenly over all
        others."""
        u, _ = self._bases(self.transform, index)
        return _spread_evenly(u, self._of(index).sum(0))

    def rows(self, index: int) -> Tensor:
        """(rank, rank)"""
        _, v = self._bases(self.transform, index)
        return v @ torch.diag(self._of(index).sum(1)) @ v.T

    def variances(self, transform: Transform) -> Doubles:
        """In the coordinates of another transform, factor by factor."""
        found = []
        for index, part in enumerate(self.parts):
            mine = self._bases(self.transform, index)
            others = self._bases(transform, index)
            variance = self._of(index)
            rows = (others[1].T @ mine[1]).square() @ variance.sum(1)
            directions = (mine[0].T @ others[0]).square()
            tail = variance.sum(0)[mine[0].shape[1] :].sum() / max(
                part.features - mine[0].shape[1], 1
            )
            top = tail + directions.T @ (variance.sum(0)[: mine[0].shape[1]] - tail)
            left = (variance.sum() - top.sum()).clamp_min(0) / max(part.features - len(top), 1)
            cols = torch.cat([top, left.expand(part.features - len(top))])
            found.append((torch.outer(rows, cols) / variance.sum().clamp_min(1e-60)).reshape(-1))

        variances: Doubles = torch.cat(found).numpy()
        return variances


def _spread_evenly(u: Tensor, variance: Tensor) -> Tensor:
    tail = variance[u.shape[1] :].sum() / max(len(variance) - u.shape[1], 1)
    spread: Tensor = (
        u @ torch.diag(variance[: u.shape[1]] - tail) @ u.T
        + tail * torch.eye(len(variance)).double()
    )
    return spread


def _separate(mean: Doubles, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Logarithms of rows and columns whose sum fits the variances of every factor best; unit mean
    power in groups."""
    fitted = []
    energy = np.zeros(1 + max(part.group for part in parts))
    pieces = torch.split(torch.from_numpy(mean), [part.rank * part.features for part in parts])

    for piece, part in zip(pieces, parts, strict=True):
        variance = piece.view(part.rank, part.features)
        variance = variance.clamp_min(_FLOOR * float(variance.mean()) + 1e-30)
        rows = variance.mean(1)
        cols = variance.mean(0) / variance.mean()

        for _ in range(3):  # maximum likelihood of a separable Gaussian, in turn
            rows = (variance / cols).mean(1)
            cols = (variance / rows[:, None]).mean(0)

        energy[part.group] += float(rows.sum() * cols.sum())
        fitted.append((rows, cols))

    unit = energy / _sizes(parts).numpy()
    logs = []
    for (rows, cols), part in zip(fitted, parts, strict=True):
        balance = float(
            (cols.log2().mean() - (rows / unit[part.group]).log2().mean()).exp2().sqrt()
        )
        logs.append((_log(rows / unit[part.group] * balance, 127), _log(cols / balance, 127)))

    return torch.cat([r for r, _ in logs]).to(torch.int8), torch.cat([c for _, c in logs]).to(
        torch.int8
    )


def _log(variance: Tensor, most: int) -> Tensor:
    codes: Tensor = torch.round(variance.clamp_min(1e-60).log2() * (OCTAVE / 2)).clamp(-most, most)
    return codes


def _leading(gram: Tensor, count: int) -> Tensor:
    """Eigenvectors (n, count) of the largest eigenvalues; the largest component of each is
    positive.

    Where there is nothing but rounding noise the direction is 0, because which one LAPACK picks is
    no function of the updates; `_orthonormal` completes such columns.
    """
    values, vectors = torch.linalg.eigh(gram)
    return _leading_of(values, vectors, count, _NOISE)


def _leading_of(values: Tensor, vectors: Tensor, count: int, noise: float) -> Tensor:
    """The same from all eigenvalues, rising, and their eigenvectors; `noise` as a share of the
    largest."""
    values = values.flip(-1)[..., :count]
    vectors = vectors.flip(-1)[..., :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    signed: Tensor = vectors * largest.sign() * (values > noise * values[0])

    return signed


def _to_int8(columns: Tensor) -> Tensor:
    codes: Tensor = torch.round(127 * columns / columns.abs().amax(0).clamp_min(1e-30)).to(
        torch.int8
    )
    return codes


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the same leading spans, fp32."""
    q, r = torch.linalg.qr(columns.double())
    signed: Tensor = (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).float()
    return signed


def _blank_tables() -> Named:
    table = Learned.blend(np.zeros((LEARNED, KNOWN)), np.zeros((LEARNED, KNOWN)), 1.0)
    return {
        "counts": torch.from_numpy(table.counts.reshape(-1).copy()),
        "centroids": torch.from_numpy(table.centroids.reshape(-1).copy()),
    }


def _flat(x: Tensor, part: Part) -> Tensor:
    return (x.T if part.transposed else x).reshape(-1)


def _sizes(parts: Sequence[Part]) -> Tensor:
    sizes = torch.zeros(1 + max(part.group for part in parts), dtype=torch.float64)
    for part in parts:
        sizes[part.group] += part.rank * part.features
    return sizes


def _basis_features(parts: Sequence[Part]) -> list[int]:
    """Features of every basis."""
    return list({part.basis: part.features for part in parts}.values())


def _pairs(rotations: Tensor, parts: Sequence[Part]) -> list[tuple[Tensor, Part]]:
    return list(zip(torch.split(rotations, [part.rank**2 for part in parts]), parts, strict=True))
