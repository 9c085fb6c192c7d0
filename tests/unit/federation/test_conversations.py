"""Tasks that talk with the server: turns, answers now or later, failures in the middle."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fluvial.errors import ClientError
from fluvial.federation.config import FleetConfig
from fluvial.federation.fleet import Fleet
from fluvial.federation.mock import Mock
from fluvial.federation.sites import Site
from fluvial.federation.store import StateStore
from fluvial.federation.talk import Talk
from fluvial.federation.turns import Idle, Reply, Turn
from fluvial.wire.payload import Limits, Payload
from tests.support.bare_sites import NAMES, site_fleet

SKIP: dict[str, Any] = {"on_failure": "skip", "quorum": 0.5}
Event = Turn[float] | Reply[float] | Idle


def number(value: float) -> Payload:
    return Payload(values={"x": value})


def value(_site: str, payload: Payload) -> float:
    found: float = payload.value("x", float)
    return found


def size(payload: Payload) -> int:
    return len(payload.to_bytes())


def converse(fleet: Fleet, first: float = 1.0) -> Iterator[Event]:
    messages = dict.fromkeys(fleet.sites, number(first))
    return fleet.converse("work", messages, round=1, hear=value, read=value)


def play(fleet: Fleet, answer: Callable[[float], float] = lambda x: 10 * x) -> dict[str, float]:
    """Answer every turn at once; return the replies."""
    replies = {}
    for event in converse(fleet):
        assert not isinstance(event, Idle)
        if isinstance(event, Turn):
            event.answer(number(answer(event.content)))
        else:
            replies[event.site] = event.content

    return replies


def two_turns(site: str, _task: str, message: Payload) -> Talk:
    """Say x + 1 and then the answer + 2; return the sum of all that was heard."""
    first = value(site, message)
    second = value(site, (yield number(first + 1)))
    third = value(site, (yield number(second + 2)))
    return number(first + second + third)


def mock_fleet(mock: Mock, limits: Limits | None = None, **settings: Any) -> Fleet:
    return Fleet(mock, FleetConfig.model_validate(settings), limits=limits, clock=mock.clock)


def talk(site: Site, message: Payload) -> Talk:
    return (yield from two_turns(site.name, "work", message))


def test_locals_live_on_between_turns() -> None:
    """1, then 10 * 2, then 10 * 22."""
    wanted = dict.fromkeys(NAMES, 241.0)
    assert play(mock_fleet(Mock(NAMES, two_turns))) == wanted
    assert play(site_fleet(talk)) == wanted
    assert play(site_fleet(talk, workers=1)) == wanted


def test_turns_and_replies_come_in_the_order_of_arrival() -> None:
    mock = Mock(NAMES, two_turns, delays_s={"a": 5.0, "b": 1.0, "c": 2.0, "d": 3.0})
    fleet = mock_fleet(mock)
    seen = []
    for event in converse(fleet):
        assert not isinstance(event, Idle)
        seen.append((event.site, isinstance(event, Reply), mock.now_s))
        if isinstance(event, Turn):
            event.answer(number(0.0))

    by_site = {site: [at for name, _, at in seen if name == site] for site in NAMES}
    assert by_site == {"a": [5, 10, 15], "b": [1, 2, 3], "c": [2, 4, 6], "d": [3, 6, 9]}
    assert [at for *_, at in seen] == sorted(at for *_, at in seen)


def test_every_turn_is_counted_in_bytes() -> None:
    for fleet in (mock_fleet(Mock(NAMES, two_turns)), site_fleet(talk)):
        down = size(number(1.0)) + size(number(20.0)) + size(number(220.0))
        up = size(number(2.0)) + size(number(22.0)) + size(number(241.0))
        replies = []
        for event in converse(fleet):
            if isinstance(event, Turn):
                event.answer(number(10 * event.content))
            elif isinstance(event, Reply):
                replies.append((event.bytes_down, event.bytes_up))

        assert replies == [(down, up)] * 4
        counts = {("down", "work"): down, ("up", "work"): up}
        assert fleet.meter.close_round() == dict.fromkeys(NAMES, counts)


def test_what_a_turn_sends_is_what_it_was_then() -> None:
    """The answer is serialised at once, and a site gets bytes of its own."""
    sent = torch.zeros(3)
    received: list[torch.Tensor] = []

    def task(site: Site, message: Payload) -> Talk:
        received.append((yield Payload()).tensors["x"])
        return number(0.0)

    fleet = site_fleet(task)
    messages = {"a": Payload()}
    for event in fleet.converse("work", messages, round=1, hear=lambda *_: 0, read=value):
        if isinstance(event, Turn):
            event.answer(Payload({"x": sent}))
            sent += 1

    assert torch.equal(received[0], torch.zeros(3))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_two_sites_may_be_answered_together(workers: int) -> None:
    """With one worker too: a site that waits for the server takes no slot."""
    fleet = site_fleet(talk, workers=workers)
    batch: list[Turn[float]] = []
    replies = {}
    messages = dict.fromkeys(("a", "b"), number(1.0))

    for event in fleet.converse("work", messages, round=1, hear=value, read=value):
        if isinstance(event, Turn):
            batch.append(event)
            if len(batch) == 2:
                total = sum(turn.content for turn in batch)
                for turn in reversed(batch):
                    turn.answer(number(total))
                batch.clear()
        elif isinstance(event, Reply):
            replies[event.site] = event.content

    assert replies == dict.fromkeys(("a", "b"), 1.0 + 4.0 + 12.0)


def test_a_batch_that_does_not_fill_is_ended_when_all_wait() -> None:
    def one_fails(site: str, task: str, message: Payload) -> Talk | Payload:
        if site == "b":
            raise RuntimeError("no")
        return two_turns(site, task, message)

    fleet = mock_fleet(Mock(NAMES, one_fails), **SKIP)
    batch: list[Turn[float]] = []
    idle = []
    replies = []

    for event in converse(fleet):
        if isinstance(event, Turn):
            batch.append(event)
        elif isinstance(event, Idle):
            idle.append(event.sites)
            for turn in batch:
                turn.answer(number(1.0))
            batch.clear()
        else:
            replies.append(event.site)

    assert idle == [("a", "c", "d")] * 2
    assert sorted(replies) == ["a", "c", "d"]


def test_a_turn_that_is_never_answered_is_a_fault_of_the_server_half() -> None:
    mock = Mock(NAMES, two_turns)
    with pytest.raises(AssertionError, match="no turn was answered"):
        list(converse(mock_fleet(mock)))
    assert sorted(mock.dropped) == list(NAMES)


def test_a_turn_is_answered_once() -> None:
    turns = (event for event in converse(mock_fleet(Mock(NAMES, two_turns))))
    turn = next(turns)
    assert isinstance(turn, Turn)
    turn.answer(number(1.0))
    with pytest.raises(AssertionError, match="is answered"):
        turn.answer(number(1.0))


def test_a_failure_in_the_middle_is_the_sites_and_nothing_is_kept() -> None:
    store = StateStore(None)

    def task(site: Site, message: Payload) -> Talk:
        site.keep("begun", number(1.0))
        yield number(2.0)
        if site.name == "b":
            raise RuntimeError("in the middle")
        site.keep("ended", number(3.0))
        return number(4.0)

    fleet = site_fleet(task, store, **SKIP)
    assert sorted(play(fleet)) == ["a", "c", "d"]
    assert [(failure.site, failure.task) for failure in fleet.failures] == [("b", "work")]
    assert "RuntimeError" in fleet.failures[0].reason
    for site in NAMES:
        wanted = {} if site == "b" else {"x": 1.0}
        assert store.read(site, "begun").values == wanted
        assert bool(store.read(site, "ended").values) == (site != "b")


def test_what_a_site_keeps_counts_with_its_return_only() -> None:
    store = StateStore(None)

    def task(site: Site, message: Payload) -> Talk:
        site.keep("slot", number(1.0))
        yield number(2.0)
        assert site.recall("slot").values == {"x": 1.0}
        return number(3.0)

    for event in converse(site_fleet(task, store)):
        assert not isinstance(event, Idle)
        there = bool(store.read(event.site, "slot").values)
        assert there == isinstance(event, Reply)
        if isinstance(event, Turn):
            event.answer(number(0.0))


def test_a_turn_that_cannot_be_read_ends_the_task_by_its_finally() -> None:
    closed = []

    def task(site: Site, message: Payload) -> Talk:
        try:
            yield Payload(values={"y": 1}) if site.name == "c" else number(2.0)
        finally:
            closed.append(site.name)
        return number(3.0)

    fleet = site_fleet(task, **SKIP)
    assert sorted(play(fleet)) == ["a", "b", "d"]
    assert "WireError" in fleet.failures[0].reason
    assert sorted(closed) == list(NAMES)


def test_the_deadline_is_of_each_turn() -> None:
    """Three times 4 s in all, and 6 s in one turn of `b`, under a deadline of 5 s."""
    mock = Mock(NAMES, two_turns, delays_s=dict.fromkeys(NAMES, 4.0))
    assert len(play(mock_fleet(mock, deadline_s=5.0))) == 4

    late = Mock(NAMES, two_turns, delays_s={"b": 6.0})
    fleet = mock_fleet(late, deadline_s=5.0, **SKIP)
    assert sorted(play(fleet)) == ["a", "c", "d"]
    assert late.dropped == ["b"]


def test_a_deadline_in_the_middle_closes_the_task_when_its_step_has_ended() -> None:
    release = threading.Event()
    closed = threading.Event()
    store = StateStore(None)

    def task(site: Site, message: Payload) -> Talk:
        try:
            site.keep("slot", number(1.0))
            yield number(2.0)
            if site.name == "b":
                release.wait(10)
            yield number(3.0)
        finally:
            if site.name == "b":
                closed.set()
        return number(4.0)

    fleet = site_fleet(task, store, deadline_s=0.3, **SKIP)
    started = time.monotonic()
    assert sorted(play(fleet)) == ["a", "c", "d"]
    assert time.monotonic() - started < 5
    assert fleet.failures[0].reason == "no answer within fleet.deadline_s=0.3"
    assert not closed.is_set()
    release.set()
    assert closed.wait(5)
    assert store.read("b", "slot").values == {}


def test_time_in_the_servers_hands_is_not_the_sites() -> None:
    mock = Mock(NAMES, two_turns)
    fleet = mock_fleet(mock, deadline_s=5.0)
    replies = []
    for event in converse(fleet):
        if isinstance(event, Turn):
            mock.now_s += 50.0
            event.answer(number(0.0))
        elif isinstance(event, Reply):
            replies.append(event.site)

    assert len(replies) == 4


def test_a_retry_begins_the_task_again() -> None:
    tries: list[str] = []

    def flaky(site: Site, message: Payload) -> Talk:
        tries.append(site.name)
        second = value(site.name, (yield number(2.0)))
        if site.name == "b" and tries.count("b") < 3:
            raise RuntimeError("not yet")
        return number(second)

    fleet = site_fleet(flaky, on_failure="retry", workers=1)
    assert play(fleet) == dict.fromkeys(NAMES, 20.0)
    assert {site: tries.count(site) for site in NAMES} == {"a": 1, "b": 3, "c": 1, "d": 1}
    turn_down = size(number(1.0)) + size(number(20.0))
    assert fleet.meter.current["b"]["down", "work"] == 3 * turn_down


def test_the_quorum_counts_those_that_returned() -> None:
    def half(site: Site, message: Payload) -> Talk:
        yield number(2.0)
        if site.name in "bcd":
            raise RuntimeError("no")
        return number(3.0)

    with pytest.raises(ClientError, match=r"1 of 4 sites answered.*missing: b, c, d"):
        play(site_fleet(half, **SKIP))


def test_limits_hold_for_turns_both_ways() -> None:
    big = Payload({"x": torch.zeros(5000)})

    def says_much(site: Site, message: Payload) -> Talk:
        yield big if site.name == "c" else number(2.0)
        return number(3.0)

    fleet = site_fleet(says_much, limits=Limits(max_bytes=10_000), **SKIP)
    assert sorted(play(fleet)) == ["a", "b", "d"]
    assert "exceeds the limit of 10000" in fleet.failures[0].reason

    fleet = site_fleet(talk, limits=Limits(max_bytes=10_000), **SKIP)
    replies = []
    for event in converse(fleet):
        if isinstance(event, Turn):
            event.answer(big if event.site == "c" else number(1.0))
        elif isinstance(event, Reply):
            replies.append(event.site)

    assert sorted(replies) == ["a", "b", "d"]
    assert fleet.failures[0].site == "c"


def test_a_task_that_talks_when_it_is_asked_fails_as_that_site() -> None:
    closed = []

    def some_talk(site: Site, message: Payload) -> Talk | Payload:
        return talking(site) if site.name == "b" else number(1.0)

    def talking(site: Site) -> Talk:
        try:
            yield number(2.0)
        finally:
            closed.append(site.name)
        return number(3.0)

    fleet = site_fleet(some_talk, **SKIP)
    replies = fleet.ask("work", dict.fromkeys(NAMES, number(1.0)), round=1, read=value)
    assert sorted(reply.site for reply in replies) == ["a", "c", "d"]
    assert "the task sends a turn" in fleet.failures[0].reason
    assert closed == ["b"]


def test_no_thread_waits_between_two_turns() -> None:
    fleet = site_fleet(talk, workers=4)
    turns: list[Turn[float]] = []
    for event in converse(fleet):
        if isinstance(event, Idle):
            until = time.monotonic() + 5
            while any(":" in thread.name for thread in threading.enumerate()):
                assert time.monotonic() < until
                time.sleep(0.01)
            for turn in turns:
                turn.answer(number(0.0))
            turns.clear()
        elif isinstance(event, Turn):
            turns.append(event)


def test_gradients_go_on_over_a_turn_as_in_one_thread() -> None:
    """`no_grad` over a turn holds after it, and a graph that was begun before it goes on."""

    def task(site: Site, message: Payload) -> Talk:
        weight = torch.ones(3, requires_grad=True)
        hidden = (2 * weight).sum()
        with torch.no_grad():
            yield number(hidden.item())
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        answer = value(site.name, (yield number(0.0)))
        (answer * hidden).backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        return number(weight.grad.sum().item())

    assert play(site_fleet(task), lambda x: x + 1.0) == dict.fromkeys(NAMES, 6.0)


def waking(
    mock: Mock,
    config: FleetConfig,
    patience_s: float,
    late: Callable[[Idle, list[Turn[float]]], None],
) -> Iterator[Event]:
    """Converse, and let `late` handle what waits `patience_s` after the last message has left."""
    fleet = Fleet(mock, config, clock=mock.clock)
    turns: list[Turn[float]] = []
    messages = dict.fromkeys(fleet.sites, number(1.0))
    for event in fleet.converse(
        "work",
        messages,
        round=1,
        hear=value,
        read=value,
        wake_s=lambda working: max(working.values()) + patience_s if turns else math.inf,
    ):
        yield event
        if isinstance(event, Turn):
            turns.append(event)
        elif isinstance(event, Idle):
            late(event, turns)


def test_a_wake_up_comes_in_time_and_names_who_works() -> None:
    """Two seconds after the messages have left, a and c wait, and the others are at work."""
    mock = Mock(NAMES, two_turns, delays_s={"a": 1, "b": 5, "c": 2, "d": 9})
    idle: list[tuple[float, tuple[str, ...], tuple[str, ...]]] = []

    def answer(event: Idle, turns: list[Turn[float]]) -> None:
        idle.append((mock.now_s, event.sites, event.working))
        for turn in turns:
            turn.answer(number(0.0))
        turns.clear()

    events = list(waking(mock, FleetConfig(), 2.0, answer))
    assert idle[0] == (2.0, ("a", "c"), ("b", "d"))
    assert idle[-1][0] > 9
    assert sorted(event.site for event in events if isinstance(event, Reply)) == [*NAMES]


def test_a_site_that_is_left_out_is_not_asked_again() -> None:
    """One that works and one that waits are failures, and the others end."""
    mock = Mock(NAMES, two_turns, delays_s={"b": 50})
    config = FleetConfig(on_failure="retry", retries=3)

    def leave(event: Idle, turns: list[Turn[float]]) -> None:
        for turn in turns:
            if turn.site != "d":
                turn.answer(number(0.0))

        turns.clear()
        if "b" in event.working:
            event.leave_out("b", "too late")
            event.leave_out("d", "not wanted")

    events = list(waking(mock, config, 2.0, leave))
    assert sorted(event.site for event in events if isinstance(event, Reply)) == ["a", "c"]
    assert sorted(mock.dropped) == ["b", "d"]
    assert mock.now_s < 50


def test_each_beginning_is_told() -> None:
    """A site that fails once begins twice."""
    failed: list[str] = []

    def answer(site: str, task: str, message: Payload) -> Payload | Talk:
        if site == "b" and not failed:
            failed.append(site)
            raise RuntimeError("once")
        return two_turns(site, task, message)

    mock = Mock(NAMES, answer)
    fleet = Fleet(mock, FleetConfig(on_failure="retry"), clock=mock.clock)
    began: list[str] = []
    messages = dict.fromkeys(NAMES, number(1.0))
    for event in fleet.converse(
        "work", messages, round=1, hear=value, read=value, began=began.append
    ):
        if isinstance(event, Turn):
            event.answer(number(0.0))

    assert began == [*NAMES, "b"]
