"""FedCyBGD sends what its formulas say."""

from typing import Any

import pytest

from fluvial.methods.fedcybgd.visit_sizes import Cache, Full, LowBit, Proxy, Sizes, visit_bytes
from tests.support.fedcybgd import FORMS, LAYERS, VALUES, Stage, sent


@pytest.mark.parametrize(
    ("codec", "least", "most"),
    [
        ({"name": "identity"}, 4 * VALUES, 4 * VALUES),
        (
            {"name": "int8"},
            VALUES + VALUES // 32,
            VALUES + VALUES // 32 + 4,
        ),  # a scale for 64; norms have but 32
        ({"name": "hadamard", "rate": 32}, 4 * VALUES / 32 * 0.9 - 12, 4 * VALUES / 32 - 12),
    ],
    ids=lambda each: each["name"] if isinstance(each, dict) else "",
)
def test_a_visit_sends_its_block_and_an_envelope(
    codec: dict[str, Any], least: float, most: float, stage: Stage
) -> None:
    played = stage.play(stage.table(4, codec=codec))
    assert {block.numel for block in played.parts.blocks} == {VALUES}
    for record in played.rounds:
        for visit, up in zip(
            record["visits"], sent(played, "up", record["round"] - 1), strict=True
        ):
            assert least + 12 <= visit["bytes"] <= most + 12
            assert visit["bytes"] < up < visit["bytes"] + 100, "visit, loss and sample count"


def test_downloads_are_what_the_formulas_say(stage: Stage) -> None:
    """In the second cycle, by when all blocks have moved once; a tensor adds a header, a commit a
    line of JSON."""
    for form, formula, tensors in (
        ("full", Full(), 9 * LAYERS + 2),
        ("proxy", Proxy(0.6), 9 * LAYERS + 2),
        ("low-bit", LowBit(4.25, LAYERS - 1), 9 * LAYERS),
        ("cache", Cache(LAYERS, LAYERS, coded=VALUES + VALUES // 32 + 16), 0),
    ):
        played = stage.play(stage.table(4, FORMS[form], codec={"name": "int8"}))
        expected = visit_bytes(Sizes.of(played.parts, 0), formula, width=4).down
        for down in sent(played, "down"):
            assert 0.99 * expected < down < 1.01 * expected + 120 * tensors + 300, form
