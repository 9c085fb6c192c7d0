"""Messages of sites to a server half: turns in the middle of a task, replies at its end."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fluvial.wire.payload import Payload

H = TypeVar("H")
T = TypeVar("T")


@dataclass(frozen=True)
class Reply(Generic[T]):
    """The last answer of one site, read and checked."""

    site: str
    content: T
    bytes_down: int
    """Bytes of the messages to the site in this attempt."""
    bytes_up: int
    """Bytes of its answers."""
    seconds: float
    """Seconds from the first message to the last answer."""


@dataclass(frozen=True)
class Turn(Generic[H]):
    """Message of a site in the middle of its task, for which it will wait for an answer."""

    site: str
    content: H
    answer: Callable[[Payload], None]
    """Sends the site its answer, once, after those to its earlier turns; it is serialised in this
    call."""
    fail: Callable[[str], None]
    """Ends the exchange in the place of an answer: a failure of the site, with this reason; raises
    `ClientError` under on_failure="stop"."""


@dataclass(frozen=True)
class Idle:
    """All sites that are left wait for answers to their turns, or the time of a wake-up has
    come."""

    sites: tuple[str, ...]
    """Sites that wait."""
    working: tuple[str, ...]
    """Sites whose message is awaited; none where all wait."""
    leave_out: Callable[[str, str], None] = field(compare=False)
    """Ends the exchange of a site, whether it waits or not: its failure, with this reason, after
    which it is not asked again; raises `ClientError` under on_failure="stop"."""
