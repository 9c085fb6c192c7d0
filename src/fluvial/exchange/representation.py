"""Forms of what a site codes: its update, or its whole adapter."""

from typing import Literal

from fluvial.wire.tensors import Named, add, subtract

Representation = Literal["delta", "state"]
"""Form of what is coded: the update, or the whole adapter."""


def coded_object(received: Named, update: Named, representation: Representation) -> Named:
    """Return the object that a site codes: its update, or its whole adapter."""
    return update if representation == "delta" else add(update, received)


def innovation(received: Named, decoded: Named, representation: Representation) -> Named:
    """Return the difference to the received adapter, from a decoded object."""
    return decoded if representation == "delta" else subtract(decoded, received)
