"""The live stream with turns sent ahead: a window, losses in any place, and hostile ends."""

import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("grpc", reason="needs the extra 'flower'")

import grpc

from fluvial.errors import WireError
from fluvial.flower.stream.chunks import CHUNK, Welcome
from fluvial.flower.stream.listener import StreamListener
from tests.support.stream import (
    LIMITS,
    WAIT_S,
    BreakingLine,
    Desk,
    call_site,
    chunk,
    in_thread,
    raw,
)
from tests.unit.flower.test_hostile_stream import hostile_server
from tests.unit.flower.test_sealed_stream import call, server_seal

WINDOW = 3


@pytest.fixture
def desk(listener: StreamListener) -> Desk:
    return Desk(listener, window=WINDOW)


def ahead(stream: object, turns: list[bytes]) -> list[bytes]:
    """Send turns with up to a window of them open; return the answers."""
    answers = []
    for number, turn in enumerate(turns):
        if number >= WINDOW:
            answers.append(stream.receive())  # type: ignore[attr-defined]
        stream.send(turn)  # type: ignore[attr-defined]

    while len(answers) < len(turns):
        answers.append(stream.receive())  # type: ignore[attr-defined]
    return answers


def test_turns_arrive_before_the_first_is_answered(desk: Desk) -> None:
    turns = [b"a" * CHUNK, b"b", b"c" * (CHUNK + 1), b"d"]

    def site() -> list[bytes]:
        with call_site(desk.invitation) as stream:
            return ahead(stream, turns)

    with in_thread(site) as done:
        assert [desk.next().data for _ in range(WINDOW)] == turns[:WINDOW]
        time.sleep(0.1)
        assert desk.arrivals.empty()
        for number, turn in enumerate(turns[:WINDOW], start=1):
            desk.session.answer(number, turn.upper())
        assert desk.next().data == b"d"
        desk.session.answer(4, b"D")
        assert done.get(timeout=WAIT_S) == [turn.upper() for turn in turns]


@pytest.mark.parametrize("lost", [100, 500, 900, 30_000, 70_000, 110_000, 170_000, 230_000])
def test_connections_that_break_anywhere_change_nothing(
    listener: StreamListener, lost: int
) -> None:
    """Sealed turns and answers are sent again as they are, and none is sealed or counted twice."""
    desk = Desk(listener, window=WINDOW, seal=server_seal)
    line = BreakingLine(desk.invitation.port, [lost, lost // 2, lost])
    turns = [bytes([number]) * 30_000 for number in range(7)]

    def site() -> list[bytes]:
        with call(desk, line.port) as stream:
            return ahead(stream, turns)

    with in_thread(site) as done:
        for number, turn in enumerate(turns, start=1):
            arrival = desk.next()
            assert (arrival.problem, arrival.data) == ("", turn)
            desk.session.answer(number, turn[::-1] + b"!")
        assert done.get(timeout=WAIT_S) == [turn[::-1] + b"!" for turn in turns]

    assert desk.arrivals.empty()
    assert line.connections > 1
    line.close()


def test_answers_that_were_lost_come_again(desk: Desk) -> None:
    """The line breaks with three turns at the server, and again with their answers on the way."""
    line = BreakingLine(desk.invitation.port, [])

    def site() -> list[bytes]:
        with call_site(desk.invitation, line.port) as stream:
            return ahead(stream, [b"one", b"two", b"three", b"four"])

    with in_thread(site) as done:
        assert [desk.next().data for _ in range(3)] == [b"one", b"two", b"three"]
        line.cut()
        time.sleep(0.05)
        desk.session.answer(1, b"ONE")
        assert desk.next().data == b"four"
        desk.session.answer(2, b"TWO")
        line.cut()
        desk.session.answer(3, b"THREE")
        desk.session.answer(4, b"FOUR")
        assert done.get(timeout=WAIT_S) == [b"ONE", b"TWO", b"THREE", b"FOUR"]

    assert desk.arrivals.empty()
    line.close()


# -- hostile ends ----------------------------------------------------------------------------------


def test_a_turn_beyond_the_window_is_not_read(desk: Desk) -> None:
    with in_thread(
        lambda: raw(desk.invitation, [chunk(number, 1, b"x") for number in range(1, 6)])
    ):
        for _ in range(WINDOW):
            assert desk.next().data == b"x"
        time.sleep(0.1)
        assert desk.arrivals.empty()
        desk.session.answer(1, b"y")
        assert desk.next().data == b"x"
        desk.listener.end(desk.invitation)


@pytest.mark.parametrize("numbers", [(1, 1), (1, 3), (1, 2, 2), (2,)])
def test_a_turn_twice_or_out_of_order_is_the_sites_failure(
    desk: Desk, numbers: tuple[int, ...]
) -> None:
    _, code = raw(desk.invitation, [chunk(number, 1, b"x") for number in numbers])
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    arrivals = [desk.next() for _ in numbers]
    assert [arrival.problem for arrival in arrivals[:-1]] == [""] * (len(numbers) - 1)
    assert f"a chunk of turn {numbers[-1]}, expected turn" in arrivals[-1].problem


@pytest.mark.parametrize(("turn", "answers"), [("3", 1), ("1", 4), ("9", 2)])
def test_a_site_names_a_turn_whose_answer_may_be_lacking(
    desk: Desk, turn: str, answers: int
) -> None:
    """Answers that are not made, and those that the site must have since it sent later turns."""
    turns = range(1, min(WINDOW + answers, 5) + 1)
    heard = threading.Semaphore(WINDOW - 1)  # the welcome counts too

    def chunks() -> Iterator[bytes]:
        for number in turns:
            heard.acquire()
            yield chunk(number, 1, b"x")

    with in_thread(lambda: raw(desk.invitation, chunks(), heard)):
        for number in turns:
            assert desk.next().data == b"x"
            if number <= answers:
                desk.session.answer(number, b"y")

        _, code = raw(desk.invitation, [], fluvial_turn=turn)
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert f"the site is at turn {turn}, the server at {answers}" in desk.next().problem


def test_a_site_refuses_a_server_that_has_more_than_was_sent() -> None:
    with (
        hostile_server([Welcome(1, 3).to_bytes()]) as invitation,
        call_site(invitation, limits=LIMITS) as stream,
        pytest.raises(WireError, match="the server has turn 2, which was not sent"),
    ):
        stream.send(b"one")


def test_a_site_reads_no_answer_before_its_turn() -> None:
    """The server answers turn 2 although one turn was sent; the answer counts as that to turn 2."""
    answers = [Welcome(1, 1).to_bytes(), chunk(1, 1, b"x"), chunk(3, 1, b"z")]
    with (
        hostile_server(answers) as invitation,
        call_site(invitation, limits=LIMITS) as stream,
    ):
        stream.send(b"one")
        assert stream.receive() == b"x"
        stream.send(b"two")
        with pytest.raises(WireError, match="of turn 3, expected turn 2"):
            stream.receive()
