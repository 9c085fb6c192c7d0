"""Ratios of bytes are shown where they say something: an uncompressed run has none."""

from collections.abc import Callable
from typing import Any

import pytest

from fluvial.report import result_tables
from fluvial.report.headline import tiles
from tests.unit.report.test_show import RAW, result, text_of

RATIOS = ["round ratio", "amortised"]


def shown(run: dict[str, Any]) -> tuple[list[str], list[str], str]:
    """Return the ratios of the table, the tiles of bytes, and the caption."""
    headings = result_tables.result_rows(run)[0]
    whole = {"result": run, "compare": {}}
    named = [tile["what"] for tile in tiles(whole, "accuracy") if "held-out" not in tile["what"]]
    words = " ".join(text_of(result_tables.result_table(run, {})).split())
    return [each for each in headings if each in RATIOS], named, words


@pytest.mark.parametrize("codec", ["identity", None])
def test_an_uncompressed_run_has_its_bytes_and_no_ratio(codec: str | None) -> None:
    sent = round(1.001 * RAW)
    run = result("fedavg", "identity", 3.2, sent, sent) | {"codec": codec}
    ratios, named, words = shown(run)
    assert ratios == []
    assert "up per site" in named
    assert not any("uncompressed" in name for name in named)
    assert "atio" not in words.partition("Held-out values")[2]
    assert "Amortised" not in words
    assert run["round_ratio"] > 1


@pytest.mark.parametrize(
    ("changed", "ratios"),
    [
        (lambda: result("fedavg", "int8", 3.2, RAW, RAW), RATIOS),
        (lambda: result("fedavg", "identity", 3.2, RAW, RAW // 8), RATIOS[1:]),
        (lambda: result("fedsa", "identity", 3.2, RAW // 2, RAW // 2), RATIOS),
    ],
    ids=["a codec that saves nothing", "a downlink", "a method that sends half"],
)
def test_what_a_run_saves_or_should_save_is_shown(
    changed: Callable[[], dict[str, Any]], ratios: list[str]
) -> None:
    found, named, words = shown(changed())
    assert found == ratios
    assert ("updates, of uncompressed" in named) == (RATIOS[0] in ratios)
    assert "amortised, of uncompressed" in named
    assert "Amortised: all bytes" in words
