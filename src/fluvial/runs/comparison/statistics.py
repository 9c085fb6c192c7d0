"""Intervals and paired tests of a comparison: Student's t, and Holm's correction."""

import math
from collections.abc import Mapping, Sequence

from scipy.special import stdtr, stdtrit

LEVEL = 0.95
"""Confidence level of every interval."""

ROUNDING = 1e-9
"""Spread of differences, over the largest of them, that is no more than their rounding."""


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the mean of `values` and the ends of its t-interval; these are None for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None, None

    half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * _error(values, mean)
    return mean, mean - half, mean + half


def alike(differences: Sequence[float]) -> bool:
    """Return whether differences are equal up to rounding."""
    largest = max(map(abs, differences), default=0.0)
    return not differences or max(differences) - min(differences) <= ROUNDING * largest


def p_value(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of a paired t-test, whose differences these are.

    It is None for fewer than two differences, and where all are equal up to rounding.
    """
    if len(differences) < 2 or alike(differences):
        return None

    mean = math.fsum(differences) / len(differences)
    t = mean / _error(differences, mean)
    return float(2 * stdtr(len(differences) - 1, -abs(t)))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return p-values of a family of tests, corrected for their number (Holm 1979, "A simple
    sequentially rejective multiple test procedure")."""
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    corrected: dict[str, float | None] = dict.fromkeys(p_values)
    largest = 0.0

    for place, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - place) * p))
        corrected[name] = largest
    return corrected


def _error(values: Sequence[float], mean: float) -> float:
    """Return the standard error of the mean of `values`."""
    squares = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (len(values) - 1) / len(values))
