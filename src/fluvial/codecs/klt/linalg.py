"""Linear algebra of `klt`: leading eigenvectors, and orthonormal bases from 8-bit columns."""

import torch
from torch import Tensor

_NOISE = 1e-10  # of the largest eigenvalue
NOISE_FP32 = 1e-6  # the same where sums were sent in fp32


def leading(gram: Tensor, count: int) -> Tensor:
    """Return the eigenvectors (n, count) of the largest eigenvalues; the largest component of each
    is positive.

    Where there is nothing but rounding noise the direction is 0, because which one LAPACK picks is
    no function of the updates; `orthonormal` completes such columns.
    """
    values, vectors = torch.linalg.eigh(gram)
    return leading_of(values, vectors, count, _NOISE)


def leading_of(values: Tensor, vectors: Tensor, count: int, noise: float) -> Tensor:
    """Return them from all eigenvalues, rising, and their eigenvectors; `noise` as a share of the
    largest."""
    values = values.flip(-1)[..., :count]
    vectors = vectors.flip(-1)[..., :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    signed: Tensor = vectors * largest.sign() * (values > noise * values[0])

    return signed


def to_int8(columns: Tensor) -> Tensor:
    """Quantise every column to 8 bits of its largest magnitude."""
    codes: Tensor = torch.round(127 * columns / columns.abs().amax(0).clamp_min(1e-30)).to(
        torch.int8
    )
    return codes


def orthonormal(columns: Tensor) -> Tensor:
    """Return the orthonormal columns with the same leading spans, fp32."""
    q, r = torch.linalg.qr(columns.double())
    signed: Tensor = (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).float()
    return signed
