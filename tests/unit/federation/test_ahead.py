"""Turns sent ahead: a task goes on while the server works, and answers come in order."""

import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from fluvial.errors import ClientError
from fluvial.federation.fleet import Fleet
from fluvial.federation.mock import Mock
from fluvial.federation.sites import Site
from fluvial.federation.talk import Ahead, Next, Talk
from fluvial.federation.turns import Idle, Reply, Turn
from fluvial.wire.payload import Payload
from tests.support.bare_sites import NAMES, site_fleet
from tests.unit.federation.test_conversations import SKIP, mock_fleet, number, size, value

WINDOW = 3
Event = Turn[float] | Reply[float] | Idle


def converse(fleet: Fleet, window: int = WINDOW) -> Iterator[Event]:
    messages = dict.fromkeys(fleet.sites, number(1.0))
    return fleet.converse("work", messages, round=1, hear=value, read=value, window=window)


def five(name: str, message: Payload) -> Talk:
    """Send 1 to 5, at most two ahead of the answers; return the answers as digits."""
    digits = 0.0
    yield Ahead(number(1.0))
    yield Ahead(number(2.0))
    for turn in (3, 4, 5):
        digits = 10 * digits + value(name, (yield Next()))
        yield Ahead(number(float(turn)))
    for _ in range(2):
        digits = 10 * digits + value(name, (yield Next()))

    return number(digits)


def at_site(site: Site, message: Payload) -> Talk:
    return (yield from five(site.name, message))


def at_mock(site: str, _task: str, message: Payload) -> Talk:
    return (yield from five(site, message))


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("together", [False, True])
def test_answers_come_in_the_order_of_turns(workers: int, together: bool) -> None:
    """Answered at once, or once all sites wait; with one worker too."""
    for fleet in (site_fleet(at_site, workers=workers), mock_fleet(Mock(NAMES, at_mock))):
        waiting: list[Turn[float]] = []
        replies = {}
        for event in converse(fleet):
            if isinstance(event, Reply):
                replies[event.site] = event.content
            elif isinstance(event, Idle):
                assert set(event.sites) == {turn.site for turn in waiting}
                for site in event.sites:
                    turn = next(turn for turn in waiting if turn.site == site)
                    waiting.remove(turn)
                    turn.answer(number(turn.content))
            elif together:
                waiting.append(event)
            else:
                event.answer(number(event.content))

        assert replies == dict.fromkeys(NAMES, 12345.0)


def test_a_site_goes_on_while_the_server_has_its_turn() -> None:
    went_on = threading.Event()

    def task(site: Site, _: Payload) -> Talk:
        yield Ahead(number(1.0))
        went_on.set()
        return number(value(site.name, (yield Next())))

    for event in site_fleet(task).converse(
        "work", {"a": Payload()}, round=1, hear=value, read=value
    ):
        if isinstance(event, Turn):
            assert went_on.wait(5)
            event.answer(number(7.0))
        else:
            assert isinstance(event, Reply)
            assert event.content == 7.0


def test_every_turn_is_counted_in_bytes() -> None:
    fleet = site_fleet(at_site)
    for event in converse(fleet):
        if isinstance(event, Turn):
            event.answer(number(event.content))

    one = size(number(1.0))
    assert fleet.meter.current["a"] == {
        ("down", "work"): 6 * one,
        ("up", "work"): 5 * one + size(number(12345.0)),
    }


@pytest.mark.parametrize("window", [1, 2])
def test_a_turn_beyond_the_window_is_that_sites_failure(window: int) -> None:
    """It counts once the turns that came before it are answered."""

    def greedy(site: str, _task: str, message: Payload) -> Talk:
        if site != "b":
            return (yield from five(site, message)) if window > 1 else number(12345.0)
        for turn in range(5):
            yield Ahead(number(float(turn)))
        yield Next()
        return number(0.0)

    fleet = mock_fleet(Mock(NAMES, greedy), **SKIP)
    replies = []
    heard: list[Turn[float]] = []
    for event in converse(fleet, window):
        if isinstance(event, Idle):
            assert event.sites == ("b",)
            while heard:
                assert fleet.failures == []
                heard.pop(0).answer(number(0.0))
        elif isinstance(event, Reply):
            replies.append(event.site)
        elif event.site == "b":
            heard.append(event)
            assert len(heard) <= window
        else:
            event.answer(number(event.content))

    assert replies == ["a", "c", "d"]
    (failure,) = fleet.failures
    assert failure.site == "b"
    assert f"turn {window + 1} came before the answer to turn 1" in failure.reason


def answer_all(fleet: Fleet) -> None:
    """Answer every turn at once."""
    for event in converse(fleet):
        if isinstance(event, Turn):
            event.answer(number(event.content))


def test_a_failure_counts_once_the_open_turns_are_answered() -> None:
    def killed(site: str, _task: str, message: Payload) -> Talk:
        if site != "b":
            return (yield from five(site, message))
        yield Ahead(number(1.0))
        yield Ahead(number(2.0))
        raise RuntimeError("killed")

    fleet = mock_fleet(Mock(NAMES, killed), **SKIP)
    turns: list[Turn[float]] = []
    failed = []
    for event in converse(fleet):
        if isinstance(event, Turn) and event.site == "b":
            turns.append(event)
        elif isinstance(event, Turn):
            event.answer(number(event.content))
        elif isinstance(event, Idle):
            assert event.sites == ("b",)
            failed.append(len(fleet.failures))
            turns.pop(0).answer(number(0.0))

    assert failed == [0, 0]
    assert [failure.reason for failure in fleet.failures] == ["RuntimeError: killed"]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ([Next()], "waits for an answer, and has sent no turn"),
        ([Ahead(number(1.0)), number(2.0)], "answers to turns ahead are due first"),
        ([Ahead(number(1.0))], "ended before its turns were answered"),
        ([None], "None is no turn"),
        ([Ahead(3)], "task 'work' of method 'bare' yielded int; expected a Payload"),  # type: ignore[arg-type]
    ],
)
def test_a_task_that_breaks_the_order_fails(task: list[Any], reason: str) -> None:
    def work(site: Site, _: Payload) -> Any:
        for each in task:  # noqa: UP028 - a list takes no answers
            yield each
        return number(0.0)

    with pytest.raises(ClientError, match=reason):
        answer_all(site_fleet(work))


def test_a_reply_before_the_answer_to_a_turn_is_a_failure() -> None:
    """As of a site whose program is another: a turn, and then a reply in the place of the next."""
    mock = Mock(NAMES, at_mock)
    step = mock._step

    def early(request: Any) -> Any:
        arrivals = step(request)
        if request.site == "b" and len(arrivals) == 2:
            arrivals[-1][1].final = True
        return arrivals

    mock._step = early  # type: ignore[method-assign]
    fleet = mock_fleet(mock, **SKIP)
    held: list[Turn[float]] = []
    for event in converse(fleet):
        if isinstance(event, Turn) and event.site == "b":
            held.append(event)
        elif isinstance(event, Turn):
            event.answer(number(event.content))
        elif isinstance(event, Idle):
            held.pop().answer(number(0.0))

    assert "while its turn had no answer" in fleet.failures[0].reason


def test_turns_of_a_site_are_answered_in_order() -> None:
    events = list(islice(converse(mock_fleet(Mock(NAMES[:2], at_mock))), 3))
    turns = [event for event in events if isinstance(event, Turn) and event.site == "a"]
    with pytest.raises(AssertionError, match="answered in order"):
        turns[1].answer(number(0.0))


def test_a_site_has_no_deadline_while_the_server_owes_it_an_answer() -> None:
    mock = Mock(NAMES, at_mock, delays_s=dict.fromkeys(NAMES, 4.0))
    replies = 0
    for event in converse(mock_fleet(mock, deadline_s=5.0)):
        if isinstance(event, Turn):
            mock.now_s += 50.0
            event.answer(number(event.content))
        else:
            replies += isinstance(event, Reply)

    assert replies == len(NAMES)


def test_the_deadline_counts_from_the_last_answer() -> None:
    def silent(site: str, _task: str, message: Payload) -> Talk | None:
        return (yield from five(site, message)) if site != "b" else (yield from stuck())

    def stuck() -> Talk:
        yield Ahead(number(1.0))
        yield Ahead(number(2.0))
        yield Next()
        yield Next()
        yield number(3.0)
        raise AssertionError("it is late before")

    late = Mock(NAMES, silent, delays_s={"b": 3.0})
    fleet = mock_fleet(late, deadline_s=5.0, **SKIP)
    replies = []
    for event in converse(fleet):
        if isinstance(event, Turn):
            event.answer(number(event.content))
            late._delays_s = {"b": 9.0 if event.content == 2.0 else 3.0}
        elif isinstance(event, Reply):
            replies.append(event.site)

    assert sorted(replies) == ["a", "c", "d"]
    assert fleet.failures[0].reason == "no answer within fleet.deadline_s=5"
