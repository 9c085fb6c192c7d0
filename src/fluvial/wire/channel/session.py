"""Frames of a channel in both directions: encrypted, authentic, in order, and with an end.

A frame is the ciphertext and its tag of 16 bytes, and nothing else. What both ends know is not
sent: the number of the frame in its direction is its nonce, and it is authenticated together with
the protocol version, the session, the direction and a header of the caller. An empty message is the
close record, so that a stream that was cut off differs from one that ended.

The keys of a direction form a chain, as in TLS 1.3 (RFC 8446, 7.2): a secret gives one frame key
and, after `frames_per_key` frames, the next secret, and is then dropped. Frames are numbered
through the whole session. No two frames share key and nonce, and somebody who learns the present
secret cannot read earlier keys' frames. Python drops references; it does not overwrite memory.

The first frame that is refused ends the session in both directions, and a new handshake is needed.
A session may outlive its connection: a caller that connects again sends the same frames again and
opens each once, in order. It never seals a message twice.

A frame is a new object. Beyond 128 KB its memory comes from the kernel as a rule, and the first
touch costs as much as the cipher (`python -m benchmarks.channel`): pieces of 64 KB avoid it.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from fluvial.errors import ChannelError

VERSION = 1
"""Version of handshake and frames."""
TAG_BYTES = 16
"""Bytes of a frame beyond its message."""
KEY_BYTES = 32
"""Bytes of a secret or key."""
MAX_HEADER_BYTES = 2**16
"""Largest header of a frame, in bytes."""
FRAMES_PER_KEY = 2**20
"""Frames of one direction until its key changes."""
MAX_FRAME_BYTES = 2**31 - 1
"""Largest frame, in bytes; the library encrypts no more at once."""
LIFETIME_S = 24 * 3600.0
"""Seconds after the beginning of the handshake until a session expires."""

TO_SERVER = 1
TO_SITE = 2


class Session:
    """One end of an established channel.

    One thread may seal while another opens. A session cannot be copied, pickled or used after a
    fork, because two senders with one key would use a nonce twice.

    Example::

        frame = here.seal(payload, header=b"step 3, forward")
        payload = there.open(frame, header=b"step 3, forward")
    """

    overhead = TAG_BYTES
    """Bytes that `seal` adds to a message."""

    def __init__(
        self,
        session: bytes,
        *,
        sends: int,
        send_secret: bytes,
        receive_secret: bytes,
        started_s: float,
        peer: str,
        lifetime_s: float = LIFETIME_S,
        frames_per_key: int = FRAMES_PER_KEY,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with the secrets of a handshake, which makes sessions.

        `session` is the hash of the handshake; `sends` is the direction of this end's frames;
        `started_s` is the time of `clock` from which `lifetime_s` counts.
        """
        assert frames_per_key >= 1, "a key carries a frame at least"
        receives = TO_SITE if sends == TO_SERVER else TO_SERVER
        self.id = session
        """Hash of the handshake, equal at both ends and different for every session."""
        self.peer = peer
        """Name of the site at the server's end, and fingerprint of the server at the site's."""
        self._send_keys = _keys(send_secret, frames_per_key)
        self._receive_keys = _keys(receive_secret, frames_per_key)
        self._send_label = bytes([VERSION, sends]) + session
        self._receive_label = bytes([VERSION, receives]) + session
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()
        self._process = os.getpid()
        self._expires_s = started_s + lifetime_s
        self._max_frame_bytes = max_frame_bytes
        self._clock = clock
        self._ended = ""
        """Reason why nothing more is sealed or opened, empty while the session lives."""
        self._closed = False
        self._peer_closed = False

    def seal(self, message: bytes | bytearray | memoryview, header: bytes = b"") -> bytes:
        """Return the next frame of this direction, 16 bytes longer than the message.

        `header` is not sent; `open` must be given the same bytes. Raises `ChannelError` if the
        session has ended or the message is empty or too large.
        """
        view = memoryview(message).cast("B")
        if not view.nbytes:
            raise ChannelError("an empty message cannot be sealed; `close` makes the empty frame")
        return self._seal(view, header)

    def close(self, header: bytes = b"") -> bytes:
        """Return the close record, which is the last frame of this direction."""
        return self._seal(memoryview(b""), header, last=True)

    def open(self, frame: bytes | bytearray | memoryview, header: bytes = b"") -> bytes:
        """Return the message of the peer's next frame, empty for the close record.

        Raises `ChannelError` for any other frame than the next one with this header. The session
        has then ended.
        """
        self._check_process()
        with self._receive_lock:
            self._check_usable()
            size = memoryview(frame).nbytes
            if self._peer_closed:
                self._refuse("a frame came after the close record")
            if not TAG_BYTES <= size <= self._max_frame_bytes:
                self._refuse(
                    f"frame of {size} bytes; expected {TAG_BYTES} to {self._max_frame_bytes}"
                )

            _check_header(header)
            key, number = self._next(self._receive_keys)
            try:
                message = key.decrypt(
                    _nonce(number), frame, self._receive_label + _nonce(number) + header
                )
            except InvalidTag:
                self._refuse(
                    f"frame {number} is not authentic: it was changed, repeated, left out or "
                    "reordered, or belongs to another session or header"
                )

            self._peer_closed = not message
            return message

    def check_closed(self) -> None:
        """Raise `ChannelError` unless the peer's close record was opened.

        Call it where the stream ends: without close record, the stream was cut off.
        """
        if not self._peer_closed:
            raise ChannelError(
                "the stream ended without a close record: it was cut off"
                + (f", after {self._ended}" if self._ended else "")
            )

    def _seal(self, message: memoryview, header: bytes, *, last: bool = False) -> bytes:
        self._check_process()
        with self._send_lock:
            self._check_usable()
            if self._closed:
                raise ChannelError("this end has closed the channel; nothing can follow")

            limit = self._max_frame_bytes - TAG_BYTES
            if message.nbytes > limit:
                raise ChannelError(f"message of {message.nbytes} bytes; a frame holds {limit}")

            _check_header(header)
            # The number is used up before the library sees it: an error cannot make it come twice.
            key, number = self._next(self._send_keys)
            self._closed = last
            return key.encrypt(_nonce(number), message, self._send_label + _nonce(number) + header)

    def _next(self, keys: Iterator[tuple[ChaCha20Poly1305, int]]) -> tuple[ChaCha20Poly1305, int]:
        """Return the next key and number, which another thread may have dropped meanwhile."""
        taken = next(keys, None)
        if taken is None:
            raise ChannelError(f"the channel has ended: {self._ended}")
        return taken

    def _check_process(self) -> None:
        """Raise `ChannelError` in a fork, before a lock that the parent may have held then."""
        if os.getpid() != self._process:
            raise ChannelError("a channel cannot be used in a fork of its process; connect anew")

    def _check_usable(self) -> None:
        if self._ended:
            raise ChannelError(f"the channel has ended: {self._ended}")
        if self._clock() >= self._expires_s:
            self._refuse("the session has expired; connect anew")

    def _refuse(self, reason: str) -> NoReturn:
        """End the session, drop its keys, and raise."""
        self._ended = reason
        self._receive_keys = iter(())
        self._send_keys = iter(())
        raise ChannelError(reason)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ChannelError("a channel cannot be copied or pickled: a nonce would be used twice")


def _keys(secret: bytes, frames_per_key: int) -> Iterator[tuple[ChaCha20Poly1305, int]]:
    """Yield key and number of each frame of a direction; a generator cannot be copied or set back.

    `secret` has 32 bytes.
    """
    number = 0
    while True:
        key = ChaCha20Poly1305(expand(secret, b"key"))
        for _ in range(frames_per_key):
            yield key, number
            number += 1

        secret = expand(secret, b"next")


def expand(secret: bytes, label: bytes) -> bytes:
    """Return 32 bytes for one purpose from a secret (HKDF-Expand of RFC 5869 with SHA-256)."""
    info = b"fluvial channel %d " % VERSION + label
    return HKDFExpand(hashes.SHA256(), KEY_BYTES, info).derive(secret)


def _nonce(number: int) -> bytes:
    """Return the number of a frame as a nonce of 96 bits."""
    return number.to_bytes(12, "big")


def _check_header(header: bytes) -> None:
    if len(header) > MAX_HEADER_BYTES:
        raise ChannelError(f"header of {len(header)} bytes; at most {MAX_HEADER_BYTES}")
