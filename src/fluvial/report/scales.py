"""Scales of charts: the span of an axis, and the round values on it."""

import math
from collections.abc import Sequence

LEAST_LOSS = 0.05
"""Least span of an axis of losses, in nats per token."""
LEAST_SCORE = 0.05
"""Least span of an axis of scores, which are shares from 0 to 1."""
LEAST_SHARE = 0.02
"""Least span of any axis, as a share of the largest value."""


def spanned(
    values: Sequence[float], least: float = 0.0, most: float = math.inf
) -> tuple[float, float]:
    """Return the two ends of an axis for the values, at least `least` and `LEAST_SHARE` apart.

    Values that hardly differ lie near its middle, so that they look like it. The axis of positive
    values does not go below zero for that, and none beyond `most`.
    """
    low, high = min(values), max(values)
    span = max(high - low, least, LEAST_SHARE * max(abs(low), abs(high))) or 1.0
    first = (low + high - span) / 2
    first = min(first, most - span)
    first = max(first, 0.0) if low >= 0 else first
    return first, first + span


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round values from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Return powers of ten from `low` to `high`, with values between them where few fit."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [each for each in found if low <= each <= high]
        if len(found) > 2:
            break
    return found
