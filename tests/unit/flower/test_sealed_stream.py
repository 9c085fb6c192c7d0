"""Turns through the sealed channel over the stream: exchanged, resumed, and refused."""

from typing import Any

import pytest

pytest.importorskip("grpc", reason="needs the extra 'flower'")

from fluvial.errors import ChannelError, FluvialError
from fluvial.flower.stream.caller import StreamCaller
from fluvial.flower.stream.invitation import Invitation
from fluvial.flower.stream.listener import StreamListener
from fluvial.flower.stream.seal import PIECE, Seal, ServerSeal, SiteSeal, terms_of
from fluvial.wire.channel import Identity, ServerHandshake, SiteHandshake
from tests.support.stream import WAIT_S, BreakingLine, Desk, call_site, in_thread

SERVER = Identity.generate()
SITES = {name: Identity.generate() for name in ("north", "south")}


def server_seal(token: bytes, *, site: str = "north") -> Seal:
    pins = {name: identity.public for name, identity in SITES.items()}
    return ServerSeal(ServerHandshake(SERVER, pins, terms_of("run", token)), site)


def site_seal(
    invitation: Invitation, *, name: str = "north", run: str = "run", server: Identity = SERVER
) -> SiteSeal:
    terms = terms_of(run, invitation.token)
    return SiteSeal(SiteHandshake(SITES[name], server.public.fingerprint, name, terms))


@pytest.fixture
def sealed(listener: StreamListener) -> Desk:
    return Desk(listener, seal=server_seal)


def call(desk: Desk, port: int = 0, **changes: Any) -> StreamCaller:
    return call_site(desk.invitation, port, seal=site_seal(desk.invitation, **changes))


def test_sealed_turns_of_all_sizes_are_exchanged(sealed: Desk) -> None:
    turns = [b"a", b"b" * PIECE, b"c" * (2 * PIECE + 1), b"d" * 3_000_000]

    def site() -> list[bytes]:
        with call(sealed) as stream:
            return [stream.exchange(turn) for turn in turns]

    with in_thread(site) as done:
        sealed.serve(len(turns), lambda data: data[::-1] + b"!")
        assert done.get(timeout=WAIT_S) == [turn[::-1] + b"!" for turn in turns]


@pytest.mark.parametrize("lost", [100, 400, 700, 70_000, 140_000])
def test_a_lost_connection_is_resumed_at_its_turn(sealed: Desk, lost: int) -> None:
    """The line breaks after so many bytes: in the handshake, in a turn, in an answer."""
    line = BreakingLine(sealed.invitation.port, [lost, 10**9])
    turns = [b"x" * 50_000, b"y" * 50_000]

    def site() -> list[bytes]:
        with call(sealed, line.port) as stream:
            return [stream.exchange(turn) for turn in turns]

    with in_thread(site) as done:
        sealed.serve(len(turns))
        assert done.get(timeout=WAIT_S) == turns
    line.close()


@pytest.mark.parametrize(
    "changes",
    [{"name": "south"}, {"run": "another run"}, {"server": SITES["south"]}],
    ids=["another site", "another run", "another server"],
)
def test_another_end_is_refused(sealed: Desk, changes: dict[str, Any]) -> None:
    with in_thread(lambda: call(sealed, **changes).exchange(b"one")) as done:
        problem = done.get(timeout=WAIT_S)

    assert isinstance(problem, FluvialError)
    if "server" not in changes:
        assert sealed.next().problem


def test_the_size_of_a_message_is_authentic() -> None:
    """A whole piece may not be cut off a message."""
    invitation = Invitation.make(1, 1.0, sealed=True)
    here = site_seal(invitation)
    there = server_seal(invitation.token)
    assert isinstance(there, ServerSeal)
    here.greeted(there.greet(here.hello()))
    whole = here.seal(b"x" * (2 * PIECE))
    with pytest.raises(ChannelError, match="not authentic"):
        there.open(whole[: -PIECE - 16])


def test_nothing_of_a_turn_is_seen_on_the_line(sealed: Desk) -> None:
    line = BreakingLine(sealed.invitation.port, [10**9])
    secret = b"the hidden states of a patient"

    with in_thread(lambda: call(sealed, line.port).exchange(secret * 100)) as done:
        sealed.serve(1)
        assert done.get(timeout=WAIT_S) == secret * 100

    assert len(line.seen) > 3000
    assert secret not in line.seen
    line.close()
