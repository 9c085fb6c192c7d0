"""Curves of a comparison: one for each contender, as a mean over its seeds."""

from collections.abc import Sequence
from statistics import fmean

from markupsafe import Markup

from fluvial.report.axes import chart_of, tips_of
from fluvial.report.charts import Points, Series
from fluvial.report.figures import Run, series_of


def curves(contenders: Sequence[Sequence[Run]], axis: str, measure: str) -> Markup:
    """Draw a measure of contenders, each given by its runs of several seeds, over an axis of
    `Run.places`."""
    drawn = [
        runs
        for runs in contenders
        if runs and (axis in ("round", "seconds") or runs[0].sends_updates)
    ]
    return chart_of([mean_series(runs, axis, measure) for runs in drawn], axis, measure)


def mean_series(runs: Sequence[Run], axis: str, measure: str) -> Series:
    """Return the mean of the series of some runs, with a band from the lowest to the highest."""
    each = [series_of(run, axis, measure) for run in runs]
    line, line_band = _mean([one.line for one in each])
    points, points_band = _mean([one.points for one in each])
    first = runs[0]
    tips = tips_of(first.name, axis, measure, line, points)
    band = line_band or points_band
    shown = band if len(runs) > 1 else ()
    return Series(first.name, first.colour, line, points, tips, shown, joined=each[0].joined)


def _mean(
    curves: Sequence[Points],
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """Return the mean of curves point by point, and their lowest and highest values; nothing where
    a run lacks a point that another has."""
    if len({len(curve) for curve in curves}) != 1:
        return [], []

    mean = []
    band = []
    for points in zip(*curves, strict=True):
        places, values = zip(*points, strict=True)
        place = fmean(places)
        mean.append((place, fmean(values)))
        band.append((place, min(values), max(values)))
    return mean, band
