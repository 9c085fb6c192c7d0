"""Frequencies and centroids of the quantised latent of `cnn`, by class of loudness."""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

_WIDE = 255
"""Levels of the tables."""
_WIDEST = 24
"""Classes on either side of sigma = step."""
_TOTAL = 1 << 22
THRESHOLD = 0.6
"""Steps below which a latent becomes 0."""


@cache
def tables() -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Return for every class the frequencies of the levels -255 to 255 and the centroids (in steps)
    of the levels 0 to 255.

    Classes are quarter octaves of the standard deviation in steps, -6 to 6 octaves; half Gaussian,
    half Laplacian.
    """
    sigma = torch.exp2(torch.arange(-_WIDEST, _WIDEST + 1, dtype=torch.float64) / 4)[:, None]
    edges = torch.cat(
        [torch.zeros(1), torch.arange(_WIDE) + THRESHOLD, torch.tensor([float("inf")])]
    ).double()
    gauss = edges / (sigma * 2**0.5)
    laplace = edges * 2**0.5 / sigma
    above = 0.5 * torch.erfc(gauss) + 0.5 * torch.exp(-laplace)
    finite = edges.clamp(max=1e9)
    moment = 0.5 * sigma * (2 / torch.pi) ** 0.5 * torch.exp(-(gauss**2))
    moment = moment + 0.5 * (finite + sigma / 2**0.5) * torch.exp(-laplace)
    mass = above[:, :-1] - above[:, 1:]
    first = moment[:, :-1] - moment[:, 1:]
    lower = edges[:-1]
    upper = edges[1:].clamp(max=2 * _WIDE)
    centroids = torch.where(mass > 1e-12, first / mass.clamp_min(1e-12), lower).clamp(lower, upper)
    centroids[:, 0] = 0
    halves = mass[:, 1:] / 2
    both = torch.cat([halves.flip(1), mass[:, :1], halves], dim=1)

    return np.rint(both.numpy() * _TOTAL).astype(np.int32).clip(1), centroids.numpy()
