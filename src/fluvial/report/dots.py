"""A chart of points, in a row for each label and a lane for each series."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from fluvial.report.charts import (
    CHARACTER,
    WIDTH,
    Bars,
    Drawing,
    mark,
)
from fluvial.report.labels import length, wrapped
from fluvial.report.scales import decades, spanned, ticks

LANE = 9.0
"""Height of the lane of a series."""
WIDE = 4.0
"""Ratio of the largest to the smallest value from which the axis is logarithmic."""


def dot_chart(
    labels: Sequence[str], series: Sequence[Bars], *, across: str, least: float = 0.0
) -> Markup:
    """Return a point for each label and series; `across` names the axis of the values, whose least
    span is `least`.

    Unlike a bar, a point needs no zero, so that small values are told apart beside large ones: the
    axis is logarithmic where values are positive and differ `WIDE` times or more.
    """
    known = [value for bars in series for value in bars.values if value is not None]
    if not known:
        return Markup("")

    low, high = min(known), max(known)
    log = low > 0 and high >= WIDE * low
    first, last = low / 1.08, high * 1.08
    if not log:
        low, high = spanned(known, least)
        margin = (high - low) * 0.05
        first, last = low - margin, high + margin
    names = wrapped(labels)
    left = 16 + max(length(line) for lines in names for line in lines)
    inner = WIDTH - left - 14
    step = LANE * max(len(series), 2) + 8
    bottom = 6 + step * len(labels)

    def at_x(value: float) -> float:
        if log:
            return left + inner * math.log(value / first) / math.log(last / first)
        return left + inner * (value - first) / (last - first)

    drawing = Drawing()
    free = 0.0
    for column in decades(first, last) if log else ticks(first, last):
        words = f"{column:g}"
        half = CHARACTER * len(words) / 2
        x = min(max(at_x(column), half), WIDTH - half)
        drawing.line(at_x(column), 4, at_x(column), bottom + 4, "grid")
        if x - half >= free:
            drawing.text(x, bottom + 17, words, anchor="middle")
            free = x + half + 8
    note = ", logarithmic" if log else ""
    drawing.text(WIDTH / 2, bottom + 34, across + note, anchor="middle")

    for row, label in enumerate(labels):
        top = 6 + row * step
        drawing.lines(left - 10, top + step / 2, names[row], label)
        if row:
            drawing.line(4, top, WIDTH - 4, top, "grid")
        for number, bars in enumerate(series):
            value = bars.values[row]
            if value is None:
                continue
            x, y = at_x(value), top + 4 + LANE * (number + 0.5)
            drawing.marks.append(mark(bars.colour, x, y))
            tip = f"{label}\n{bars.name}: {(bars.tips or bars.words)[row]}"
            drawing.tip(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>', x, y, tip, WIDTH)

    return drawing.svg(WIDTH, bottom + 42, across)
