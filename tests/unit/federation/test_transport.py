"""What the fleet does above any transport: retry, deadline, quorum, bytes and reading."""

from typing import Any

import pytest

from fluvial.errors import ClientError
from fluvial.federation.config import FleetConfig
from fluvial.federation.fleet import Fleet
from fluvial.federation.mock import Mock
from fluvial.federation.turns import Reply
from fluvial.wire.payload import Limits, Payload

NAMES = ("a", "b", "c", "d")
MESSAGE = Payload(values={"round": 1})
SKIP: dict[str, Any] = {"on_failure": "skip", "quorum": 0.5}


def fleet_of(mock: Mock, limits: Limits | None = None, **settings: Any) -> Fleet:
    return Fleet(mock, FleetConfig.model_validate(settings), limits=limits, clock=mock.clock)


def ask(fleet: Fleet, **options: Any) -> list[Reply[Payload]]:
    messages = dict.fromkeys(fleet.sites, MESSAGE)
    return list(fleet.ask("work", messages, round=1, read=lambda _, reply: reply, **options))


def named(site: str, _task: str, _message: Payload) -> Payload:
    return Payload(values={"site": site})


def size(payload: Payload) -> int:
    return len(payload.to_bytes())


def test_read_gets_the_site_that_answers_and_replies_come_in_their_order() -> None:
    mock = Mock(NAMES, named, delays_s={"a": 3.0, "b": 1.0, "c": 2.0})
    fleet = fleet_of(mock)
    asked = fleet.ask("work", dict.fromkeys(NAMES, MESSAGE), round=1, read=lambda site, _: site)
    replies = list(asked)
    assert [reply.content for reply in replies] == ["d", "b", "c", "a"]
    assert [reply.seconds for reply in replies] == [0.0, 1.0, 2.0, 3.0]
    assert mock.accepted == ["d", "b", "c", "a"]


def test_no_more_requests_are_out_than_slots() -> None:
    mock = Mock(NAMES, named, delays_s=dict.fromkeys(NAMES, 1.0), slots=2)
    assert [reply.seconds for reply in ask(fleet_of(mock))] == [1.0] * 4
    assert mock.now_s == 2.0


def test_a_late_answer_is_dropped_and_does_not_count_in_the_next_round() -> None:
    mock = Mock(NAMES, named, delays_s={"b": 7.0})
    fleet = fleet_of(mock, deadline_s=5.0, **SKIP)
    assert sorted(reply.site for reply in ask(fleet)) == ["a", "c", "d"]
    assert mock.now_s == 5.0
    assert mock.dropped == ["b"]
    assert fleet.failures[0].reason == "no answer within fleet.deadline_s=5"

    mock.now_s = 6.0
    assert sorted(reply.site for reply in ask(fleet)) == ["a", "c", "d"]
    assert mock.dropped == ["b", "b"]


def test_the_deadline_counts_from_when_a_request_was_sent() -> None:
    mock = Mock(NAMES, named, delays_s=dict.fromkeys(NAMES, 4.0), slots=1)
    assert len(ask(fleet_of(mock, deadline_s=5.0))) == 4
    assert mock.now_s == 16.0


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 100, b"x" * 3000])
def test_garbage_is_a_failure_whose_bytes_are_counted(garbage: bytes) -> None:
    mock = Mock(NAMES, lambda site, *_: garbage if site == "c" else MESSAGE)
    fleet = fleet_of(mock, Limits(max_bytes=2000), **SKIP)
    assert sorted(reply.site for reply in ask(fleet)) == ["a", "b", "d"]
    (failure,) = fleet.failures
    assert (failure.site, failure.bytes_up) == ("c", len(garbage))
    assert failure.reason.startswith("WireError")
    counts = fleet.meter.close_round()["c"]
    assert counts["down", "work"] == size(MESSAGE)
    assert counts.get(("up", "work"), 0) == len(garbage)


def test_a_retry_counts_every_message_and_accepts_one_answer() -> None:
    calls = []

    def flaky(site: str, task: str, message: Payload) -> Payload:
        calls.append(site)
        if site == "b" and calls.count("b") < 3:
            raise RuntimeError("not yet")
        return MESSAGE

    mock = Mock(NAMES, flaky)
    fleet = fleet_of(mock, on_failure="retry")
    assert len(ask(fleet)) == 4
    assert sorted(mock.accepted) == list(NAMES)
    assert mock.dropped == ["b", "b"]
    told = len(b"RuntimeError: not yet")
    assert fleet.meter.current["b"] == {
        ("down", "work"): 3 * size(MESSAGE),
        ("up", "work"): size(MESSAGE) + 2 * told,
    }


def test_a_silent_site_without_a_deadline_is_a_fault_of_the_test() -> None:
    with pytest.raises(AssertionError, match="every site is silent"):
        ask(fleet_of(Mock(NAMES, lambda *_: None)))


def test_under_stop_the_first_failure_drops_what_is_open() -> None:
    def one_fails(site: str, *_: object) -> Payload:
        if site == "a":
            raise RuntimeError("no")
        return MESSAGE

    mock = Mock(NAMES, one_fails)
    with pytest.raises(ClientError, match="round 1, work: site 'a' failed: RuntimeError: no"):
        ask(fleet_of(mock))
    assert sorted(mock.dropped) == list(NAMES)


def test_the_quorum_is_the_callers_where_the_call_is_not_alone() -> None:
    fleet = fleet_of(Mock(NAMES, lambda *_: b""), **SKIP)
    assert ask(fleet, alone=False) == []
    with pytest.raises(ClientError, match=r"0 of 4 sites answered.*missing: a, b, c, d"):
        fleet.require_quorum("work", 1, answered=0, asked=4)


def test_a_call_within_the_loop_of_another_takes_nothing_from_it() -> None:
    mock = Mock(NAMES, named, delays_s={"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0})
    fleet = fleet_of(mock)
    outer = []
    inner = []

    for reply in fleet.ask(
        "work", dict.fromkeys(NAMES, MESSAGE), round=1, read=lambda _, reply: reply
    ):
        outer.append(reply.site)
        inner.append([other.site for other in ask(fleet)])

    assert outer == list(NAMES)
    assert inner == [list(NAMES)] * 4
    assert mock.dropped == []


def test_a_loop_that_is_left_early_drops_what_is_open() -> None:
    mock = Mock(NAMES, named)
    replies = fleet_of(mock).ask(
        "work", dict.fromkeys(NAMES, MESSAGE), round=1, read=lambda _, reply: reply
    )
    next(replies)
    replies.close()  # type: ignore[attr-defined]
    assert sorted(mock.dropped + mock.accepted) == list(NAMES)
    assert len(mock.accepted) == 1
