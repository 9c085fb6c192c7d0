"""Figures of a run: intervals, rounds and bytes until a loss."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

from benchmarks.report import Row

# -- figures -------------------------------------------------------------------------------------


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean, by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def first_round(losses: Sequence[float], target: float) -> int | None:
    """Return the first round, from 1, whose loss is at most `target`."""
    return next((number for number, loss in enumerate(losses, start=1) if loss <= target), None)


def bytes_until(run: Row, round: int) -> dict[str, float]:
    """Bytes of one site, on average, up to and with `round`: `up`, `down`, `setup`, and `all` of
    them."""
    sites = run["sites"]
    parts = {way: sum(run[way][:round]) / sites for way in ("up", "down")}
    parts["setup"] = sum(run["setup"][: round + 1]) / sites

    return {**parts, "all": sum(parts.values())}


def average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means, key by key."""
    return {key: mean(row[key] for row in rows) for key in rows[0]}
