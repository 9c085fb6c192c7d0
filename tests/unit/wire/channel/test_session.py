"""Frames of a channel: everything but the next frame of this session and header is refused."""

import copy
import os
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluvial.errors import ChannelError
from fluvial.wire.channel import Session
from fluvial.wire.channel.session import TAG_BYTES
from fluvial.wire.payload import Payload
from tests.support.memory import allocates_less
from tests.unit.wire.channel.pair import Deployment

DEPLOYMENT = Deployment()


@given(st.lists(st.tuples(st.binary(min_size=1), st.binary(), st.booleans()), max_size=12))
def test_what_is_sealed_is_opened_in_both_directions(
    messages: list[tuple[bytes, bytes, bool]],
) -> None:
    site, server = DEPLOYMENT.connect(frames_per_key=2)
    for data, header, up in messages:
        sender, receiver = (site, server) if up else (server, site)
        frame = sender.seal(data, header)
        assert len(frame) == len(data) + sender.overhead == len(data) + TAG_BYTES
        assert receiver.open(frame, header) == data

    assert server.open(site.close()) == b""
    assert site.open(server.close()) == b""
    site.check_closed()
    server.check_closed()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_buffers_are_sealed_and_opened_as_they_are(kind: Callable[[bytes], bytes]) -> None:
    site, server = DEPLOYMENT.connect()
    assert server.open(kind(site.seal(kind(b"hidden")))) == b"hidden"


def test_a_buffer_of_wider_items_is_sealed_as_its_bytes() -> None:
    site, server = DEPLOYMENT.connect()
    words = memoryview(b"12345678").cast("I")
    assert server.open(site.seal(words)) == b"12345678"


def test_equal_messages_have_different_frames_without_plaintext() -> None:
    site, _ = DEPLOYMENT.connect(frames_per_key=3)
    message = Payload({"hidden": torch.linspace(-1, 1, 64)}, {"step": 3}).to_bytes()
    frames = [site.seal(message, header=b"a header") for _ in range(10)]
    assert len(set(frames)) == 10

    sent = b"|".join(frames)
    secrets = {message[place : place + 8] for place in range(len(message) - 7)} | {b"a header"}
    assert not any(secret in sent for secret in secrets)


def flipped(frame: bytes, place: int) -> bytes:
    return frame[:place] + bytes([frame[place] ^ 1]) + frame[place + 1 :]


def changed(site: Session, server: Session) -> bytes:
    return flipped(site.seal(b"hidden"), 2)


def changed_tag(site: Session, server: Session) -> bytes:
    return flipped(site.seal(b"hidden"), -1 % (6 + TAG_BYTES))


def cut(site: Session, server: Session) -> bytes:
    return site.seal(b"hidden")[:-1]


def lengthened(site: Session, server: Session) -> bytes:
    return site.seal(b"hidden") + b"\0"


def replayed(site: Session, server: Session) -> bytes:
    frame = site.seal(b"hidden")
    server.open(frame)
    return frame


def reordered(site: Session, server: Session) -> bytes:
    frames = [site.seal(b"first"), site.seal(b"second")]
    return frames[1]


def dropped(site: Session, server: Session) -> bytes:
    server.open(site.seal(b"first"))
    site.seal(b"lost")
    return site.seal(b"third")


def reflected(site: Session, server: Session) -> bytes:
    return server.seal(b"hidden")


def of_another_session(site: Session, server: Session) -> bytes:
    return DEPLOYMENT.connect()[0].seal(b"hidden")


def of_another_site(site: Session, server: Session) -> bytes:
    return DEPLOYMENT.connect("south")[0].seal(b"hidden")


def with_another_header(site: Session, server: Session) -> bytes:
    return site.seal(b"hidden", header=b"step 2")


def forged_close(site: Session, server: Session) -> bytes:
    return bytes(TAG_BYTES)


def old_key(site: Session, server: Session) -> bytes:
    """Return the first frame of the next key, numbered as the first frame of all."""
    frame = site.seal(b"first")
    server.open(frame)
    for _ in range(3):
        server.open(site.seal(b"more"))
    return frame


ATTACKS = [
    changed,
    changed_tag,
    cut,
    lengthened,
    replayed,
    reordered,
    dropped,
    reflected,
    of_another_session,
    of_another_site,
    with_another_header,
    forged_close,
    old_key,
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_any_frame_but_the_next_is_refused_and_ends_the_session(
    attack: Callable[[Session, Session], bytes],
) -> None:
    site, server = DEPLOYMENT.connect(frames_per_key=4)
    with pytest.raises(ChannelError, match="is not authentic"):
        server.open(attack(site, server))

    uses: tuple[Callable[[], object], ...] = (
        lambda: server.open(site.seal(b"next")),
        lambda: server.seal(b"next"),
    )
    for use in uses:
        with pytest.raises(ChannelError, match="the channel has ended: frame . is not authentic"):
            use()


@given(st.binary(max_size=100))
def test_garbage_is_refused(garbage: bytes) -> None:
    _, server = DEPLOYMENT.connect()
    with pytest.raises(ChannelError):
        server.open(garbage)


def test_a_peer_site_cannot_open_another_sites_frames() -> None:
    north, _ = DEPLOYMENT.connect("north")
    south, south_server = DEPLOYMENT.connect("south")
    with pytest.raises(ChannelError, match="is not authentic"):
        south.open(north.seal(b"hidden"))
    with pytest.raises(ChannelError, match="is not authentic"):
        south_server.open(north.seal(b"hidden"))


def test_keys_change_and_the_old_ones_are_gone() -> None:
    """After a change, neither end's state holds a key or secret that opens the earlier frames."""
    site, server = DEPLOYMENT.connect(frames_per_key=2)
    seen = []
    for number in range(6):
        frame = site.seal(b"hidden")
        seen.append(site._send_keys.gi_frame.f_locals["secret"])  # type: ignore[attr-defined]
        assert server.open(frame) == b"hidden", number

    assert seen[0] == seen[1] != seen[2] == seen[3] != seen[4] == seen[5]
    assert len(set(seen)) == 3


def test_a_stream_that_was_cut_off_is_noticed() -> None:
    site, server = DEPLOYMENT.connect()
    server.open(site.seal(b"hidden"))
    with pytest.raises(ChannelError, match="ended without a close record: it was cut off"):
        server.check_closed()

    site.close()  # lost on the way
    with pytest.raises(ChannelError, match="it was cut off"):
        server.check_closed()


def test_nothing_follows_the_close_record() -> None:
    site, server = DEPLOYMENT.connect()
    server.open(site.close())
    uses: tuple[Callable[[], object], ...] = (lambda: site.seal(b"more"), site.close)
    for use in uses:
        with pytest.raises(ChannelError, match="this end has closed the channel"):
            use()

    # The other direction is open still.
    assert site.open(server.seal(b"gradient")) == b"gradient"
    with pytest.raises(ChannelError, match="a frame came after the close record"):
        server.open(bytes(50))
    server.check_closed()


def test_a_close_record_is_bound_to_its_header() -> None:
    site, server = DEPLOYMENT.connect()
    with pytest.raises(ChannelError, match="is not authentic"):
        server.open(site.close(header=b"step 1"), header=b"step 2")


def test_an_empty_message_cannot_pass_for_a_close_record() -> None:
    site, _ = DEPLOYMENT.connect()
    with pytest.raises(ChannelError, match="an empty message cannot be sealed"):
        site.seal(b"")


def test_a_session_expires_at_both_ends() -> None:
    now = 100.0

    def clock() -> float:
        return now

    site, server = DEPLOYMENT.connect(lifetime_s=60.0, clock=clock)
    now = 159.9
    frame = site.seal(b"hidden")
    server.open(frame)
    last = site.seal(b"late")
    now = 160.0
    uses: tuple[Callable[[], object], ...] = (
        lambda: site.seal(b"more"),
        lambda: server.open(last),
        site.close,
    )
    for use in uses:
        with pytest.raises(ChannelError, match="expired; connect anew"):
            use()

    now = 100.0  # a clock that goes back brings nothing back
    with pytest.raises(ChannelError, match="the channel has ended: the session has expired"):
        site.seal(b"more")


def test_the_time_of_the_handshake_counts() -> None:
    now = 0.0
    site_end = DEPLOYMENT.site_end(lifetime_s=60.0, clock=lambda: now)
    server_end = DEPLOYMENT.server_end()
    answer = server_end.answer(site_end.hello())
    now = 60.0
    _, site = site_end.finish(answer)
    with pytest.raises(ChannelError, match="expired"):
        site.seal(b"hidden")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_session_cannot_be_copied(duplicate: Callable[[Session], object]) -> None:
    site, server = DEPLOYMENT.connect()
    with pytest.raises(ChannelError, match="cannot be copied or pickled: a nonce would be used"):
        duplicate(site)
    assert server.open(site.seal(b"hidden")) == b"hidden"


def test_the_numbers_of_frames_cannot_be_set_back() -> None:
    site, _ = DEPLOYMENT.connect()
    site.seal(b"hidden")
    with pytest.raises(TypeError, match="generator"):
        copy.copy(site._send_keys)


def test_a_frame_that_fails_to_be_made_uses_up_its_number() -> None:
    """After an error within the library, the number does not come again."""
    site, server = DEPLOYMENT.connect()

    class Broken:
        def encrypt(self, nonce: bytes, data: bytes, label: bytes) -> bytes:
            raise MemoryError

    keys = site._send_keys
    key, number = next(keys)
    site._send_keys = iter([(Broken(), number), *(next(keys) for _ in range(2))])  # type: ignore[list-item]
    with pytest.raises(MemoryError):
        site.seal(b"lost")
    frame = site.seal(b"hidden")
    assert key.encrypt(bytes(12), b"hidden", site._send_label + bytes(12)) != frame
    with pytest.raises(ChannelError, match="frame 0 is not authentic"):
        server.open(frame)


def test_a_fork_cannot_use_the_session_of_its_parent() -> None:
    site, server = DEPLOYMENT.connect()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            site.seal(b"hidden")
            os.write(write, b"sealed")
        except ChannelError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)

    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        assert b"cannot be used in a fork" in answer.read()
    assert server.open(site.seal(b"hidden")) == b"hidden"


def test_threads_that_seal_at_once_share_no_nonce() -> None:
    site, server = DEPLOYMENT.connect(frames_per_key=7)
    frames: dict[int, list[bytes]] = {}

    def seal(thread: int) -> None:
        frames[thread] = [site.seal(bytes(20)) for _ in range(200)]

    threads = [threading.Thread(target=seal, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    sealed = {frame for each in frames.values() for frame in each}
    assert len(sealed) == 800
    for _ in range(800):
        # Every number was used once: the next frame in order is among those that were made.
        key, number = next(server._receive_keys)
        label = server._receive_label + number.to_bytes(12, "big")
        sealed.remove(key.encrypt(number.to_bytes(12, "big"), bytes(20), label))

    assert not sealed


def test_sizes_are_checked_before_anything_is_allocated() -> None:
    site, server = DEPLOYMENT.connect(max_frame_bytes=1000)
    large = bytes(50_000_000)

    def refuse() -> None:
        with pytest.raises(ChannelError, match="message of 50000000 bytes; a frame holds 984"):
            site.seal(large)
        with pytest.raises(ChannelError, match="header of 70000 bytes; at most 65536"):
            site.seal(b"hidden", header=bytes(70_000))
        with pytest.raises(ChannelError, match="frame of 50000000 bytes; expected 16 to 1000"):
            server.open(large)

    assert allocates_less(refuse, 1_000_000)


def test_a_message_that_was_refused_at_its_sender_uses_up_no_number() -> None:
    site, server = DEPLOYMENT.connect(max_frame_bytes=100)
    with pytest.raises(ChannelError, match="a frame holds 84"):
        site.seal(bytes(85))
    assert server.open(site.seal(bytes(84))) == bytes(84)


def test_no_copy_is_made_beyond_frame_and_message() -> None:
    site, server = DEPLOYMENT.connect()
    data = bytes(20_000_000)
    frame_bytes = len(data) + 16

    def send() -> None:
        frame = site.seal(data)
        assert len(frame) == frame_bytes
        assert len(server.open(frame)) == len(data)

    assert allocates_less(send, frame_bytes + len(data) + 100_000)
