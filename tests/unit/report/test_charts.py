"""Texts of a chart have room beside its bars and cells, in a font as wide as DejaVu Sans."""

import re
from importlib.resources import files

import pytest

from fluvial.report.charts import FONT, Bars, Cell, bar_chart, grid_chart

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
