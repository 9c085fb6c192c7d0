"""A payload as one Flower message: one packed array with our own type, and a flat header.

Flower sends every array as requests of its own, and reads numpy's or torch's arrays with numpy; one array of bytes with
a type that it does not know is the cheapest, and nobody unpickles it.
"""

from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fluvial.errors import WireError

STYPE = "fluvial.payload.2"


def pack(data: bytes, header: dict[str, Any]) -> RecordDict:
    """The content of a message."""
    array = Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
    return RecordDict({"payload": ArrayRecord({"p": array}), "header": ConfigRecord(header)})


def unpack(message: Message, *, max_bytes: int) -> tuple[bytes, dict[str, Any]]:
    """Payload and header of a message from outside; raises `WireError`."""
    arrays, header = message.content.get("payload"), message.content.get("header")
    if not isinstance(arrays, ArrayRecord) or not isinstance(header, ConfigRecord) or set(arrays) != {"p"}:
        raise WireError("message: expected one array 'p' and a header; is the other side a Fluvial of this version?")
    array = arrays["p"]
    if array.stype != STYPE or array.dtype != "uint8":
        raise WireError(f"message: an array of type {array.stype!r:.40}, expected {STYPE!r}")
    if len(array.data) > max_bytes:
        raise WireError(f"message of {len(array.data)} bytes exceeds the limit of {max_bytes}")
    return array.data, dict(header)
