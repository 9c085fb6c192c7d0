"""Messages of the live stream as chunks, each with a header that is checked before more is read.

A turn and its answer have any size up to the limits of payloads. Chunks bound the memory that a
peer can take: it is what has arrived, never what was announced. All chunks of a message but the
last are full, so a message has one form only.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from fluvial.errors import WireError

CHUNK = 2**20
"""Bytes of a message in one chunk."""
_HEADER = struct.Struct(">BIQ")
"""Kind, number of the turn, and bytes of the whole message; of a welcome, the first turn that is
wanted."""
MAX_CHUNK = _HEADER.size + CHUNK
"""Upper bound on one gRPC message, in bytes."""
_WELCOME = 1
_DATA = 2
MAX_TURN = 2**32 - 1
"""Largest number of a turn."""


@dataclass(frozen=True)
class Welcome:
    """First message of the server on a connection."""

    turn: int
    """Number of the turn that the site has announced."""
    wanted: int
    """Number of the first turn that the server lacks, from which the site sends."""

    def to_bytes(self) -> bytes:
        """Return the welcome as one chunk."""
        return _HEADER.pack(_WELCOME, self.turn, self.wanted)

    @classmethod
    def from_bytes(cls, chunk: bytes) -> "Welcome":
        """Return a welcome from outside; raise `WireError`."""
        if len(chunk) != _HEADER.size:
            raise WireError(f"stream: a welcome of {len(chunk)} bytes, expected {_HEADER.size}")

        kind, turn, wanted = _HEADER.unpack(chunk)
        if kind != _WELCOME or wanted < turn:
            raise WireError(f"stream: kind {kind} with value {wanted}, expected a welcome")

        return cls(turn, wanted)


def cut(turn: int, message: bytes) -> Iterator[bytes]:
    """Yield the chunks of a message, which is not empty."""
    assert message, "no turn is empty"
    header = _HEADER.pack(_DATA, turn, len(message))
    for start in range(0, len(message), CHUNK):
        yield header + message[start : start + CHUNK]


def join(chunks: Iterator[bytes], *, turn: int, max_bytes: int) -> bytes | None:
    """Return the message of `turn` from its chunks, None where the peer ends before the last.

    Raises `WireError` for another turn, a size beyond `max_bytes`, and chunks that do not fit.
    """
    pieces: list[memoryview] = []
    arrived = 0
    size = 0

    for chunk in chunks:
        piece, announced = _open(chunk, turn)
        if not pieces:
            size = announced
            if not 0 < size <= max_bytes:
                raise WireError(
                    f"stream: turn {turn} announces {size} bytes, allowed are 1 to {max_bytes}"
                )

        if announced != size or len(piece) != min(CHUNK, size - arrived):
            raise WireError(
                f"stream: turn {turn} of {size} bytes has a chunk of {len(piece)} after {arrived} "
                f"bytes, which announces {announced}"
            )

        pieces.append(piece)
        arrived += len(piece)
        if arrived == size:
            return b"".join(pieces)

    return None


def _open(chunk: bytes, turn: int) -> tuple[memoryview, int]:
    """Return the content of a chunk and the announced size of its message."""
    if len(chunk) < _HEADER.size:
        raise WireError(f"stream: a chunk of {len(chunk)} bytes is shorter than its header")

    kind, number, size = _HEADER.unpack_from(chunk)
    if kind != _DATA:
        raise WireError(f"stream: a chunk of kind {kind}, expected {_DATA}")
    if number != turn:
        raise WireError(f"stream: a chunk of turn {number}, expected turn {turn}")

    return memoryview(chunk)[_HEADER.size :], size
