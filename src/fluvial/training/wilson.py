"""Wilson's interval of a share, the one of exact match in runs and in evaluations, and that of a
difference."""

import math
from collections import Counter
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


def share_difference(
    ours: float, theirs: float, questions: float, phi: float = 0.0
) -> tuple[float, float]:
    """Return the ends of the 95 % interval of `ours` less `theirs`, two shares of right answers to
    as many `questions` each.

    `phi` is their correlation over the same questions, see `correlation` (Newcombe 1998, "Improved
    confidence intervals for the difference between binomial proportions based on paired data",
    method 10). With 0 it is the interval of independent ones, which is too wide where both are
    right on the same questions.
    """
    (low, high), (other_low, other_high) = wilson(ours, questions), wilson(theirs, questions)
    difference = ours - theirs
    return (
        difference - _third_side(ours - low, other_high - theirs, phi),
        difference + _third_side(high - ours, theirs - other_low, phi),
    )


def correlation(ours: str, theirs: str, questions: float) -> float:
    """Return phi of two runs' marks of the same questions, "1" for a right answer and "0" for
    another; 0 where one of them has marks of one kind only.

    A positive one is lessened for continuity, by the number of independent `questions` among them
    (method 10 of the same paper).
    """
    counts = Counter(zip(ours, theirs, strict=True))
    total = len(ours)
    both, first, second, none = (
        counts[pair] / total for pair in (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0"))
    )
    sides = (both + first) * (second + none) * (both + second) * (first + none)
    if sides <= 0:
        return 0.0
    product = both * none - first * second
    if product > 0:
        product = max(product - 1 / (2 * questions), 0.0)
    return product / math.sqrt(sides)


def _third_side(one: float, other: float, phi: float) -> float:
    """Return the side of a triangle against the angle of cosine `phi` between two sides."""
    return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))
