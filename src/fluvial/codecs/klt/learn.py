"""Fit of the transform of `klt`: principal directions and variances of updates, or of their second
moments."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fluvial.codecs.klt.factors import Factor, factors_of, flat, group_sizes, num_published
from fluvial.codecs.klt.linalg import NOISE_FP32, leading, leading_of, orthonormal, to_int8
from fluvial.codecs.klt.model import Model
from fluvial.codecs.klt.prior import PriorCovariance
from fluvial.codecs.klt.tables import KNOWN, LEARNED, OCTAVE, Doubles, Learned
from fluvial.codecs.klt.transform import Batch, Transform
from fluvial.wire.tensors import Layout, Named

_UNSEEN = 10 * OCTAVE


_FLOOR = 1e-4  # of a factor's mean variance, for a direction that `fit` hardly saw


def learn(
    layout: Layout,
    share: float,
    updates: Sequence[Named],
    *,
    prior: Model | None = None,
    weight: float = 1.0,
) -> Model:
    """Return the principal directions and variances of `updates`, every update counting the same;
    tables stay generic.

    With a `prior`, its own covariance counts 1 - weight and its tables are kept.
    """
    factors = factors_of(layout)
    covariance_before = None if prior is None else PriorCovariance(factors, share, prior)
    norms = [max(float(layout.flatten(update).norm()), 1e-30) for update in updates]
    energy = np.zeros(1 + max(factor.group for factor in factors))
    by_factor = []

    for factor in factors:
        x = torch.stack([update[factor.name].float() for update in updates])
        energy[factor.group] += float(x.double().square().sum())
        by_factor.append((x.mT if factor.transposed else x) / torch.tensor(norms)[:, None, None])

    mean_energy = max(sum(float(x.double().square().sum()) for x in by_factor), 1e-60)
    grams: dict[int, Tensor] = {}
    for index, (x, factor) in enumerate(zip(by_factor, factors, strict=True)):
        rows = x.flatten(0, 1).double()
        gram = rows.T @ rows * (weight / mean_energy)
        if covariance_before is not None:
            gram += (1 - weight) * covariance_before.columns(index)
        grams[factor.basis] = grams[factor.basis] + gram if factor.basis in grams else gram

    tops = [
        to_int8(leading(grams[basis], num_published(len(grams[basis]), share)))
        for basis in range(len(grams))
    ]
    del grams
    rotations = []

    for index, (x, factor) in enumerate(zip(by_factor, factors, strict=True)):
        covariance = torch.einsum("urf,usf->rs", x.double(), x.double()) * (weight / mean_energy)
        if covariance_before is not None:
            covariance += (1 - weight) * covariance_before.rows(index)
        rotations.append(torch.round(127 * leading(covariance, factor.rank)).to(torch.int8))

    groups = _levels(torch.from_numpy(energy) / (group_sizes(factors) * len(updates)))
    if covariance_before is not None:
        groups = torch.round((1 - weight) * covariance_before.model.groups + weight * groups)

    blank = (
        _blank_tables() if prior is None else {"counts": prior.counts, "centroids": prior.centroids}
    )
    zeros = {
        "rows": torch.zeros(sum(factor.rank for factor in factors), dtype=torch.int8),
        "cols": torch.zeros(sum(factor.features for factor in factors), dtype=torch.int8),
    }
    shape = {
        "tops": torch.cat([top.reshape(-1) for top in tops]),
        "groups": groups.to(torch.int16),
        **blank,
    }
    shape["rotations"] = torch.cat([rotation.reshape(-1) for rotation in rotations])
    transform = Transform(factors, share, Model(**shape, **zeros))
    total = np.zeros(layout.numel)

    for number in range(len(updates)):
        latent = transform.forward(
            torch.cat(
                [flat(x[number], factor) for x, factor in zip(by_factor, factors, strict=True)]
            )
        )
        total += latent.double().numpy()[transform.place] ** 2

    mean = total * (weight / mean_energy)
    if covariance_before is not None:
        mean += (1 - weight) * covariance_before.variances(transform)

    rows, cols = _separate(mean, factors)
    return Model(**shape, rows=rows, cols=cols)


def learn_moments(
    layout: Layout,
    share: float,
    grams: Iterable[Tensor],
    rows: Sequence[Tensor],
    energy: Tensor,
    count: int,
) -> Model:
    """Return the model learned from second moments of `count` updates; variances are a product of
    rows and columns from the start.

    Both are shrunk, because what weighs the samples of one is the other's energy: they are fewer
    than `learn` has. Sums over updates of unit norm: X'X (features, features) of every basis and
    XX' (rank, rank) of every factor, of fp32 precision; `energy` (groups,) is that of the updates
    as they were.
    """
    factors = factors_of(layout)
    rotations = []
    along = []

    for moment in rows:
        values, vectors = torch.linalg.eigh(moment.double())
        rotations.append(
            torch.round(127 * leading_of(values, vectors, len(moment), NOISE_FP32)).to(torch.int8)
        )
        v = orthonormal(rotations[-1]).double()
        along.append((v.T @ moment.double() @ v).diagonal().clamp_min(0))

    tops = []
    columns = []
    for basis, gram in enumerate(grams):
        values, vectors = torch.linalg.eigh(gram.double())
        tops.append(
            to_int8(leading_of(values, vectors, num_published(len(gram), share), NOISE_FP32))
        )
        members = torch.cat(
            [
                along_rows
                for factor, along_rows in zip(factors, along, strict=True)
                if factor.basis == basis
            ]
        )
        values = _shrunk(values.clamp_min(0), count * _spread_over(members))
        columns.append(_along(tops[-1], vectors * values.sqrt()))

    variances = []
    for factor, along_rows in zip(factors, along, strict=True):
        cols = columns[factor.basis]
        shrunk = _shrunk(along_rows, count * _spread_over(cols))
        variances.append(torch.outer(shrunk, cols / cols.sum().clamp_min(1e-60)).reshape(-1))

    mean = torch.cat(variances)
    row_codes, col_codes = _separate((mean / mean.sum().clamp_min(1e-60)).numpy(), factors)
    return Model(
        tops=torch.cat([top.reshape(-1) for top in tops]),
        rotations=torch.cat([rotation.reshape(-1) for rotation in rotations]),
        rows=row_codes,
        cols=col_codes,
        groups=_levels(energy.double() / (group_sizes(factors) * count)).to(torch.int16),
        **_blank_tables(),
    )


def _along(top: Tensor, root: Tensor) -> Tensor:
    """Return the diagonal of Q'GQ (features,) for the basis Q that `top` (features, kept) leads; G
    = root root'."""
    features, count = top.shape
    batch = Batch(
        features, (features,), False, [0], orthonormal(top)[None], torch.eye(features)[None]
    )
    latent = torch.zeros(1, features, features)
    batch.forward(root.mT.float()[None], latent[..., :count], latent[..., count:])

    return latent[0].double().square().sum(0)


def _spread_over(variances: Tensor) -> float:
    """Return over how many directions the energy is spread: their number if all are equal, 1 if one
    has it all."""
    return float(variances.sum().square() / variances.square().sum().clamp_min(1e-60))


def _shrunk(variances: Tensor, seen: float) -> Tensor:
    """Return the variances along principal directions, which few samples make too unequal, moved
    towards their mean.

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
    """Return the logarithm of every group's root mean square."""
    groups = _log(power, 2**11)
    # A group that hardly moved says nothing about its level later, as A does in a first round,
    # where B is still zero.
    return torch.where(groups < groups.max() - _UNSEEN, groups.max(), groups)


def _separate(mean: Doubles, factors: Sequence[Factor]) -> tuple[Tensor, Tensor]:
    """Return the logarithms of rows and columns whose sum fits the variances of every factor best;
    unit mean power in groups."""
    fitted = []
    energy = np.zeros(1 + max(factor.group for factor in factors))
    pieces = torch.split(
        torch.from_numpy(mean), [factor.rank * factor.features for factor in factors]
    )

    for piece, factor in zip(pieces, factors, strict=True):
        variance = piece.view(factor.rank, factor.features)
        variance = variance.clamp_min(_FLOOR * float(variance.mean()) + 1e-30)
        rows = variance.mean(1)
        cols = variance.mean(0) / variance.mean()

        for _ in range(3):  # maximum likelihood of a separable Gaussian, in turn
            rows = (variance / cols).mean(1)
            cols = (variance / rows[:, None]).mean(0)

        energy[factor.group] += float(rows.sum() * cols.sum())
        fitted.append((rows, cols))

    unit = energy / group_sizes(factors).numpy()
    logs = []
    for (rows, cols), factor in zip(fitted, factors, strict=True):
        balance = float(
            (cols.log2().mean() - (rows / unit[factor.group]).log2().mean()).exp2().sqrt()
        )
        logs.append((_log(rows / unit[factor.group] * balance, 127), _log(cols / balance, 127)))

    return torch.cat([r for r, _ in logs]).to(torch.int8), torch.cat([c for _, c in logs]).to(
        torch.int8
    )


def _log(variance: Tensor, most: int) -> Tensor:
    codes: Tensor = torch.round(variance.clamp_min(1e-60).log2() * (OCTAVE / 2)).clamp(-most, most)
    return codes


def _blank_tables() -> Named:
    table = Learned.blend(np.zeros((LEARNED, KNOWN)), np.zeros((LEARNED, KNOWN)), 1.0)
    return {
        "counts": torch.from_numpy(table.counts.reshape(-1).copy()),
        "centroids": torch.from_numpy(table.centroids.reshape(-1).copy()),
    }
