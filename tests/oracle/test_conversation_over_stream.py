"""A conversation over the live stream gives, to the bit, the result of the one in process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="needs the extra 'flower'")

from fluvial.federation.store import StateStore
from fluvial.flower import certificates
from fluvial.flower.stream.caller import StreamCaller
from fluvial.flower.stream.invitation import Invitation
from fluvial.flower.stream.listener import StreamListener
from fluvial.flower.stream.place import Place
from fluvial.wire.payload import Payload
from tests.oracle.test_conversation import SITES, play, replies_of, split
from tests.support.bare_sites import bare_site
from tests.support.stream import BreakingLine, OverStream, stream_fleet

pytestmark = pytest.mark.oracle

GREETING = 400
"""Bytes of the greeting of HTTP/2 and of the call, about, both directions together."""


def over_stream(listener: StreamListener, **settings: Any) -> OverStream:
    return OverStream(
        SITES,
        lambda name: bare_site(name, StateStore(None)),
        {"train": split},
        listener,
        **settings,
    )


def in_bytes(replies: Mapping[str, Payload]) -> dict[str, bytes]:
    return {site: reply.to_bytes() for site, reply in replies.items()}


@pytest.mark.parametrize("together", [False, True])
def test_a_conversation_over_the_stream_equals_the_one_in_process(together: bool) -> None:
    with StreamListener() as listener:
        found = replies_of(stream_fleet(over_stream(listener)), together=together)

    assert in_bytes(found) == in_bytes(play(split))


def test_a_conversation_with_tls_equals_the_one_in_process(tmp_path: Path) -> None:
    certificates.make_authority(tmp_path)
    certificates.make_server_certificate(tmp_path, ["127.0.0.1"])
    place = Place(certificate=tmp_path / "server.crt", key=tmp_path / "server.key")
    authority = (tmp_path / "ca.crt").read_bytes()

    def caller(_: str, invitation: Invitation) -> StreamCaller:
        return StreamCaller(invitation, "127.0.0.1", invitation.port, authority=authority)

    with StreamListener(place) as listener:
        found = replies_of(stream_fleet(over_stream(listener, caller=caller)))

    assert in_bytes(found) == in_bytes(play(split))


@pytest.mark.parametrize("bytes_of_turns", [0, 100, 450, 800, 1200, 1700])
def test_connections_that_break_in_the_middle_of_turns_change_nothing(bytes_of_turns: int) -> None:
    """The first two connections of each site break."""
    lines = {}

    def caller(site: str, invitation: Invitation) -> StreamCaller:
        breaks_after = [GREETING + bytes_of_turns, GREETING + bytes_of_turns // 2]
        lines[site] = BreakingLine(invitation.port, breaks_after)
        return StreamCaller(invitation, "127.0.0.1", lines[site].port, authority=None)

    with StreamListener() as listener:
        found = replies_of(stream_fleet(over_stream(listener, caller=caller)))

    for line in lines.values():
        line.close()

    assert all(line.connections > 1 for line in lines.values())
    assert in_bytes(found) == in_bytes(play(split))
