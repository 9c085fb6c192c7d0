"""A payload as one Flower message: a flat header, with the payload in it or beside it.

Flower moves every record, every array and every chunk of an array by a request of its own, each
with its hash in the requests around it. A small payload travels in the header, which is three
objects for a message. A larger one is an array of bytes with a type that is unknown to Flower, so
that no program unpickles it: six objects, and more above 5 MB. The SuperLink then stores a payload
for many sites once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fluvial.errors import ClientError, UnfitSiteError, WireError
from fluvial.federation.failures import reason_of
from fluvial.federation.times import read_list

STYPE = "fluvial.wire.payload.2"
SMALL = 2**18
"""Largest payload, in bytes, that travels in the header."""
_PAYLOAD = "payload"


def pack(data: bytes, header: dict[str, Any]) -> RecordDict:
    """Return the content of a message."""
    if len(data) <= SMALL:
        return RecordDict({"header": ConfigRecord({**header, _PAYLOAD: data})})
    array = Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
    return RecordDict({_PAYLOAD: ArrayRecord({"p": array}), "header": ConfigRecord(header)})


def size_of(content: RecordDict) -> int:
    """Return the bytes of the payload in the content of a message, 0 without one."""
    beside = content.get(_PAYLOAD)
    if isinstance(beside, ArrayRecord):
        return sum(len(array.data) for array in beside.values())
    header = content.get("header")
    payload = header.get(_PAYLOAD) if isinstance(header, ConfigRecord) else None
    return len(payload) if isinstance(payload, bytes) else 0


def unpack(message: Message, *, max_bytes: int) -> tuple[bytes, dict[str, Any]]:
    """Return payload and header of a message from outside; raise `WireError`."""
    record = message.content.get("header")
    if not isinstance(record, ConfigRecord):
        raise WireError("message: expected a header; is the sender a Fluvial of this version?")

    header = dict(record)
    data = _array(message) if _PAYLOAD in message.content else header.pop(_PAYLOAD, None)
    if not isinstance(data, bytes):
        raise WireError(
            "message: expected a payload of bytes; is the sender a Fluvial of this version?"
        )

    if len(data) > max_bytes:
        raise WireError(f"message of {len(data)} bytes exceeds the limit of {max_bytes}")

    return data, header


def _array(message: Message) -> bytes:
    arrays = message.content[_PAYLOAD]
    if not isinstance(arrays, ArrayRecord) or set(arrays) != {"p"}:
        raise WireError("message: expected one array 'p'; is the sender a Fluvial of this version?")

    array = arrays["p"]
    if array.stype != STYPE or array.dtype != "uint8":
        raise WireError(f"message: an array of type {array.stype!r:.40}, expected {STYPE!r}")

    return bytes(array.data)


@dataclass(frozen=True)
class Opened:
    """Content of a reply."""

    data: bytes
    """Payload, serialised."""
    kept: bool
    """True where the site keeps something that a later message needs."""
    times: Mapping[str, float]
    """Seconds that the site reports of its work, by part."""


def open_reply(reply: Message, *, max_bytes: int) -> Opened:
    """Return what a reply holds.

    Raises `ClientError` with the site's own text, or Flower's, if the site failed, `UnfitSiteError`
    where it refused, and `WireError`.
    """
    if reply.has_error():
        raise ClientError(flower_error(reply))

    data, header = unpack(reply, max_bytes=max_bytes)
    error = header.get("error")
    if not isinstance(error, str):
        raise WireError(f"header: error={error!r:.40}, expected text")
    if error:
        kind = UnfitSiteError if header.get("refuses") is True else ClientError
        raise kind(error[:4000])

    return Opened(data, header.get("kept") is True, read_list(header.get("times")))


def flower_error(reply: Message) -> str:
    """Return the reason that Flower gives in place of a site's reply, in one line."""
    return reason_of(f"Flower's error {reply.error.code}: {reply.error.reason}")
