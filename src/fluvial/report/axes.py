"""Axes of losses and scores on the pages: their words, charts over them, and values on hover."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from markupsafe import Markup

from fluvial.formatting import figure, human_bytes, human_seconds, percent
from fluvial.report.charts import Points, Series
from fluvial.report.line_charts import line_chart
from fluvial.report.scales import LEAST_LOSS, LEAST_SCORE


def short_bytes(value: float) -> str:
    """Return a number of bytes with its unit, whole ones without decimals."""
    return re.sub(r"\.0+ ", " ", human_bytes(value))


SCORES = {"exact_match": "exact match", "accuracy": "next-token accuracy"}
"""Scores that are drawn, the most telling first."""
AXIS_WORDS: dict[str, tuple[Callable[[float], str], str]] = {
    "round": (lambda value: f"{value:g}", "round"),
    "up": (short_bytes, "bytes up"),
    "both": (short_bytes, "bytes so far, up and down"),
    "seconds": (lambda value: human_seconds(value) if value else "0", "time of the rounds"),
}
"""Words for a value on an axis, and the axis's name."""
TIMES = ((18000.0, 3600.0, "h"), (300.0, 60.0, "min"), (0.1, 1.0, "s"), (0.0, 0.001, "ms"))
"""Units of an axis of time: seconds from which on one is used, its seconds, and its name."""


def chart_of(series: Sequence[Series], axis: str, measure: str) -> Markup:
    """Draw series of the loss or of a score over an axis of `Run.places`."""
    words, across = AXIS_WORDS[axis]
    if axis == "seconds":
        series, words = _in_unit(series)
    return line_chart(
        series,
        across=across,
        up=SCORES.get(measure, "loss, nats per token"),
        words=words,
        heights="{:.4g}".format if measure == "loss" else _short_percent,
        log=axis in ("up", "both"),
        whole=axis == "round",
        least=LEAST_LOSS if measure == "loss" else LEAST_SCORE,
        most=math.inf if measure == "loss" else 1.0,
    )


def _in_unit(series: Sequence[Series]) -> tuple[list[Series], Callable[[float], str]]:
    """Return series over seconds in a unit of which the axis has several, and the words of its
    ticks, which are round numbers of this unit."""
    places = [x for each in series for x, _ in (*each.line, *each.points) if math.isfinite(x)]
    last = max(places, default=0.0)
    _, size, unit = next(each for each in TIMES if last >= each[0])

    shown = [
        replace(
            each,
            line=[(x / size, y) for x, y in each.line],
            points=[(x / size, y) for x, y in each.points],
            band=[(x / size, low, high) for x, low, high in each.band],
        )
        for each in series
    ]
    return shown, lambda value: f"{value:g} {unit}" if value else "0"


def tips_of(name: str, axis: str, measure: str, line: Points, points: Points) -> list[str]:
    """Return the texts on hover of training losses and of held-out measures."""
    words, _ = AXIS_WORDS[axis]
    show = figure if measure == "loss" else percent
    unit = "round " if axis == "round" else ""
    tips = [f"{name}\n{unit}{words(x)}: training loss {figure(y)}" for x, y in line]
    return tips + [f"{name}\n{unit}{words(x)}: held-out {show(y)}" for x, y in points]


def _short_percent(value: float) -> str:
    return f"{100 * value:.4g} %"
