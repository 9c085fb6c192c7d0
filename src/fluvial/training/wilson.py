"""Wilson's interval of a share, the one of exact match in runs and in evaluations, and that of a
difference."""

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


def share_difference(ours: float, theirs: float, questions: float) -> tuple[float, float]:
    """Return the ends of the 95 % interval of `ours` less `theirs`, two shares of right answers to
    as many `questions` each (Newcombe 1998, "Interval estimation for the difference between
    independent proportions", method 10).

    The questions may be the same: two runs that are right on the same ones differ by less noise
    than this interval has, so it is the wider one.
    """
    (low, high), (other_low, other_high) = wilson(ours, questions), wilson(theirs, questions)
    difference = ours - theirs
    return (
        difference - math.hypot(ours - low, other_high - theirs),
        difference + math.hypot(high - ours, theirs - other_low),
    )
