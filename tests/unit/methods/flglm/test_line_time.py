"""The time of a split round over a line, beside a simulation of its events by hand."""

import heapq
from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Any, cast

import pytest

from fluvial.federation.line import Line, round_s
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.line_time import round_over_line_s
from fluvial.methods.flglm.order import order_of_step
from fluvial.methods.flglm.traffic import MEETING, Conversation, TurnSize
from fluvial.methods.interface import Given
from fluvial.methods.traffic import exactly

LINE = Line(up_mbit_s=20, down_mbit_s=10, rtt_ms=100)
UP_S = 1500 / 1448 * 8 / 20e6
DOWN_S = 1500 / 1448 * 8 / 10e6
"""Seconds of a byte."""
WAY_S = 0.05
MEET = (2 * 10**5, 10**5)
"""Bytes up and down of a turn in which sites meet."""
Turn = tuple[int, int]
STEPS: dict[str, list[list[tuple[Turn, Turn]]]] = {
    "north": [
        [((10**6, 10**4), (10**4, 10**4)), ((10**5, 10**5), (10**5, 10**6))],
        [((10**4, 10**4), (10**4, 10**6)), ((10**4, 10**4), (10**5, 10**4))],
    ],
    "south": [
        [((10**4, 10**6), (10**4, 10**4))],
        [((10**6, 10**4), (10**4, 10**4))] * 4,
    ],
}
"""Bytes of the forward and the backward turn of each micro-batch of each step: the sites have
unequal numbers of micro-batches, and are slow in different ones."""


class _Facts:
    sites = len(STEPS)


def meets(config: FlGlmConfig) -> bool:
    return config.mode == "client-batch" or config.sync_steps is not None


def conversation(config: FlGlmConfig, site: str) -> Conversation:
    sizes = []
    for step, turns in enumerate(STEPS[site]):
        for place in order_of_step(len(turns), config.in_flight):
            up, down = turns[place.micro][0 if place.forward else 1]
            sizes.append(TurnSize(step, place.rank, place.answers, up, down))
        if meets(config):
            sizes.append(TurnSize(step, MEETING, 2 * len(turns), *MEET))

    nothing = exactly(0)
    return Conversation(nothing, nothing, nothing, nothing, tuple(sizes), 1)


Key = tuple[int, str, int]
"""Step, kind and micro-batch of a turn."""


def script(config: FlGlmConfig, site: str) -> Iterator[tuple[Key, Turn] | None]:
    """Yield the turns that a site sends; None where it waits for its oldest answer."""
    ahead = config.in_flight
    for step, turns in enumerate(STEPS[site]):
        open_ = 0
        for micro in range(min(ahead, len(turns))):
            yield (step, "forward", micro), turns[micro][0]
            open_ += 1

        for micro in range(len(turns)):
            yield None
            yield (step, "backward", micro), turns[micro][1]
            if micro >= ahead - 1:
                yield None
                open_ -= 1
            if micro + ahead < len(turns):
                yield (step, "forward", micro + ahead), turns[micro + ahead][0]
                open_ += 1

        for _ in range(open_):
            yield None
        if meets(config):
            yield (step, "meeting", 0), MEET
            yield None


def simulated_s(config: FlGlmConfig, names: list[str]) -> float:
    """Play the round: lines carry one message at a time each way, the server answers each site in
    order, and where sites meet when the turn is the oldest one of all that have it."""
    scripts = {site: script(config, site) for site in names}
    having = {site: {each[0] for each in script(config, site) if each} for site in names}
    up_free = dict.fromkeys(names, 0.0)
    down_free = dict.fromkeys(names, 0.0)
    queues: dict[str, deque[tuple[Key, Turn]]] = {site: deque() for site in names}
    order = count()
    events: list[tuple[float, int, str, Any]] = []
    now = 0.0

    def go_on(site: str) -> None:
        for said in scripts[site]:
            if said is None:
                return  # until the next answer
            up_free[site] = max(now, up_free[site]) + said[1][0] * UP_S
            heapq.heappush(events, (up_free[site] + WAY_S, next(order), site, said))

    def answer(site: str) -> None:
        _, (_, down) = queues[site].popleft()
        down_free[site] = max(now, down_free[site]) + down * DOWN_S
        heapq.heappush(events, (down_free[site] + WAY_S, next(order), site, None))

    def serve() -> bool:
        for queue in queues.values():
            if not queue:
                continue
            key = queue[0][0]
            together = config.mode == "client-batch" or key[1] == "meeting"
            group = [each for each in names if key in having[each]] if together else []
            if all(queues[each] and queues[each][0][0] == key for each in group):
                for each in group or [next(name for name in names if queues[name] is queue)]:
                    answer(each)
                return True
        return False

    for site in names:
        go_on(site)
    while events:
        now, _, site, said = heapq.heappop(events)
        if said is not None:
            queues[site].append(said)
            while serve():
                pass
        else:
            go_on(site)

    return now


@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "client-batch"},
        {"mode": "hierarchical", "sync_steps": 1},
        {"mode": "hierarchical"},
        {"mode": "sequential"},
    ],
)
def test_the_time_of_a_round_is_that_of_a_simulation(
    settings: dict[str, object], in_flight: int
) -> None:
    config = FlGlmConfig.model_validate(settings | {"in_flight": in_flight})
    found = {site: conversation(config, site) for site in STEPS}
    alone = config.mode == "sequential"
    messages_s = round_s(0, 0, sites=1, line=LINE) * (2 if alone else 1)
    groups = [[site] for site in STEPS] if alone else [list(STEPS)]
    turns_s = sum(simulated_s(config, group) for group in groups)
    predicted_s = round_over_line_s(config, cast(Given, _Facts()), found, LINE)
    assert predicted_s == pytest.approx(messages_s + turns_s)


def test_turns_on_their_way_at_a_time_save_time() -> None:
    """One at a time, a round is the sum of its turns; with two, both directions work at once."""
    times = []
    for in_flight in (1, 2):
        config = FlGlmConfig(mode="sequential", in_flight=in_flight)
        found = {site: conversation(config, site) for site in STEPS}
        times.append(round_over_line_s(config, cast(Given, _Facts()), found, LINE))

    turns = [turn for steps in STEPS.values() for step in steps for pair in step for turn in pair]
    summed_s = sum(up * UP_S + down * DOWN_S + 2 * WAY_S for up, down in turns)
    assert times[0] == pytest.approx(summed_s + 2 * round_s(0, 0, sites=1, line=LINE))
    assert times[1] < 0.95 * times[0]
