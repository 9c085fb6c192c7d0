"""The interface below `Fleet`: a transport sends requests to sites and returns their answers.

Deadlines, retries, quorums and counts of bytes belong to the fleet, not to a transport. A transport
carries bytes only, so a site sees nothing but the content of its messages and of its own store.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fluvial.wire.payload import Value


@dataclass(eq=False, slots=True)
class Request:
    """One message to one site."""

    number: int
    """Number of the exchange, unique within a fleet; every message of one attempt at one site has
    the same."""
    turn: int
    """Place of the message in its exchange, from 0; from 1 on it answers what the site said."""
    site: str
    task: str
    round: int
    data: bytes
    """Payload, serialised."""
    window: int = 0
    """Turns without an answer that the site may have at a time; 0 where it must reply at once."""
    sent_s: float = math.inf
    """Time at which the message left, on the fleet's clock; the fleet counts its deadline from
    here. A transport that holds a message back sets it to infinity until then."""


@dataclass(eq=False, slots=True)
class Arrival:
    """Result of a request: an answer, or the reason why there is none."""

    number: int
    """Number of the exchange."""
    data: bytes
    """Payload of the answer, or the text in which the site reported its error."""
    problem: str = ""
    """Reason of the failure in one line; empty where `data` is an answer."""
    final: bool = True
    """False in the middle of a conversation: `data` is a turn, or empty where the site, which went
    on after its last turn, now waits."""
    goes_on: bool = False
    """True for a turn after which the site works on before it waits for an answer; a transport
    whose slots are as many as its sites need not tell."""
    times: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the site reports of its work, by part (see `times`); none where it does not."""


class Transport(Protocol):
    """A way to the sites."""

    sites: tuple[str, ...]
    """Names of all sites."""
    slots: int
    """Number of sites that may work at a time."""

    def send(self, request: Request) -> None:
        """Carry a message to its site; problems come back as an `Arrival`."""
        ...

    def next(self, timeout_s: float | None) -> Arrival | None:
        """Wait for what comes next, from whichever site.

        Returns None after `timeout_s` seconds, or earlier when a message that was held back has
        left.
        """
        ...

    def accept(self, arrival: Arrival) -> None:
        """End an exchange whose last answer counts: the site keeps what this answer wanted to
        keep."""
        ...

    def drop(self, request: Request) -> None:
        """End an exchange that does not count; what still comes of it is ignored."""
        ...

    def error_log(self, site: str) -> Path | None:
        """Return the file with the whole errors of a site, where it is on this machine."""
        ...

    def close(self) -> None:
        """End: nothing is sent any more, and no site of this process works on."""
        ...

    def state(self) -> dict[str, Value]:
        """Return what a checkpoint must keep of the transport."""
        ...

    def restore(self, state: dict[str, Any], round: int) -> None:
        """Go on from a checkpoint of `round`, -1 for none; sites forget what they kept after it.

        Raises `ConfigError` for the state of another transport.
        """
        ...
