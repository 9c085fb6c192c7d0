"""Texts of a chart have room beside its bars and cells, in a font as wide as DejaVu Sans."""

import re
from importlib.resources import files
from math import inf
from typing import Any

import pytest

from fluvial.data import POOLED
from fluvial.report import figures
from fluvial.report.axes import short_bytes
from fluvial.report.charts import CHARACTER, WIDTH, Bars, Cell, bar_chart, grid_chart
from fluvial.report.cross_site import Matrix
from fluvial.report.dots import dot_chart
from fluvial.report.figures import Run, by_axis, heat_map, losses_by_site
from fluvial.report.labels import FONT, LINE, distinct, wrapped
from fluvial.report.scales import decades, spanned

ADVANCES = {"a": 0.613, "g": 0.635, "m": 0.974, "W": 0.989, "i": 0.278, "1": 0.636, "_": 0.5}
"""Widths of DejaVu Sans, in sizes of the font."""


@pytest.mark.parametrize("label", ["gamma", "mmmm", "W_1", "mi", "WWWWWWWWWWWWWWWW"])
def test_a_label_begins_inside_the_chart(label: str) -> None:
    bars = bar_chart([label], [Bars("run", "own", [0.5], ["0.5"])], name="Gain")
    grid = grid_chart({label: [Cell(0.5, "1", "one")]}, [""], name="Grid")
    needed = FONT * sum(map(ADVANCES.__getitem__, label))

    for chart in (bars, grid):
        end = re.search(rf'<text x="([\d.]+)" [^>]*text-anchor="end">{label}</text>', chart)
        assert end is not None
        assert float(end[1]) >= needed


def test_a_long_label_is_whole_on_two_lines_or_on_hover() -> None:
    """Site names such as those of hospitals, in bars and points; a grid becomes wider."""
    label = "university-hospital-of-lisbon"
    bars = [Bars("run", "own", [0.5], ["0.5"])]
    for chart in (bar_chart([label], bars, name="Gain"), dot_chart([label], bars, across="loss")):
        lines = re.findall(r'text-anchor="end">([^<]*)</text>', chart)
        assert lines == ["university-", "hospital-of-lisbon"]
    grid = grid_chart({label: [Cell(0.5, "1", "one")]}, [label], name="Grid")
    assert grid.count(f">{label}</text>") == 1

    longer = label + "-children-and-youth"
    chart = bar_chart([longer], bars, name="Gain")
    assert f">{longer}</tspan>" in chart
    assert "hospital-of-lisbo" in chart
    assert f"<title>{longer}</title>" in chart
    assert "…</text>" in chart


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["ward-1-of-the-hospital", "ward-2-of-the-hospital"], ["ward-1-of…", "ward-2-of…"]),
        (["hospital-ward-1", "hospital-ward-2", "x"], ["hospi…rd-1", "hospi…rd-2", "x"]),
        (
            ["hospital-of-1-of-the-north", "hospital-of-2-of-the-north"],
            ["hospital… 1", "hospital… 2"],
        ),
    ],
)
def test_cut_names_of_different_sites_differ(names: list[str], shown: list[str]) -> None:
    assert distinct(names, max(map(len, shown))) == shown


def test_cut_names_of_a_chart_differ() -> None:
    names = [f"university-hospital-of-northern-lisbon-ward-{number}" for number in range(12)]
    assert len({tuple(lines) for lines in wrapped(names)}) == 12
    assert all(len(line) <= LINE for lines in wrapped(names) for line in lines)
    cells = [Cell(0.5, "1", "one")]
    grid = grid_chart(dict.fromkeys(names, cells), names[:1], name="Grid")
    assert len(set(re.findall(r'text-anchor="end"><title>[^<]*</title>([^<]*)<', grid))) == 12


def test_a_hover_is_whole_where_a_name_is_wider_than_the_chart() -> None:
    bars = [Bars("run", "own", [0.5], ["0.5"])]
    chart = bar_chart(["site " * 30], bars, name="Gain")
    lines = re.findall("<tspan[^>]*>([^<]*)</tspan>", chart)
    assert " ".join(lines) == "site " * 30 + "run: 0.5"
    assert max(map(len, lines)) * CHARACTER <= WIDTH


def test_points_tell_small_values_apart_beside_large_ones() -> None:
    """A base of 9.4 nats, and runs at 0.36, 0.19 and 0.18: a tenth of the width apart at least."""
    values = {"base": 9.4, "local": 0.36, "fedavg": 0.19}
    series = [Bars(name, name, [value], [str(value)]) for name, value in values.items()]
    chart = dot_chart(["north"], series, across="held-out loss")
    places = [
        float(x) for x in re.findall(r'<path d="[^"]*" transform="translate\(([\d.]+)', chart)
    ]
    assert places == sorted(places, reverse=True)
    assert places[1] - places[2] > 25
    assert ", logarithmic</text>" in chart
    level = dot_chart(["north"], [Bars("a", "own", [2.0], ["2"])], across="loss")
    assert "logarithmic" not in level


@pytest.mark.parametrize(
    ("values", "least", "most", "ends"),
    [
        ([3.00, 3.01], 0.05, inf, (2.97490, 3.03510)),  # 2 % of 3.01
        ([0.50, 0.51], 0.05, inf, (0.48, 0.53)),
        ([0.01, 0.02], 0.05, inf, (0.0, 0.05)),
        ([0.99, 1.00], 0.05, 1.0, (0.95, 1.0)),
        ([1.0, 3.0], 0.05, inf, (1.0, 3.0)),
        ([-1.0, -1.0], 0.0, inf, (-1.01, -0.99)),
        ([0.0], 0.0, inf, (0.0, 1.0)),
    ],
)
def test_an_axis_has_a_least_span(
    values: list[float], least: float, most: float, ends: tuple[float, float]
) -> None:
    assert spanned(values, least, most) == pytest.approx(ends)


def heights(chart: str) -> list[float]:
    """Return the heights of the marks of a chart, whose values have 192 units of height."""
    marks = re.findall(r'<path d="[^"]*" transform="translate\([\d.]+ ([\d.]+)', chart)
    return [float(height) for height in marks]


@pytest.mark.parametrize(
    ("measure", "values", "most"),
    [("loss", (3.01, 3.0), 40), ("loss", (3.5, 3.0), 192), ("exact_match", (0.5, 0.51), 40)],
)
def test_a_small_gap_looks_small(measure: str, values: tuple[float, float], most: float) -> None:
    """A hundredth of a nat, or of a share, is no gulf in lines, points and cells; half a nat is."""
    metrics = [
        {"round": number, "loss": None, f"heldout_{measure}": value}
        for number, value in enumerate(values, start=1)
    ]
    first, second = heights(by_axis([Run("run", "own", metrics, None, True)], "round", measure))
    assert most * 0.7 < abs(first - second) < most

    if measure == "loss":
        row = {"a": dict(zip(("base", "final"), ({"loss": v} for v in values), strict=True))}
        chart = losses_by_site(Run("run", "own", [], {"heldout_by_site": row}, True), [])
        x = [float(at) for at in re.findall(r'transform="translate\(([\d.]+)', chart)]
        assert abs(x[0] - x[1]) / WIDTH < most / 192 * 0.9

    matrix = Matrix(measure, ["one"], ["a", "b"], [list(values)], "")
    shades = [float(shade) for shade in re.findall(r"fill-opacity:([\d.]+)", heat_map(matrix))]
    assert abs(shades[0] - shades[1]) <= most / 192


@pytest.mark.parametrize(("low", "high"), [(1.1, 5.0), (2.1, 9.0), (3.0, 70.0), (0.6, 31.0)])
def test_a_logarithmic_axis_has_three_ticks_or_more(low: float, high: float) -> None:
    assert 3 <= len(decades(low, high)) <= 8


@pytest.mark.parametrize("measured", [False, True])
def test_measures_at_the_two_ends_alone_are_not_joined(measured: bool) -> None:
    """A line between them would say something of the rounds where nothing was measured."""
    first = {"heldout_loss": 2.0} if measured else {}
    metrics: list[dict[str, Any]] = [
        {"round": 1, "loss": None, **first},
        {"round": 2, "loss": None},
    ]
    result = {"heldout": {"base": {"loss": 3.0}, "final": {"loss": 1.0}}}
    chart = by_axis([Run("run", "own", metrics, result, True)], "round", "loss")
    assert ("stroke-width:1.0" in chart) == measured


@pytest.mark.parametrize("measured", [False, True])
def test_a_score_at_the_two_ends_alone_has_no_chart(measured: bool) -> None:
    metrics = [{"round": 1, "loss": 2.0, **({"heldout_exact_match": 0.4} if measured else {})}]
    result = {"heldout": {"base": {"exact_match": 0.0}, "final": {"exact_match": 0.5}}}
    chart = by_axis([Run("run", "own", metrics, result, True)], "round", "exact_match")
    assert bool(chart) == measured


def test_pooled_records_stand_below_the_sites_and_are_no_site() -> None:
    assert POOLED == figures.POOLED
    sites = {name: {"base": {"loss": 3.0}, "final": {"loss": 1.0}} for name in ("a", "zebra")}
    pooled = {POOLED: {"base": {"loss": 3.0}, "final": {"loss": 2.0}}}
    own = Run("run", "own", [], {"heldout_by_site": sites}, True)
    central = Run("central", "central", [], {"heldout_by_site": pooled}, False)
    chart = losses_by_site(own, [central])
    assert chart.index(">zebra<") < chart.index(">all sites, pooled<")
    assert ">pooled<" not in chart


def test_a_slanted_heading_ends_inside_the_grid() -> None:
    label = "mmmmmmmmmmmm"
    chart = grid_chart({"a": [Cell(0.5, "1", "one")]}, [label], name="Grid")
    start = re.search(rf'<text x="([\d.]+)" y="([\d.]+)"[^>]*rotate[^>]*>{label}<', chart)
    width = re.search(r'viewBox="0 0 (\d+)', chart)
    assert start is not None
    assert width is not None
    reach = FONT * 0.974 * len(label) / 2**0.5
    assert float(start[1]) + reach <= float(width[1])
    assert float(start[2]) - reach >= 0


def test_the_size_of_the_font_is_that_of_the_style_sheet() -> None:
    style = (files("fluvial.report") / "page.css").read_text()
    assert f"svg text {{ font: {FONT}px " in style


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (2e6, "2 MB"), (2.03e6, "2.03 MB"), (2.5e6, "2.50 MB"), (20e3, "20 kB")],
)
def test_a_value_of_an_axis_of_bytes_keeps_its_digits(size: float, words: str) -> None:
    assert short_bytes(size) == words
