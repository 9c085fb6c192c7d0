"""Hostile sites, hostile servers and foreign certificates at the live stream, over loopback."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="needs the extra 'flower'")

import grpc

from fluvial.errors import RefusalError, WireError
from fluvial.flower import certificates
from fluvial.flower.stream.chunks import CHUNK, Welcome
from fluvial.flower.stream.invitation import TOKEN_BYTES, Invitation
from fluvial.flower.stream.listener import (
    METHOD,
    SERVICE,
    SESSION_KEY,
    TOKEN_KEY,
    TURN_KEY,
    StreamListener,
)
from fluvial.flower.stream.place import Place
from tests.support.stream import (
    LIMITS,
    WAIT_S,
    Desk,
    call_site,
    chunk,
    in_thread,
    raw,
)

# -- a hostile site ------------------------------------------------------------------------------


def test_only_the_token_of_a_session_opens_it(listener: StreamListener) -> None:
    one = Desk(listener)
    other = Desk(listener)
    refused = grpc.StatusCode.UNAUTHENTICATED
    for forged in (
        {"fluvial_token_bin": b"\0" * TOKEN_BYTES},
        {"fluvial_token_bin": other.invitation.token},
        {"fluvial_token_bin": b""},
        {"fluvial_token_bin": None},
        {"fluvial_session": other.invitation.session},
        {"fluvial_session": "f" * 16},
        {"fluvial_session": "x" * 1000},
        {"fluvial_session": None},
    ):
        assert raw(one.invitation, [chunk(1, 1, b"x")], **forged) == ([], refused)

    assert one.arrivals.empty()
    assert other.arrivals.empty()
    with in_thread(lambda: call_site(one.invitation).exchange(b"fine")):
        one.serve(1)


@pytest.mark.parametrize(
    ("turn", "messages", "reason"),
    [
        ("2", [], "the site is at turn 2, the server at 0"),
        ("0", [], "the site is at turn 0"),
        ("-1", [], "the site is at turn 0"),
        ("9" * 500, [], "the site is at turn 0"),
        ("9999999999", [], "the site is at turn 0"),
        ("x", [], "the site is at turn 0"),
        ("1", [chunk(2, 1, b"x")], "a chunk of turn 2, expected turn 1"),
        ("1", [chunk(1, 10**10, b"x" * 100)], "announces 10000000000 bytes"),
        ("1", [b"garbage"], "shorter than its header"),
        ("1", [b"garbage" * 100], "a chunk of kind"),
        ("1", [chunk(1, 5, b"xx"), chunk(1, 5, b"xxx")], "a chunk of 2"),
    ],
)
def test_a_violation_is_the_failure_of_its_site_alone(
    listener: StreamListener, turn: str, messages: list[bytes], reason: str
) -> None:
    hostile = Desk(listener)
    honest = Desk(listener)
    _, code = raw(hostile.invitation, messages, fluvial_turn=turn)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    arrival = hostile.next()
    assert arrival.number == 7
    assert arrival.data == b""
    assert reason in arrival.problem

    with in_thread(lambda: call_site(honest.invitation).exchange(b"fine")) as done:
        honest.serve(1)
        assert done.get(timeout=WAIT_S) == b"fine"
    assert hostile.arrivals.empty()


def test_a_call_that_lacks_its_last_header_is_a_lost_connection(desk: Desk) -> None:
    """gRPC gives the server such a call where the connection breaks in the headers."""
    assert raw(desk.invitation, [], fluvial_turn=None) == ([], grpc.StatusCode.UNAVAILABLE)
    with in_thread(lambda: call_site(desk.invitation).exchange(b"fine")):
        desk.serve(1)
    assert desk.arrivals.empty()


def test_a_turn_before_the_answer_to_the_last_is_not_read(desk: Desk) -> None:
    """Turn 2 waits until turn 1 is answered, and is then a turn like any other."""
    with in_thread(
        lambda: raw(desk.invitation, [chunk(1, 1, b"a"), chunk(2, 1, b"b"), chunk(9, 1, b"c")])
    ):
        assert desk.next().data == b"a"
        time.sleep(0.1)
        assert desk.arrivals.empty()
        desk.session.answer(1, b"A")
        assert desk.next().data == b"b"
        desk.session.answer(2, b"B")
        assert "a chunk of turn 9, expected turn 3" in desk.next().problem


def test_a_message_beyond_the_size_of_a_chunk_is_refused_by_grpc(desk: Desk) -> None:
    _, code = raw(desk.invitation, [chunk(1, 2 * CHUNK, b"x" * (2 * CHUNK))])
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert desk.arrivals.empty()
    with in_thread(lambda: call_site(desk.invitation).exchange(b"fine")):
        desk.serve(1)


def test_sites_that_hold_many_connections_do_not_keep_others_out(listener: StreamListener) -> None:
    hostile = Desk(listener)
    honest = Desk(listener)
    held = []
    for _ in range(60):
        channel = grpc.insecure_channel(f"127.0.0.1:{hostile.invitation.port}")
        metadata = [
            (SESSION_KEY, hostile.invitation.session),
            (TOKEN_KEY, hostile.invitation.token),
            (TURN_KEY, "1"),
        ]
        held.append(
            (channel, channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(()), None, metadata))
        )

    with in_thread(lambda: call_site(honest.invitation).exchange(b"fine")) as done:
        honest.serve(1)
        assert done.get(timeout=WAIT_S) == b"fine"
    for channel, _ in held:
        channel.close()


# -- a hostile server ----------------------------------------------------------------------------


@contextmanager
def hostile_server(
    answers: list[bytes], held: threading.Event | None = None
) -> Iterator[Invitation]:
    """A server that gives these answers to whatever it is sent, and holds the connection until the
    event."""

    def turns(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        yield from answers
        if held is not None:
            held.wait(WAIT_S)
        time.sleep(0.2)

    server = grpc.server(ThreadPoolExecutor(4))
    handler = grpc.stream_stream_rpc_method_handler(turns)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield Invitation.make(port, 3.0)
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([b"garbage"], "a welcome of 7 bytes"),
        ([chunk(1, 1, b"x")], "a welcome of 14 bytes"),
        ([Welcome(2, 2).to_bytes()], "the server is at turn 2, the site at 1"),
        ([Welcome(1, 2).to_bytes()], "which was not sent"),
        ([Welcome(1, 1).to_bytes(), chunk(2, 1, b"x")], "of turn 2, expected turn 1"),
        ([Welcome(1, 1).to_bytes(), chunk(0, 1, b"x")], "of turn 0, expected turn 1"),
        ([Welcome(1, 1).to_bytes(), chunk(1, 10**10, b"x")], "announces 10000000000 bytes"),
        ([Welcome(1, 1).to_bytes(), chunk(1, 9, b"x")], "a chunk of 1 after 0"),
    ],
)
def test_a_site_refuses_what_a_hostile_server_answers(answers: list[bytes], reason: str) -> None:
    with (
        hostile_server(answers) as invitation,
        call_site(invitation, limits=LIMITS) as stream,
        pytest.raises(WireError, match=reason),
    ):
        stream.exchange(b"turn")


def test_a_site_gives_up_on_a_server_that_sends_too_large_a_message() -> None:
    with hostile_server([Welcome(1, 1).to_bytes(), b"x" * (2 * CHUNK)]) as invitation:
        impatient = Invitation(invitation.port, invitation.session, invitation.token, 0.5)
        with pytest.raises(RefusalError), call_site(impatient, limits=LIMITS) as stream:
            stream.exchange(b"turn")


@pytest.mark.parametrize("welcomed", [True, False])
def test_a_site_does_not_wait_for_ever(welcomed: bool) -> None:
    """A server that keeps the connection, and says nothing more, does not hold the site's task."""
    held = threading.Event()
    answers = [Welcome(1, 1).to_bytes()] if welcomed else []
    with hostile_server(answers, held) as invitation, call_site(invitation) as stream:
        stream.within_s = 0.3
        began_s = time.monotonic()
        with pytest.raises(RefusalError, match="turn within 0.3 s.*fleet.deadline_s"):
            stream.exchange(b"turn")
        assert time.monotonic() - began_s < 3
        held.set()


# -- TLS -----------------------------------------------------------------------------------------


def authority(folder: Path, hosts: list[str]) -> tuple[Place, bytes]:
    folder.mkdir()
    certificates.make_authority(folder)
    certificates.make_server_certificate(folder, hosts)
    place = Place(certificate=folder / "server.crt", key=folder / "server.key")
    return place, (folder / "ca.crt").read_bytes()


@pytest.mark.parametrize("kind", ["another authority", "another address", "plain text"])
def test_a_stream_that_is_not_the_servers_is_refused(tmp_path: Path, kind: str) -> None:
    place, own = authority(tmp_path / "own", ["example.org" if "address" in kind else "127.0.0.1"])
    _, foreign = authority(tmp_path / "foreign", ["127.0.0.1"])
    known = foreign if kind == "another authority" else own
    at = Place() if kind == "plain text" else place

    with StreamListener(at) as listener:
        desk = Desk(listener, patience_s=0.5)
        with pytest.raises(RefusalError), call_site(desk.invitation, authority=known) as stream:
            stream.exchange(b"secret")
        assert desk.arrivals.empty()


def test_a_site_without_tls_is_not_served(tmp_path: Path) -> None:
    place, _ = authority(tmp_path / "own", ["127.0.0.1"])
    with StreamListener(place) as listener:
        desk = Desk(listener, patience_s=0.5)
        with pytest.raises(RefusalError), call_site(desk.invitation) as stream:
            stream.exchange(b"turn")
        assert desk.arrivals.empty()
