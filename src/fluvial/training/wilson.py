"""Wilson's interval of a share, the one of exact match in runs and in evaluations."""

import math
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)
"""Quantile of the normal distribution for 95 %."""


def wilson(share: float, questions: float) -> tuple[float, float]:
    """Return the ends of Wilson's 95 % interval of a `share` of right answers (Wilson 1927,
    "Probable inference, the law of succession, and statistical inference").

    `questions` is the number of independent ones, above 0, which need not be whole.
    """
    centre = share + Z * Z / (2 * questions)
    half = Z * math.sqrt(share * (1 - share) / questions + Z * Z / (4 * questions**2))
    low, high = ((end / (1 + Z * Z / questions)) for end in (centre - half, centre + half))
    return max(low, 0.0), min(high, 1.0)
