"""Lines and points over a common axis, as inline SVG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from fluvial.report.charts import CHARACTER, DASHES, WIDTH, Drawing, Points, Series, mark
from fluvial.report.scales import decades, spanned, ticks

RIGHT = 12.0
"""Room to the right of the last place."""
TOP, BOTTOM = 22.0, 214.0
"""Heights of the largest and of the least value."""


@dataclass(frozen=True)
class _Plane:
    """The area of the lines: the ranges of both axes, and where their values lie in the drawing."""

    first: float
    last: float
    low: float
    high: float
    left: float
    log: bool

    @property
    def inner(self) -> float:
        """Return the width between the first and the last place."""
        return WIDTH - self.left - RIGHT

    def x(self, place: float) -> float:
        """Return where a place on the lower axis is drawn."""
        if self.log:
            share = math.log(place / self.first) / math.log(self.last / self.first)
            return self.left + self.inner * share
        return self.left + self.inner * (place - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        """Return the height at which a value is drawn."""
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)

    def outline(self, points: Points) -> str:
        """Return a path of SVG through points."""
        return "M" + "L".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def line_chart(
    series: Sequence[Series],
    *,
    across: str,
    up: str,
    words: Callable[[float], str] = "{:g}".format,
    heights: Callable[[float], str] = "{:g}".format,
    log: bool = False,
    whole: bool = False,
    least: float = 0.0,
    most: float = math.inf,
) -> Markup:
    """Return lines and points over a common axis, which is logarithmic where `log` says so, and has
    ticks at whole numbers only where `whole` does.

    `across` and `up` name the axes, `words` and `heights` write their ticks. `least` and `most` are
    the least span of the values' axis and the largest possible value, see `spanned`.
    """
    shown = [_drawable(each, log) for each in series]
    places = [point for each in shown for point in (*each.line, *each.points)]
    places += [(x, y) for each in shown for x, low, high in each.band for y in (low, high)]
    if not places:
        return Markup("")

    low, high = spanned([y for _, y in places], least, most)
    margin = (high - low) * 0.06
    low, high = low - margin, high + margin
    first, last = min(x for x, _ in places), max(x for x, _ in places)
    if first == last:
        first, last = (first / 2, last * 2) if log else (first - 1, last + 1)
    rows = ticks(low, high)
    left = 14 + CHARACTER * max(len(heights(row)) for row in rows)
    plane = _Plane(first, last, low, high, left, log)

    drawing = Drawing()
    drawing.text(4, 12, up)
    for row in rows:
        drawing.line(left, plane.y(row), WIDTH - RIGHT, plane.y(row), "grid")
        drawing.text(left - 5, plane.y(row) + 4, heights(row), anchor="end")
    columns = decades(first, last) if log else ticks(first, last)
    _draw_columns(
        drawing, plane, [each for each in columns if not whole or each == round(each)], words
    )
    drawing.text(left + plane.inner / 2, BOTTOM + 34, across, anchor="middle")

    for each in shown:
        _draw_band(drawing, plane, each)
    for each in shown:
        _draw_series(drawing, plane, each)
    return drawing.svg(WIDTH, BOTTOM + 42, f"{up}, by {across}")


def _drawable(series: Series, log: bool) -> Series:
    """Return a series without what has no place on the axes."""

    def fits(x: float, y: float) -> bool:
        return math.isfinite(x) and math.isfinite(y) and not (log and x <= 0)

    points = zip(series.tips, [*series.line, *series.points], strict=True)
    return replace(
        series,
        line=[point for point in series.line if fits(*point)],
        points=[point for point in series.points if fits(*point)],
        tips=[tip for tip, point in points if fits(*point)],
        band=[(x, low, high) for x, low, high in series.band if fits(x, low) and fits(x, high)],
    )


def _draw_columns(
    drawing: Drawing, plane: _Plane, columns: Sequence[float], words: Callable[[float], str]
) -> None:
    """Draw the ticks of the lower axis, and the words of those that have room."""
    free = 0.0
    for column in columns:
        half = CHARACTER * len(words(column)) / 2
        x = min(max(plane.x(column), half), WIDTH - half)
        drawing.line(plane.x(column), BOTTOM, plane.x(column), BOTTOM + 4, "grid")
        if x - half >= free:
            drawing.text(x, BOTTOM + 17, words(column), anchor="middle")
            free = x + half + 8


def _draw_band(drawing: Drawing, plane: _Plane, series: Series) -> None:
    """Draw the shaded area between the lowest and the highest values."""
    edge = [(x, low) for x, low, _ in series.band]
    edge += [(x, high) for x, _, high in reversed(series.band)]
    if edge:
        drawing.path(plane.outline(edge) + "Z", f"fill:var(--{series.colour});fill-opacity:.14")


def _draw_series(drawing: Drawing, plane: _Plane, series: Series) -> None:
    """Draw the lines, the marks and the areas that show a value on hover."""
    dashes = DASHES.get(series.colour) or "none"
    stroke = f"stroke:var(--{series.colour});stroke-dasharray:{dashes}"
    for line, wide in ((series.line, 1.8), (series.points if series.joined else (), 1.0)):
        if len(line) > 1:
            drawing.path(plane.outline(line), f"{stroke};stroke-width:{wide};fill:none")
    marked = [*series.line] if len(series.line) == 1 else []
    for x, y in (*marked, *series.points):
        drawing.marks.append(mark(series.colour, plane.x(x), plane.y(y)))
    for (x, y), tip in zip((*series.line, *series.points), series.tips, strict=True):
        shape = f'<circle cx="{plane.x(x):.1f}" cy="{plane.y(y):.1f}" r="7"/>'
        drawing.tip(shape, plane.x(x), plane.y(y), tip, WIDTH)
