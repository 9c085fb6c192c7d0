"""Tables, lines and the picture about the plans of sites."""

from typing import Any

from fluvial.report.figures import ranks_by_site
from fluvial.report.round_lines import round_lines, setup_lines
from fluvial.report.site_plans import (
    plans_by_site,
    predicted_by_site,
    ranks_words,
    site_plans_table,
)
from tests.unit.report.test_show import text_of


def plan(**changes: Any) -> dict[str, Any]:
    return {
        "format": "nf4",
        "batch": 4,
        "length": 64,
        "checkpointing": True,
        "rate": 1,
        "steps": 1200,
        "layer_formats": [],
        "ranks": {"q_proj": 8, "k_proj": 4, "v_proj": 4},
        "value": 10**9,
        "score": 1.0,
        "under_training": 0.25,
        "prediction": {
            "memory_bytes": 5_000_000,
            "bytes_up": 70_000,
            "bytes_down": 71_000,
            "compute_s": 5.0,
            "link_s": 130.0,
        },
        **changes,
    }


def figure(predicted: float, measured: float | None, error: float | None) -> dict[str, Any]:
    return {"predicted": predicted, "measured": measured, "error": error}


RECORD = {
    "round": 1,
    "loss": 2.0,
    "bytes_up": 10,
    "bytes_down": 10,
    "seconds": 1.0,
    "sites": 1,
    "predicted": {
        "north\x1b[31m": {
            "memory_bytes": figure(5_000_000, None, None),
            "bytes_up": figure(110, 100, 0.1),
            "bytes_down": figure(50, 100, -0.5),
            "seconds": figure(6.0, 5.0, 0.2),
        }
    },
}
LIMITS = {"memory_bytes": 8_000_000, "up_bytes_s": 1e4, "down_bytes_s": None, "latency_s": 0.0}
PLANNED = {
    "candidates": 28,
    "deadline_s": 60.0,
    "full_load_s": 42.0,
    "gap": 0.012,
    "uniform_under_training": {"north": 0.5, "south": 1.0},
    "objective": "value",
    "sites": [
        {"name": "north", "limits": LIMITS, "plan": plan(), "refused": None},
        {"name": "south", "limits": None, "plan": None, "refused": "the base is too large"},
    ],
    "method": {"name": None, "why": "nothing fits"},
    "codec": {"name": "int8", "why": "messages are long"},
}


def test_a_plan_shows_each_site_and_why_another_has_none() -> None:
    text = text_of(site_plans_table(PLANNED))
    for words in (
        "4 x 64, recomputed",
        "1,200",
        "25%",
        "1 at 8, 2 at 4",
        "8.00 MB",
        "5.00 MB",
        "70.0 kB",
        "2 min",
        "no plan for site south: the base is too large",
        "method: none; nothing fits",
        "codec: int8; messages are long",
        "28 candidate weights, objective value, deadline 60.0 s",
        "by the deadline 62% of a site's data stays untrained",
        "under uniform LoRA it would be 75%",
        "at most 1.20% of the value is missing",
    ):
        assert words in text


def test_a_base_in_two_formats_shows_how_many_layers_have_which() -> None:
    layers = [[0, "int8"], *([layer, "nf4"] for layer in range(1, 4))]
    (line,) = setup_lines({"plans": {"north": plan(format="int8", layer_formats=layers)}})
    assert "plan of north: nf4 x 3, int8 x 1, batch" in line


def test_a_site_without_a_link_shows_no_seconds_of_messages() -> None:
    free = {**LIMITS, "up_bytes_s": None}
    sites = [{**PLANNED["sites"][0], "limits": free}]  # type: ignore[index]
    assert "no link given" in text_of(site_plans_table(PLANNED | {"sites": sites}))
    assert "no link given" not in text_of(site_plans_table(PLANNED))


def test_a_plan_without_codec_and_deadline_says_so() -> None:
    text = text_of(
        site_plans_table(
            PLANNED | {"codec": None, "deadline_s": None, "uniform_under_training": {}}
        )
    )
    assert "no deadline" in text
    assert "the middle site trains on all of its data within 42.0 s" in text
    assert "codec:" not in text


def test_lines_of_a_run_have_plans_and_what_was_measured() -> None:
    (line,) = setup_lines({"plans": {"north": plan()}})
    assert line == (
        "plan of north: nf4, batch 4 x 64, recomputed, 1,200 steps, weights at rank: 1 at 8, 2 at 4"
    )
    first, second = round_lines(RECORD)
    assert first.startswith("    1    2.0000")
    assert second.endswith(
        "bytes up 110 B predicted, 100 B measured (10% too much predicted), "
        "bytes down 50 B predicted, 100 B measured (50% too little predicted), "
        "seconds 6.0 s predicted, 5.0 s measured (20% too much predicted)"
    )
    assert "\x1b" not in second
    assert "memory" not in second
    assert len(round_lines({**RECORD, "predicted": {}})) == 1


def test_the_last_comparison_of_each_site_is_shown() -> None:
    """A site that is planned anew does not hide the figures of the others."""
    later = {**RECORD, "round": 5, "predicted": {"south": RECORD["predicted"]["north\x1b[31m"]}}  # type: ignore[index]
    excerpt = predicted_by_site([RECORD, later, {"round": 6}])
    assert excerpt is not None
    assert [row[:2] for row in excerpt.rows] == [["north\\x1b[31m", "1"], ["south", "5"]]
    assert excerpt.rows[1:] == [
        [
            "south",
            "5",
            "110 B predicted, 100 B measured (10% too much predicted)",
            "50 B predicted, 100 B measured (50% too little predicted)",
            "6.0 s predicted, 5.0 s measured (20% too much predicted)",
        ]
    ]
    assert "memory bytes" not in excerpt.headings
    assert predicted_by_site([{"round": 1}]) is None


def test_without_any_plan_there_is_no_empty_table() -> None:
    south = [site for site in PLANNED["sites"] if site["name"] == "south"]  # type: ignore[attr-defined]
    text = text_of(site_plans_table(PLANNED | {"sites": south, "codec": None}))
    assert "Plan of each site" not in text
    assert "Predicted" not in text
    assert "no plan for site south" in text
    assert plans_by_site({}) is None
    plans = plans_by_site({"plans": {"north": plan()}})
    assert plans is not None
    assert plans.rows[0][0] == "north"


def test_the_picture_has_a_cell_for_each_weight_of_each_site() -> None:
    drawn = str(ranks_by_site({"north": plan(), "<south>": plan(ranks={"q_proj": 32})}))
    assert drawn.startswith("<svg")
    assert "&lt;south&gt;" in drawn
    assert drawn.count('class="v"') == 2 * 3
    assert "q_proj: rank 32" in drawn
    assert drawn.count("not tuned") == 2


def test_ranks_are_counted() -> None:
    assert ranks_words({"a": 8, "b": 4, "c": 8}) == "2 at 8, 1 at 4"
    assert ranks_words({}) == ""
