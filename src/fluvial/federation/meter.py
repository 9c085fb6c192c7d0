"""Bytes of the messages between server and sites, counted as they were sent, and the sites that
answered."""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal

Kind = tuple[Literal["up", "down"], str]
"""Direction and task of a message."""
MEASURING = "evaluate"
"""The task of measuring. Its bytes are counted apart, since they are no part of a method."""
AUDIT = "leakage"
"""The task of an audit of what a server could read; counted apart too."""
SAMPLING = "sample"
"""The task in which a text is continued for people at a run's end; counted apart too."""
APART = frozenset({MEASURING, AUDIT, SAMPLING})
"""The tasks whose bytes are no part of a method."""


@dataclass
class Meter:
    """Bytes of serialised messages: totals, and the current round site by site."""

    totals: dict[Kind, int] = field(default_factory=dict)
    """Bytes since the run began, by direction and task."""
    current: dict[str, dict[Kind, int]] = field(default_factory=dict)
    """Bytes since the last `close_round`, by site."""
    answered: set[tuple[str, str]] = field(default_factory=set)
    """Sites and tasks of the answers that could be read since the last `close_round`."""

    def count(self, site: str, kind: Kind, size: int) -> None:
        """Add one message of `size` bytes."""
        for counts in (self.totals, self.current.setdefault(site, {})):
            counts[kind] = counts.get(kind, 0) + size

    def num_answered(self, *, beside: Container[str]) -> int:
        """Return the number of sites that have answered since the last `close_round`, where answers
        to the tasks `beside` do not count."""
        return len({site for site, task in self.answered if task not in beside})

    def close_round(self) -> dict[str, dict[Kind, int]]:
        """Return the bytes by site since the last call; only the totals are kept, so memory does
        not grow with rounds."""
        closed = self.current
        self.current = {}
        self.answered = set()
        return closed
