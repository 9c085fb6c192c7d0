"""Epsilon of Gaussian noise that is added several times, and the noise for an epsilon.

Both are exact: n releases with noise sigma are one with sigma / sqrt(n) (Dong, Roth, Su, "Gaussian
Differential Privacy", 2022), whose epsilon and delta are in closed form (Balle and Wang, "Improving
the Gaussian Mechanism for Differential Privacy", ICML 2018, theorem 8).
"""

import math
from functools import cache

import numpy as np

MARGIN = 1e-8
"""Relative margin of epsilon above the root that the search finds."""
TOLERANCE = 2e-12
"""Absolute margin, twice the tolerance of the search."""


@cache
def epsilon_of(multiplier: float, releases: int, delta: float) -> float:
    """Return epsilon at `delta` after `releases` with noise of `multiplier` sensitivities.

    It is 0 before the first release, and where delta alone bounds all that is learned.
    """
    if releases == 0:
        return 0.0

    from dp_accounting import get_epsilon_gaussian

    with np.errstate(divide="ignore"):  # the search begins where delta is 0
        found: float = get_epsilon_gaussian(multiplier / math.sqrt(releases), delta)
    return (1 + MARGIN) * float(found) + TOLERANCE if found > 0 else 0.0


@cache
def multiplier_for(epsilon: float, releases: int, delta: float) -> float:
    """Return the least noise, in sensitivities, whose `epsilon_of` is at most `epsilon`."""
    from dp_accounting import get_sigma_gaussian

    with np.errstate(divide="ignore"):
        one = float(get_sigma_gaussian((epsilon - TOLERANCE) / (1 + MARGIN), delta))
    multiplier = math.sqrt(releases) * one
    while epsilon_of(multiplier, releases, delta) > epsilon:  # the root is on either side of it
        multiplier *= 1 + MARGIN

    return multiplier
