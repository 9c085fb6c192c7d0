"""The frame around every coded update, and how one is read without trusting it.

offset bytes what 0 1 format version 1 1 codec code 2 2 round, modulo 2^16 (little endian, as
everything) 4 4 fingerprint of what both ends must agree on: the layout, or the published part of a
learned codec 8 n body, the codec's own 8 + n 4 CRC-32 of all before
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from fluvial.errors import WireError

VERSION = 2
OVERHEAD = 12
"""Bytes of a frame that are not body."""

_ROUNDS = 1 << 16
_HEAD = struct.Struct("<BBHI")
_CHECK = struct.Struct("<I")


def seal(code: int, fingerprint: int, body: bytes, *, round: int = 0) -> bytes:
    """Return a frame around `body`."""
    head = _HEAD.pack(VERSION, code, round % _ROUNDS, fingerprint)
    return b"".join([head, body, _CHECK.pack(zlib.crc32(body, zlib.crc32(head)))])


def unseal(wire: bytes, code: int, fingerprint: int, *, round: int | None = None) -> "Reader":
    """Return a reader of the body; raises `WireError` if the frame is damaged, or of another codec,
    layout or round."""
    if len(wire) < OVERHEAD:
        raise WireError(
            f"frame of {len(wire)} bytes is shorter than its {OVERHEAD} bytes of header"
        )

    whole = memoryview(wire)  # parts of it are no copies
    version, found, sent, layout = _HEAD.unpack_from(wire)
    if zlib.crc32(whole[: -_CHECK.size]) != _CHECK.unpack(whole[-_CHECK.size :])[0]:
        raise WireError("frame: checksum does not match; it was damaged on the way")
    if version != VERSION:
        raise WireError(
            f"frame: format version {version}, this build reads {VERSION}; use the same fluvial "
            "on both ends"
        )

    if found != code:
        raise WireError(
            f"frame: codec code {found}, expected {code}; both ends need the same codec settings"
        )

    if layout != fingerprint:
        raise WireError(
            "frame: made for other tensor names or shapes, or with another published transform; "
            "both ends need the "
            "same model, lora settings and codec"
        )

    if round is not None and sent != round % _ROUNDS:
        raise WireError(
            f"frame: of round {sent}, expected round {round % _ROUNDS}; an old message was sent "
            "again"
        )

    return Reader(whole[_HEAD.size : -_CHECK.size])


class Reader:
    """Reads a body from front to back; every read is checked against what is left."""

    def __init__(self, body: bytes | memoryview) -> None:
        self._body = memoryview(body)
        self._position = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._body) - self._position

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes; a copy."""
        return bytes(self._next(count))

    def number(self, form: str) -> int | float:
        """Return one little-endian number in `struct` notation, such as "I" or "f"."""
        (value,) = struct.unpack("<" + form, self._next(struct.calcsize("<" + form)))
        assert isinstance(value, int | float)
        return value

    def array(self, dtype: str, count: int) -> NDArray[np.generic]:
        """Return `count` little-endian items of a NumPy `dtype` such as "u2"; a copy."""
        kind = np.dtype("<" + dtype)
        if count < 0:
            raise WireError(f"frame: negative count {count}")
        return np.frombuffer(self._next(count * kind.itemsize), dtype=kind).copy()

    def _next(self, count: int) -> memoryview:
        """Return the next `count` bytes, without a copy."""
        if not 0 <= count <= self.left:
            raise WireError(f"frame: {count} bytes wanted, {self.left} left")
        self._position += count
        return self._body[self._position - count : self._position]

    def finish(self) -> None:
        """Raise `WireError` unless everything was read."""
        if self.left:
            raise WireError(f"frame: {self.left} bytes too many")
