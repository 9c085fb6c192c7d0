"""The place where the bytes of turns are encrypted and decrypted at the end of a session.

A sealed session begins with one turn for the handshake of `wire.channel`; the site's last message
of it comes in front of the first sealed turn. A message is sealed in pieces of 64 KB, each of which
is bound to the size of the whole, so that none can be left out.
"""

import hashlib
import struct
from typing import Protocol

from fluvial.errors import ChannelError
from fluvial.wire.channel import ServerHandshake, Session, SiteHandshake, Terms

PIECE = 2**16
"""Bytes of a message that are sealed at a time; larger pieces are slower (see `wire.channel`)."""
MOST_HANDSHAKE = 2**12
"""Upper bound on a message of the handshake, in bytes."""
_SIZE = struct.Struct(">Q")
_FINISH = struct.Struct(">H")


class Seal(Protocol):
    """Encryption of the messages of one session at one end.

    Every message passes `seal` once at its sender and `open` once at its receiver, in order; what
    is sent again after a lost connection are the sealed bytes.
    """

    def overhead(self, size: int) -> int:
        """Return the bytes that `seal` adds at most to a message of `size` bytes."""
        ...

    def seal(self, message: bytes) -> bytes:
        """Return a message as it travels."""
        ...

    def open(self, sealed: bytes) -> bytes:
        """Invert `seal` of the other end; raise `WireError`."""
        ...


class Transparent:
    """A `Seal` that changes nothing: the stream's TLS protects the turns."""

    def overhead(self, size: int) -> int:  # noqa: ARG002
        """Return 0."""
        return 0

    def seal(self, message: bytes) -> bytes:
        """Return the message itself."""
        return message

    def open(self, sealed: bytes) -> bytes:
        """Return the message itself."""
        return sealed


class _Sealed:
    """Common base of both ends of a sealed session."""

    _session: Session | None = None

    def overhead(self, size: int) -> int:
        """Return the tags of all pieces, and the room of a handshake's message."""
        return (size // PIECE + 1) * Session.overhead + MOST_HANDSHAKE

    def seal(self, message: bytes) -> bytes:
        """Return a message as it travels."""
        session = self._established()
        view = memoryview(message)
        header = _SIZE.pack(len(message))
        return b"".join(
            session.seal(view[start : start + PIECE], header)
            for start in range(0, len(message), PIECE)
        )

    def open(self, sealed: bytes) -> bytes:
        """Invert `seal` of the other end; raise `ChannelError`."""
        session = self._established()
        view = memoryview(sealed)
        step = PIECE + Session.overhead
        pieces = -(-len(view) // step)
        header = _SIZE.pack(max(0, len(view) - pieces * Session.overhead))
        return b"".join(
            session.open(view[start : start + step], header) for start in range(0, len(view), step)
        )

    def _established(self) -> Session:
        if self._session is None:
            raise ChannelError("the channel's handshake is not over")
        return self._session


class SiteSeal(_Sealed):
    """The site's end: `hello`, then `greeted`, then turns."""

    def __init__(self, handshake: SiteHandshake) -> None:
        self._handshake = handshake
        self._finish = b""
        """Last message of the handshake, until it was sent."""

    @property
    def established(self) -> bool:
        """True where the handshake is over."""
        return self._session is not None

    def hello(self) -> bytes:
        """Return the first turn."""
        return self._handshake.hello()

    def greeted(self, answer: bytes) -> None:
        """Read the answer to `hello`; raises `ChannelError`."""
        finish, self._session = self._handshake.finish(answer)
        self._finish = _FINISH.pack(len(finish)) + finish

    def seal(self, message: bytes) -> bytes:
        """Return a message as it travels, the first one behind the end of the handshake."""
        finish, self._finish = self._finish, b""
        return finish + super().seal(message)


class ServerSeal(_Sealed):
    """The server's end: `greet`, then turns."""

    def __init__(self, handshake: ServerHandshake, site: str) -> None:
        """Expect `site`, and no other that has a pinned key."""
        self._handshake = handshake
        self._site = site
        self._greeted = False

    @property
    def greeted(self) -> bool:
        """True where the first turn was answered."""
        return self._greeted

    def greet(self, hello: bytes) -> bytes:
        """Return the answer to the first turn; raises `ChannelError`."""
        self._greeted = True
        return self._handshake.answer(hello)

    def open(self, sealed: bytes) -> bytes:
        """Invert `seal` of the site, whose first message ends the handshake."""
        if self._session is not None:
            return super().open(sealed)

        size = _FINISH.unpack_from(sealed)[0] if len(sealed) >= _FINISH.size else 0
        end = _FINISH.size + size
        session = self._handshake.finish(sealed[_FINISH.size : end])
        if session.peer != self._site:
            raise ChannelError(f"site {session.peer!r} has answered in the place of {self._site!r}")

        self._session = session
        return super().open(sealed[end:])


def terms_of(run: str, token: bytes) -> Terms:
    """Return the terms of a session: the run's name, hashed for its length, and the token."""
    return Terms(hashlib.sha256(run.encode()).hexdigest(), token)
