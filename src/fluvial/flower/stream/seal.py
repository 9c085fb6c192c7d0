"""The place where the bytes of turns are encrypted and decrypted at the end of a session."""

from typing import Protocol


class Seal(Protocol):
    """Encryption of the messages of one session at one end.

    Every message passes `seal` once at its sender and `open` once at its receiver, in order; what
    is sent again after a lost connection are the sealed bytes.
    """

    overhead: int
    """Bytes that `seal` adds at most."""

    def seal(self, message: bytes) -> bytes:
        """Return a message as it travels."""
        ...

    def open(self, sealed: bytes) -> bytes:
        """Invert `seal` of the other end; raise `WireError`."""
        ...


class Transparent:
    """A `Seal` that changes nothing: the stream's TLS protects the turns."""

    overhead = 0

    def seal(self, message: bytes) -> bytes:
        """Return the message itself."""
        return message

    def open(self, sealed: bytes) -> bytes:
        """Return the message itself."""
        return sealed
