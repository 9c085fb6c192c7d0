"""Charts as inline SVG: bars and grids of cells, with their values shown on hover or tap.

Text, marks and colours follow the page's style sheet, by classes and variables of CSS, so a chart
is right in light and dark. A chart is drawn in a millisecond, because a page that follows a run is
drawn in every round; matplotlib needs about a second for a page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Literal

from markupsafe import Markup, escape

from fluvial.report.labels import COLUMN, ROW, distinct, length, wrapped

WIDTH = 340.0
"""Width of a chart in the units of its view box; on a phone a unit is nine tenths of a pixel."""
CHARACTER = 6.4
"""Mean width of a character in these units."""
COLOURS = ("own", "fedavg", "local", "central", "base", "sixth")
"""Variables of the page for the colours of series, after Okabe and Ito."""
DASHES = {"own": "", "fedavg": "7 3", "local": "2 3", "central": "8 3 2 3", "base": "1 4"}
"""Dashes of the lines of a colour, which tell series apart without it."""
MARKS = {
    "own": "M-3.6,0a3.6,3.6 0 1,0 7.2,0a3.6,3.6 0 1,0 -7.2,0",
    "fedavg": "M-3.3,-3.3h6.6v6.6h-6.6z",
    "local": "M0,-4.2L4,3.2H-4z",
    "central": "M0,-4.6L4.6,0L0,4.6L-4.6,0z",
    "base": "M-3.4,-3.4L3.4,3.4M3.4,-3.4L-3.4,3.4",
}
"""Outlines of the points of a colour, around the origin."""
Points = Sequence[tuple[float, float]]
"""Places on an axis, each with a value."""


@dataclass(frozen=True)
class Series:
    """Values of one run or one kind, under the name that the tables have for it."""

    name: str
    colour: str
    line: Sequence[tuple[float, float]] = ()
    """Points that are joined by a line, in order."""
    points: Sequence[tuple[float, float]] = ()
    """Points that are marked, and joined by a thin line where `joined` says so."""
    tips: Sequence[str] = ()
    """Texts on hover, of the points of `line` and then of `points`."""
    band: Sequence[tuple[float, float, float]] = ()
    """Place, lowest and highest value of a shaded band."""
    joined: bool = True
    """False for points between which nothing was measured."""


@dataclass(frozen=True)
class Bars:
    """One bar for each label, None where there is no value."""

    name: str
    colour: str
    values: Sequence[float | None]
    words: Sequence[str]
    """Values as the bars show them."""
    tips: Sequence[str] = ()
    """Values as a hover shows them; empty for those of `words`."""


@dataclass(frozen=True)
class Cell:
    """One cell of a grid."""

    shade: float | None
    """Strength of the colour, from 0 to 1; None leaves the cell empty."""
    text: str
    tip: str
    bad: bool = False
    """True for a cell that is framed as a failure."""


@dataclass
class Drawing:
    """Elements of a chart in the order in which they are drawn; the values on hover come last."""

    marks: list[str] = field(default_factory=list)
    tips: list[str] = field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        anchor: str = "start",
        kind: str = "",
        turn: int = 0,
        whole: str = "",
    ) -> None:
        """Add a text at a place, which is its beginning or what `anchor` says, turned by `turn`
        degrees; a hover shows `whole` where the text is only a part of it."""
        shown = f' class="{kind}"' if kind else ""
        shown += f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
        title = f"<title>{escape(whole)}</title>" if whole not in ("", words) else ""
        self.marks.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{shown}>{title}{escape(words)}'
            "</text>"
        )

    def lines(self, x: float, y: float, lines: Sequence[str], whole: str) -> None:
        """Add lines of the label `whole` that end at `x`, around the height `y`."""
        cut = "".join(lines).replace(" ", "") != whole.replace(" ", "")
        for number, words in enumerate(lines):
            above = 12 * (number - (len(lines) - 1) / 2)
            self.text(x, y + above, words, anchor="end", whole=whole if cut else "")

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """Add a straight line of a class of the style sheet."""
        self.marks.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'
        )

    def path(self, d: str, style: str, kind: str = "") -> None:
        """Add a path of SVG."""
        shown = f' class="{kind}"' if kind else ""
        self.marks.append(f'<path d="{d}"{shown} style="{style}"/>')

    def tip(self, shape: str, x: float, y: float, words: str, width: float) -> None:
        """Add an area that shows `words` on hover, within the chart's `width`."""
        most = int((width - 4) / CHARACTER)
        lines = [part for line in words.split("\n") for part in wrap(line, most) or [""]]
        half = max(map(len, lines)) * CHARACTER / 2
        x = min(max(x, half + 2), width - half - 2)
        top = y - 8 - 13 * (len(lines) - 1)
        if top < 12:
            top = y + 20
        spans = "".join(
            f'<tspan x="{x:.1f}" y="{top + 13 * number:.1f}">{escape(line)}</tspan>'
            for number, line in enumerate(lines)
        )
        self.tips.append(f'<g class="v">{shape}<text class="tip">{spans}</text></g>')

    def svg(self, width: float, height: float, label: str) -> Markup:
        """Return the chart, which `label` describes."""
        inner = "".join(self.marks + self.tips)
        least = f"min-width:{0.75 * width:.0f}px;" if width > WIDTH else ""
        limits = f'style="{least}max-width:{1.25 * width:.0f}px"'
        return Markup(  # all texts are escaped where they are put in
            f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" {limits} '
            f'aria-label="{escape(label)}">{inner}</svg>'
        )


def bar_chart(labels: Sequence[str], series: Sequence[Bars], *, name: str) -> Markup:
    """Return horizontal bars from zero, those of one label together; `name` describes the chart."""
    known = [value for bars in series for value in bars.values if value is not None]
    if not known:
        return Markup("")

    low, high = min(0.0, *known), max(0.0, *known)
    high = high if high > low else low + 1.0
    names = wrapped(labels)
    left = 10 + max(length(line) for lines in names for line in lines)
    room = 8 + max((length(words) for bars in series for words in bars.words), default=0)
    before = room if low < 0 else 0.0
    inner = WIDTH - left - room - before - 4
    thick = 13.0 if len(series) > 1 else 16.0
    step = thick * len(series) + 9

    def at_x(value: float) -> float:
        return left + before + inner * (value - low) / (high - low)

    drawing = Drawing()
    height = 6 + step * len(labels)
    for row, label in enumerate(labels):
        top = 6 + row * step
        drawing.lines(left - 7, top + step / 2, names[row], label)
        for number, bars in enumerate(series):
            value = bars.values[row]
            y = top + number * thick
            if value is None:
                drawing.text(at_x(0) + 4, y + thick - 3.5, bars.words[row], kind="soft")
                continue

            ends = sorted((at_x(0), at_x(value)))
            long = max(1.0, ends[1] - ends[0])
            box = f'x="{ends[0]:.1f}" y="{y:.1f}" width="{long:.1f}" height="{thick - 2:.1f}"'
            drawing.marks.append(f'<rect {box} style="fill:var(--{bars.colour})"/>')
            beside = (ends[0] - 4, "end") if value < 0 else (ends[1] + 4, "start")
            drawing.text(beside[0], y + thick - 3.5, bars.words[row], anchor=beside[1])
            tip = f"{label}\n{bars.name}: {(bars.tips or bars.words)[row]}"
            drawing.tip(f"<rect {box}/>", (ends[0] + ends[1]) / 2, y, tip, WIDTH)
    drawing.line(at_x(0), 2, at_x(0), height - 4, "axis")

    return drawing.svg(WIDTH, height, name)


def grid_chart(
    rows: Mapping[str, Sequence[Cell]], columns: Sequence[str], *, name: str, cell: float = 0.0
) -> Markup:
    """Return a grid of cells with a row for each label; `columns` may be empty texts.

    A column has at least the width `cell`, or what its longest text needs.
    """
    texts = [each.text for cells in rows.values() for each in cells]
    names = dict(zip(rows, distinct(list(rows), ROW), strict=True))
    headings = distinct(columns, COLUMN)
    left = 10 + max(map(length, names.values()))
    need = max(cell, 8 + CHARACTER * max(map(len, texts), default=0))
    wide = max(need, min(64.0, (WIDTH - left - 6) / max(1, len(columns))))
    longest = max(map(length, headings), default=0.0)
    slanted = longest > wide - 4
    top = 14 + (0.72 * longest if slanted else 4.0)
    tall = 24.0 if any(texts) else 16.0
    beside = max(6.0, 0.72 * longest + 8 - wide / 2) if slanted else 6.0
    width = max(left + wide * len(columns) + beside, 200.0)

    drawing = Drawing()
    for number, label in enumerate(columns):
        drawing.text(
            left + wide * (number + 0.5),
            top - 5,
            headings[number],
            anchor="start" if slanted else "middle",
            turn=-45 if slanted else 0,
            whole=label,
        )

    for row, (label, cells) in enumerate(rows.items()):
        y = top + row * tall
        drawing.text(left - 7, y + tall / 2 + 4, names[label], anchor="end", whole=label)
        for number, each in enumerate(cells):
            x = left + number * wide
            box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}" height="{tall - 2:.1f}"'
            kind = ' class="bad"' if each.bad else ""
            if each.shade is not None:
                drawing.marks.append(
                    f'<rect {box}{kind} style="fill:var(--own);fill-opacity:{each.shade:.2f}"/>'
                )
            strong = "strong" if each.shade is not None and each.shade > 0.55 else ""
            drawing.text(x + wide / 2, y + tall / 2 + 4, each.text, anchor="middle", kind=strong)
            drawing.tip(f"<rect {box}/>", x + wide / 2, y, each.tip, width)

    return drawing.svg(width, top + tall * len(rows) + 6, name)


def legend(
    entries: Sequence[tuple[str, str]], *, kind: Literal["lines", "points", "bars"] = "lines"
) -> Markup:
    """Return the legend of series, given by name and colour: line and point, point, or a bar's
    box."""
    items = []
    for name, colour in entries:
        dash = DASHES.get(colour) or "none"
        line = f"stroke:var(--{colour});stroke-width:1.8;stroke-dasharray:{dash}"
        swatch = {
            "bars": f'<rect x="2" y="2" width="20" height="10" style="fill:var(--{colour})"/>',
            "points": mark(colour, 12, 7),
            "lines": f'<path d="M0,7H24" style="{line}"/>' + mark(colour, 12, 7),
        }[kind]
        items.append(f'<span><svg viewBox="0 0 24 14">{swatch}</svg>{escape(name)}</span>')

    return Markup(f'<p class="legend">{"".join(items)}</p>')


def mark(colour: str, x: float, y: float) -> str:
    """Return the point of a colour at a place."""
    d = MARKS.get(colour, MARKS["own"])
    return (
        f'<path d="{d}" transform="translate({x:.1f} {y:.1f})" '
        f'style="fill:var(--{colour});stroke:var(--{colour})"/>'
    )
