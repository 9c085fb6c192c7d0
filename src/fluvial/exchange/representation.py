"""Forms of what a site codes: its update, or its whole adapter."""

from typing import Literal

from fluvial.wire.tensors import Named, add, subtract

Representation = Literal["delta", "state"]


def coded_object(snapshot_received: Named, update: Named, representation: Representation) -> Named:
    """What a site codes: its update, or its whole adapter."""
    return update if representation == "delta" else add(snapshot_received, update)


def innovation(received: Named, decoded: Named, representation: Representation) -> Named:
    """What a decoded object says about the difference to the received adapter."""
    return decoded if representation == "delta" else subtract(decoded, received)
