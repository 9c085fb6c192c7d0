"""The covariance that a published transform of `klt` stands for, which a refit blends with new
updates."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fluvial.codecs.klt.factors import Factor
from fluvial.codecs.klt.model import Model
from fluvial.codecs.klt.tables import Doubles
from fluvial.codecs.klt.transform import Transform, power, spreads


class PriorCovariance:
    """The covariance that a model stands for, with a trace of 1 over all factors."""

    def __init__(self, factors: Sequence[Factor], share: float, model: Model) -> None:
        self.factors = factors
        self.share = share
        self.model = model
        groups = power(model.groups.numpy().astype(np.float64) - float(model.groups.max()))
        group_power = np.repeat(
            groups[[factor.group for factor in factors]],
            [factor.rank * factor.features for factor in factors],
        )
        variance = power(spreads(factors, model)) * group_power
        self.variance = variance / variance.sum()
        self.transform = Transform(factors, share, model)
        self.ends = np.cumsum([factor.rank * factor.features for factor in factors])

    def _of(self, index: int) -> Tensor:
        factor = self.factors[index]
        flat = self.variance[self.ends[index] - factor.rank * factor.features : self.ends[index]]
        return torch.from_numpy(flat.copy()).view(factor.rank, factor.features)

    def _bases(self, transform: Transform, index: int) -> tuple[Tensor, Tensor]:
        """Return U and V of a factor."""
        for batch in transform.batches:
            if index in batch.where:
                basis, slot = divmod(batch.where.index(index), len(batch.ranks))
                rows = slice(sum(batch.ranks[:slot]), sum(batch.ranks[: slot + 1]))
                return batch.u[basis].double(), batch.v[basis, rows, rows].double()

        raise AssertionError("every factor is in a batch")

    def columns(self, index: int) -> Tensor:
        """Return the covariance of columns (features, features): the leading directions, and what
        is left spread evenly over all others."""
        u, _ = self._bases(self.transform, index)
        return _spread_evenly(u, self._of(index).sum(0))

    def rows(self, index: int) -> Tensor:
        """Return the covariance of rows (rank, rank)."""
        _, v = self._bases(self.transform, index)
        return v @ torch.diag(self._of(index).sum(1)) @ v.T

    def variances(self, transform: Transform) -> Doubles:
        """Return the variances in the coordinates of another transform, factor by factor."""
        by_factor = []
        for index, factor in enumerate(self.factors):
            mine = self._bases(self.transform, index)
            others = self._bases(transform, index)
            variance = self._of(index)
            rows = (others[1].T @ mine[1]).square() @ variance.sum(1)
            directions = (mine[0].T @ others[0]).square()
            tail = variance.sum(0)[mine[0].shape[1] :].sum() / max(
                factor.features - mine[0].shape[1], 1
            )
            top = tail + directions.T @ (variance.sum(0)[: mine[0].shape[1]] - tail)
            left = (variance.sum() - top.sum()).clamp_min(0) / max(factor.features - len(top), 1)
            cols = torch.cat([top, left.expand(factor.features - len(top))])
            by_factor.append(
                (torch.outer(rows, cols) / variance.sum().clamp_min(1e-60)).reshape(-1)
            )

        variances: Doubles = torch.cat(by_factor).numpy()
        return variances


def _spread_evenly(u: Tensor, variance: Tensor) -> Tensor:
    tail = variance[u.shape[1] :].sum() / max(len(variance) - u.shape[1], 1)
    spread: Tensor = (
        u @ torch.diag(variance[: u.shape[1]] - tail) @ u.T
        + tail * torch.eye(len(variance)).double()
    )
    return spread
