"""Bytes of the messages between server and sites, counted as they were sent."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from fluvial.federation.fleet import Failure, Fleet, Reply
from fluvial.wire.payload import Payload, Value

T = TypeVar("T")


Kind = tuple[Literal["up", "down"], str]
"""Direction and task of a message."""


@dataclass
class Meter:
    """Bytes of serialised messages: totals, and the current round site by site."""

    totals: dict[Kind, int] = field(default_factory=dict)
    current: dict[str, dict[Kind, int]] = field(default_factory=dict)

    def count(self, site: str, kind: Kind, size: int) -> None:
        """Add one message."""
        for table in (self.totals, self.current.setdefault(site, {})):
            table[kind] = table.get(kind, 0) + size

    def close_round(self) -> dict[str, dict[Kind, int]]:
        """Bytes by site since the last call; only the totals are kept, so memory does not grow with
        rounds."""
        closed = self.current
        self.current = {}
        return closed


class Metered:
    """A fleet that counts the bytes of another, messages to sites that failed included."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self.meter = fleet, Meter()
        self.sites = fleet.sites
        self.failures = fleet.failures
        self.config = fleet.config

    def ask(
        self,
        task: str,
        messages: Mapping[str, Payload],
        *,
        round: int,
        read: Callable[[str, Payload], T],
        alone: bool = True,
    ) -> Iterator[Reply[T]]:
        """See `Fleet`."""
        known = len(self.failures)
        try:
            for reply in self._fleet.ask(task, messages, round=round, read=read, alone=alone):
                self.meter.count(reply.site, ("down", task), reply.bytes_down)
                self.meter.count(reply.site, ("up", task), reply.bytes_up)
                yield reply
        finally:
            for failure in self.failures[known:]:
                self.meter.count(failure.site, ("down", task), failure.bytes_down)
                if failure.bytes_up:
                    self.meter.count(failure.site, ("up", task), failure.bytes_up)

    def require_quorum(self, task: str, round: int, *, answered: int, asked: int) -> None:
        """See `Fleet`."""
        self._fleet.require_quorum(task, round, answered=answered, asked=asked)

    def reject(self, failure: Failure) -> None:
        """See `Fleet`; the bytes of the answer were counted when it came."""
        self._fleet.reject(failure)

    def state(self) -> dict[str, Value]:
        """See `Fleet`."""
        return self._fleet.state()

    def restore(self, state: dict[str, Any], round: int) -> None:
        """See `Fleet`."""
        self._fleet.restore(state, round)
