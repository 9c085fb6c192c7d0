"""The live stream: turns that arrive once, lost connections, and hostile ends, over loopback."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("grpc", reason="needs the extra 'flower'")


from fluvial.errors import ConfigError, RefusalError, WireError
from fluvial.flower.stream import caller as caller_module
from fluvial.flower.stream.chunks import CHUNK, MAX_CHUNK, Welcome, cut, join
from fluvial.flower.stream.invitation import TOKEN_BYTES, Invitation
from fluvial.flower.stream.listener import (
    StreamListener,
)
from fluvial.flower.stream.place import Place
from fluvial.flower.stream.session import Session
from tests.support.stream import (
    WAIT_S,
    Arrivals,
    BreakingLine,
    Desk,
    call_site,
    chunk,
    in_thread,
    raw,
)

# -- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK])
def test_a_message_comes_back_from_its_chunks(size: int) -> None:
    message = bytes(i % 251 for i in range(1000)) * (size // 1000) + b"x" * (size % 1000)
    chunks = list(cut(4, message))
    assert all(len(each) <= MAX_CHUNK for each in chunks)
    assert join(iter(chunks), turn=4, max_bytes=3 * CHUNK) == message
    assert join(iter(chunks[:-1]), turn=4, max_bytes=3 * CHUNK) is None  # a lost connection


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ([b""], "shorter than its header"),
        ([b"\xff" * 5], "shorter than its header"),
        ([chunk(4, 3, b"abc", kind=1)], "kind 1"),
        ([chunk(5, 3, b"abc")], "of turn 5, expected turn 4"),
        ([chunk(3, 3, b"abc")], "of turn 3, expected turn 4"),
        ([chunk(4, 0, b"")], "announces 0 bytes"),
        ([chunk(4, 10**10, b"abc")], "announces 10000000000 bytes, allowed are 1 to"),
        ([chunk(4, 3, b"ab")], "a chunk of 2"),
        ([chunk(4, 3, b"abcd")], "a chunk of 4"),
        ([chunk(4, CHUNK + 1, b"")], "a chunk of 0"),
        ([chunk(4, CHUNK + 2, b"a" * CHUNK), chunk(4, CHUNK + 1, b"a")], "which announces"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(chunks: list[bytes], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        join(iter(chunks), turn=4, max_bytes=3 * CHUNK)


@pytest.mark.parametrize(
    "data", [b"", b"x", chunk(2, 1, b"", kind=1), chunk(1, 1, b""), chunk(1, 1, b"x", kind=1)]
)
def test_another_message_is_no_welcome(data: bytes) -> None:
    assert Welcome.from_bytes(Welcome(3, 4).to_bytes()) == Welcome(3, 4)
    with pytest.raises(WireError):
        Welcome.from_bytes(data)


def test_an_invitation_comes_back_from_its_values() -> None:
    invitation = Invitation.make(8001, 2.0)
    assert len(invitation.token) == TOKEN_BYTES
    assert invitation.token != Invitation.make(8001, 2.0).token
    assert Invitation.read(invitation.values() | {"run": "x"}) == invitation
    assert Invitation.read({"run": "x"}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"stream_port": 0},
        {"stream_port": 2**16},
        {"stream_port": "8001"},
        {"stream_session": "../../../../etc/"},
        {"stream_session": "0" * 17},
        {"stream_token": b"short"},
        {"stream_token": "0" * TOKEN_BYTES},
        {"stream_patience_s": float("nan")},
        {"stream_patience_s": 1e9},
        {"stream_patience_s": 60},
    ],
)
def test_a_forged_invitation_is_refused(change: dict[str, Any]) -> None:
    values = Invitation.make(8001, 2.0).values()
    with pytest.raises(WireError, match=next(iter(change))):
        Invitation.read(values | change)
    with pytest.raises(WireError):
        Invitation.read({key: each for key, each in values.items() if key not in change})


# -- turns ---------------------------------------------------------------------------------------


def test_turns_of_all_sizes_are_exchanged(desk: Desk) -> None:
    turns = [b"a", b"b" * CHUNK, b"c" * (2 * CHUNK + 1)]

    def site() -> list[bytes]:
        with call_site(desk.invitation) as stream:
            return [stream.exchange(turn) for turn in turns]

    with in_thread(site) as done:
        desk.serve(len(turns), lambda data: data[::-1] + b"!")
        assert done.get(timeout=WAIT_S) == [turn + b"!" for turn in turns]


def test_no_port_is_open_before_an_invitation_and_after_the_end() -> None:
    with StreamListener() as listener:
        assert listener.port == 0
        desk = Desk(listener)
        assert listener.port == desk.invitation.port > 0
    assert listener.port == 0

    with (
        pytest.raises(RefusalError, match="no connection"),
        call_site(
            Invitation(desk.invitation.port, desk.invitation.session, desk.invitation.token, 0.5)
        ) as stream,
    ):
        stream.exchange(b"turn")


def test_a_second_run_cannot_share_the_port(desk: Desk) -> None:
    second = StreamListener(Place(port=desk.invitation.port))
    with pytest.raises(ConfigError, match="cannot listen on .*stream_port"):
        Desk(second)


def test_a_turn_whose_answer_was_lost_is_not_delivered_again(desk: Desk) -> None:
    """The line breaks after the turn has arrived, before its answer."""
    line = BreakingLine(desk.invitation.port, [])

    def site() -> list[bytes]:
        with call_site(desk.invitation, line.port) as stream:
            return [stream.exchange(b"one"), stream.exchange(b"two")]

    with in_thread(site) as done:
        assert desk.next().data == b"one"
        line.cut()
        time.sleep(0.05)
        desk.session.answer(1, b"ONE")
        assert desk.next().data == b"two"  # and not "one" again
        line.cut()
        desk.session.answer(2, b"TWO")
        assert done.get(timeout=WAIT_S) == [b"ONE", b"TWO"]

    assert desk.arrivals.empty()
    assert line.connections >= 2
    line.close()


def test_a_new_connection_takes_the_place_of_one_that_hangs(desk: Desk) -> None:
    """A site that notices a loss earlier than the server has two connections for a while."""
    done = threading.Event()

    def nothing() -> Iterator[bytes]:
        done.wait(WAIT_S)  # a site that closes its end of a call is gone
        yield from ()

    with in_thread(lambda: raw(desk.invitation, [chunk(1, 3, b"one")])):
        assert desk.next().data == b"one"
        with in_thread(lambda: raw(desk.invitation, nothing())) as second:
            time.sleep(0.1)
            desk.session.answer(1, b"ONE")
            time.sleep(0.5)
            done.set()
            answers, _ = second.get(timeout=WAIT_S)
            assert answers[:2] == [Welcome(1, 2).to_bytes(), chunk(1, 3, b"ONE")]
        desk.listener.end(desk.invitation)  # which also ends the first


def test_a_site_ends_when_the_server_no_longer_waits(desk: Desk) -> None:
    with in_thread(lambda: call_site(desk.invitation).exchange(b"one")) as done:
        assert desk.next().data == b"one"
        desk.listener.end(desk.invitation)
        problem = done.get(timeout=WAIT_S)

    assert isinstance(problem, RefusalError)
    assert "does not continue this conversation" in str(problem)


def test_a_site_ends_soon_after_the_runs_process(
    listener: StreamListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_module, "_CLOSED_S", 0.3)
    desk = Desk(listener, patience_s=1000.0)
    with in_thread(lambda: call_site(desk.invitation).exchange(b"one")) as done:
        assert desk.next().data == b"one"
        listener.close()
        problem = done.get(timeout=WAIT_S)

    assert isinstance(problem, RefusalError)
    assert "the process of the run has ended" in str(problem)


def test_a_site_that_reaches_nobody_ends_at_its_deadline(listener: StreamListener) -> None:
    desk = Desk(listener, patience_s=0.6)
    line = BreakingLine(desk.invitation.port, [0] * 1000)
    began = time.monotonic()
    with pytest.raises(RefusalError, match="no connection to port .* within 0.6 s"):
        call_site(desk.invitation, line.port).exchange(b"one")
    assert time.monotonic() - began < 5
    line.close()


# -- the seal ------------------------------------------------------------------------------------


class Counting:
    """A `Seal` that counts, as one with a key does."""

    def __init__(self) -> None:
        self.sealed = 0
        self.opened = 0

    def overhead(self, size: int) -> int:
        return 4

    def seal(self, message: bytes) -> bytes:
        self.sealed += 1
        return self.sealed.to_bytes(4, "big") + message

    def open(self, sealed: bytes) -> bytes:
        self.opened += 1
        if int.from_bytes(sealed[:4], "big") != self.opened:
            raise WireError("seal: out of order")
        return sealed[4:]


def test_a_turn_is_sealed_and_opened_once_whatever_happens_to_the_line(
    listener: StreamListener,
) -> None:
    arrivals: Arrivals = queue.SimpleQueue()
    near = Counting()
    far = Counting()
    invitation, session = listener.invite(
        7, arrivals.put, num_sites=1, patience_s=5.0, seal=lambda _: far
    )
    line = BreakingLine(invitation.port, [450, 500, 600, 700])

    def site() -> list[bytes]:
        with call_site(invitation, line.port, seal=near) as stream:
            return [stream.exchange(bytes([number]) * 100) for number in range(5)]

    with in_thread(site) as done:
        for turn in range(1, 6):
            arrival = arrivals.get(timeout=WAIT_S)
            assert arrival.problem == ""
            session.answer(turn, arrival.data)
        assert done.get(timeout=WAIT_S) == [bytes([number]) * 100 for number in range(5)]

    assert (near.sealed, near.opened, far.sealed, far.opened) == (5, 5, 5, 5)
    assert line.connections > 1
    line.close()


def test_a_turn_that_does_not_open_is_the_sites_failure(listener: StreamListener) -> None:
    arrivals: Arrivals = queue.SimpleQueue()
    invitation, _ = listener.invite(
        7, arrivals.put, num_sites=1, patience_s=5.0, seal=lambda _: Counting()
    )
    raw(invitation, [chunk(1, 5, b"\0\0\0\7x")])
    assert arrivals.get(timeout=WAIT_S).problem == "WireError: seal: out of order"


def test_a_session_asserts_that_answers_are_in_order() -> None:
    session = Session(1, b"", lambda _: None, Counting())
    with pytest.raises(AssertionError, match="in order"):
        session.answer(1, b"x")
