"""Matrices of low rank as products of two factors: sums, norms and best approximations.

Nothing computes the product itself. A QR of each factor leaves a core as small as the rank, and the
core has the singular values of the product.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_NOISE = 1e-13
"""Singular values below this share of the largest are rounding in fp64, and count as zero."""


@dataclass(frozen=True)
class LowRank:
    """The matrix left (out, rank) times right (rank, in), in fp64."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, b: Tensor, a: Tensor) -> Self:
        """Return the product of LoRA's B (out, rank) and A (rank, in)."""
        return cls(b.detach().double(), a.detach().double())

    @property
    def rank(self) -> int:
        """The number of components, an upper bound of the rank of the matrix."""
        return self.left.shape[1]

    def times(self, factor: float) -> "LowRank":
        """Return the matrix times `factor`."""
        return LowRank(self.left * factor, self.right)

    def first(self, rank: int) -> "LowRank":
        """Return the first `rank` components."""
        return LowRank(self.left[:, :rank], self.right[:rank])

    def after(self, rank: int) -> "LowRank":
        """Return the components after the first `rank`."""
        return LowRank(self.left[:, rank:], self.right[rank:])

    def padded(self, rank: int) -> "LowRank":
        """Return the same matrix with zero components behind its own, up to `rank`."""
        missing = rank - self.rank
        left = self.left.new_zeros(self.left.shape[0], missing)
        right = self.right.new_zeros(missing, self.right.shape[1])
        return total([self, LowRank(left, right)])

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return float(torch.linalg.vector_norm(self._core()[1]))

    def sorted(self) -> "LowRank":
        """Return the same matrix in components of falling singular value, balanced, without zeros.

        Component j is (sqrt(s_j) u_j, sqrt(s_j) v_j), so the first r components are the best
        approximation of rank r (Eckart and Young, 1936), and both factors have equal norms. The
        entry of u_j with the largest magnitude is positive, which fixes the signs.
        """
        bases, core = self._core()
        if not core.numel():
            return self.first(0)

        u, values, v = torch.linalg.svd(core, full_matrices=False)
        count = int((values > _NOISE * values[:1]).sum())
        left = bases[0] @ u[:, :count]
        right = v[:count] @ bases[1].T
        signs = _signs(left)
        roots = values[:count].sqrt()

        return LowRank(left * (signs * roots), (signs * roots)[:, None] * right)

    def _core(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return orthonormal bases of columns and rows, and the core between them."""
        rows, row_core = torch.linalg.qr(self.left)
        columns, column_core = torch.linalg.qr(self.right.T)
        return (rows, columns), row_core @ column_core.T


def total(terms: Iterable[LowRank]) -> LowRank:
    """Return the sum of at least one matrix: the factors of all beside each other."""
    listed = list(terms)
    return LowRank(
        torch.cat([term.left for term in listed], dim=1),
        torch.cat([term.right for term in listed], dim=0),
    )


def distance(one: LowRank, other: LowRank) -> float:
    """Return the Frobenius norm of the difference of two matrices."""
    return total([one, other.times(-1.0)]).norm()


def share_of(part: float, whole: float) -> float:
    """Return the share of a norm in another one; in a norm of 0 it is 0 for nothing, else 1."""
    if whole == 0:
        return 0.0 if part == 0 else 1.0
    return part / whole


def _signs(columns: Tensor) -> Tensor:
    """Return the sign of each column's entry of largest magnitude, the first among nearly equal
    ones, so that the rounding of another processor rarely chooses another one."""
    sizes = columns.abs()
    near = sizes >= (1 - 1e-6) * sizes.amax(dim=0)
    first = near.to(torch.int8).argmax(dim=0)
    picked = columns.gather(0, first[None])[0]
    return torch.where(picked < 0, -1.0, 1.0).to(columns.dtype)
