"""The cohort of a round: which sites take part."""

from collections.abc import Sequence

import numpy as np


def sample(sites: Sequence[str], fraction: float, *, seed: int, round: int) -> list[str]:
    """Return the cohort of a round, counted from 1: max(int(fraction * N), 1) sites without
    replacement.

    `numpy.random.RandomState(seed + round - 1)`; with seed 0 these are Shepherd's, which counts
    from 0.
    """
    count = cohort_size(fraction, len(sites))
    chosen = np.random.RandomState((seed + round - 1) % 2**32).choice(
        len(sites), count, replace=False
    )

    return [sites[index] for index in sorted(chosen)]


def cohort_size(fraction: float, sites: int) -> int:
    """Return the number of sites in a round, of all `sites`."""
    return max(int(fraction * sites), 1)
