"""The time of a split round over a line, beside a simulation of the same conversations by hand."""

from typing import cast

import pytest

from fluvial.federation.line import Line, round_s
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.traffic import Conversation, TurnSize, round_over_line_s
from fluvial.methods.interface import Given
from fluvial.methods.traffic import exactly

LINE = Line(up_mbit_s=20, down_mbit_s=10, rtt_ms=100)
TURNS = {
    "north": [(0, 10**6, 10**4), (0, 10**4, 10**4), (1, 10**4, 10**4), (1, 10**4, 10**6)],
    "south": [(0, 10**4, 10**6), (0, 10**4, 10**4), (1, 10**6, 10**4), (1, 10**4, 10**4)],
}
"""Step, bytes up and bytes down of each turn: the sites are slow in different ones."""


class _Facts:
    sites = len(TURNS)


def conversation(turns: list[tuple[int, int, int]]) -> Conversation:
    nothing = exactly(0)
    return Conversation(
        nothing, nothing, nothing, nothing, tuple(TurnSize(*turn) for turn in turns), 1
    )


def by_hand(meet: str) -> float:
    """Play the turns on two clocks, which wait for each other where sites meet."""
    clocks = dict.fromkeys(TURNS, 0.0)
    for number in range(4):
        for site, turns in TURNS.items():
            _, up, down = turns[number]
            clocks[site] += 0.1 + up * 1500 / 1448 * 8 / 20e6 + down * 1500 / 1448 * 8 / 10e6

        last_of_step = TURNS["north"][number][0] == 0 and number == 1
        if meet == "every turn" or (meet == "every step" and last_of_step):
            clocks = dict.fromkeys(TURNS, max(clocks.values()))

    return sum(clocks.values()) if meet == "in turn" else max(clocks.values())


@pytest.mark.parametrize(
    ("settings", "meet"),
    [
        ({"mode": "client-batch"}, "every turn"),
        ({"mode": "hierarchical", "sync_steps": 1}, "every step"),
        ({"mode": "hierarchical"}, "at the end"),
        ({"mode": "sequential"}, "in turn"),
    ],
)
def test_the_time_of_a_round_is_that_of_a_simulation(
    settings: dict[str, object], meet: str
) -> None:
    config = FlGlmConfig.model_validate(settings)
    found = {site: conversation(turns) for site, turns in TURNS.items()}
    messages_s = round_s(0, 0, sites=1, line=LINE) * (2 if meet == "in turn" else 1)
    predicted_s = round_over_line_s(config, cast(Given, _Facts()), found, LINE)
    assert predicted_s == pytest.approx(messages_s + by_hand(meet))
