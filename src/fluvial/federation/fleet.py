"""The one call between server and sites, and what happens when a site does not answer."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from pydantic import Field

from fluvial.data.site_names import fault_of
from fluvial.errors import ClientError
from fluvial.federation.line import Line
from fluvial.settings import Settings
from fluvial.wire.payload import Payload, Value

logger = logging.getLogger(__name__)


class FleetConfig(Settings):
    """How sites are asked, and what happens when one does not answer."""

    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Sites that work at the same time; "auto" is one for each core on a CPU and one on a GPU."""
    threads: int = Field(1, ge=1, le=256)
    """Threads for the tensor operations of one site, and of the server; fixed, so that results do
    not depend on `workers`."""
    sites: tuple[str, ...] = ()
    """Names of the sites that a deployed run waits for; where this is empty, those of data that all
    sites can read."""
    join_timeout_s: float = Field(120.0, ge=0.01, le=10**7)
    """A deployed run waits this long for its sites to join."""
    line: Line | None = None
    """What `fluvial check` predicts the time of a round from; a run does not ask for it."""
    deadline_s: float | None = Field(None, ge=0.001, le=10**7)
    """A site that has not answered this long after it was asked has failed."""
    on_failure: Literal["stop", "skip", "retry"] = "stop"
    """Of a site: stop the run, go on without it in this round, or ask it again first."""
    retries: int = Field(2, ge=1, le=100)
    """Further attempts under on_failure="retry"; a site that fails them all is skipped."""
    quorum: float = Field(0.5, gt=0, le=1)
    """Share of the asked sites that must have answered, or the run stops."""
    max_update_growth: float = Field(10.0, gt=1, le=10**9)
    """An update this many times longer than the median of its round, of three replies or more, is
    the site's failure. (Ours: 1.03 among quickstart's eight sites.)"""
    max_weight_share: float = Field(0.9, ge=0.5, le=1)
    """Share of a round's weight that one site counts with at most; the round's record names a site
    that has more. (Ours: 1 believes every site's own count of its records.)"""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        fields = type(self).model_fields
        yield from (f"sites: {fault}" for fault in map(fault_of, self.sites) if fault is not None)

        if self.on_failure == "stop" and self.quorum != fields["quorum"].default:
            yield "quorum: without effect under on_failure='stop'; set on_failure='skip' or 'retry'"
        if self.on_failure != "retry" and self.retries != fields["retries"].default:
            yield "retries: without effect unless on_failure='retry'"


T = TypeVar("T")


@dataclass(frozen=True)
class Reply(Generic[T]):
    """What one site answered, read and checked."""

    site: str
    content: T
    bytes_down: int
    bytes_up: int
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A site that raised or stayed silent, and what is known about it."""

    site: str
    round: int
    task: str
    reason: str
    bytes_down: int
    """Of the message that was in vain."""
    bytes_up: int = 0
    """Bytes of the text in which the site told its error, or of the answer that was refused."""

    def __post_init__(self) -> None:
        """Put words in the place of a reason without any, as a site may send it."""
        if not self.reason.strip():
            object.__setattr__(self, "reason", "it gave no reason")


class Fleet(Protocol):
    """Everything a method knows of the sites."""

    sites: tuple[str, ...]
    failures: list[Failure]
    config: FleetConfig

    def ask(
        self,
        task: str,
        messages: Mapping[str, Payload],
        *,
        round: int,
        read: Callable[[str, Payload], T],
        alone: bool = True,
    ) -> Iterator[Reply[T]]:
        """Send each named site its message and yield the replies as they come.

        `read(site, payload)` checks and decodes a reply; where it raises, the site has failed, as if it had not
        answered. Raises `ClientError` when the policy says so, or after all replies were yielded
        when the quorum is missed; that is left to the caller (see `require_quorum`) where this call
        is not `alone` but one of several that make a round.
        """
        ...

    def require_quorum(self, task: str, round: int, *, answered: int, asked: int) -> None:
        """Raise `ClientError` if fewer sites answered than the policy asks for."""
        ...

    def reject(self, failure: Failure) -> None:
        """Note that an answer does not count after all; raises `ClientError` under
        on_failure="stop"."""
        ...

    def state(self) -> dict[str, Value]:
        """What a checkpoint must keep of the fleet."""
        ...

    def restore(self, state: dict[str, Any], round: int) -> None:
        """Go on from a checkpoint of `round`, -1 for none; sites forget what they kept after it."""
        ...


def sample(sites: Sequence[str], fraction: float, *, seed: int, round: int) -> list[str]:
    """The cohort of a round, counted from 1: max(int(fraction * N), 1) sites without replacement.

    `numpy.random.RandomState(seed + round - 1)`; with seed 0 these are Shepherd's, which counts
    from 0.
    """
    count = cohort_size(fraction, len(sites))
    chosen = np.random.RandomState((seed + round - 1) % 2**32).choice(
        len(sites), count, replace=False
    )

    return [sites[index] for index in sorted(chosen)]


def cohort_size(fraction: float, sites: int) -> int:
    """Return the number of sites in a round, of all `sites`."""
    return max(int(fraction * sites), 1)


class Wires:
    """Messages by site, as bytes; one that goes to many sites is serialised once, when it is first
    sent."""

    def __init__(self, messages: Mapping[str, Payload]) -> None:
        self._messages = messages
        self._made: dict[int, bytes] = {}

    def __getitem__(self, site: str) -> bytes:
        message = self._messages[site]
        if id(message) not in self._made:
            self._made[id(message)] = message.to_bytes()
        return self._made[id(message)]


def unreadable(problem: Exception) -> str:
    """Return one line on a reply that could not be read, without control characters."""
    return printable(f"{type(problem).__name__}: {problem}")


def printable(text: str) -> str:
    """Return a text from outside in one line of at most 1000 characters, none of which could drive
    a terminal."""
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else "\ufffd" for character in line)[:1000]


class Policy:
    """What every fleet does when a site does not answer."""

    def __init__(self, config: FleetConfig) -> None:
        self.failures: list[Failure] = []
        self.config = config

    def failed(self, failure: Failure, attempt: int) -> bool:
        """Note a failure; whether the site is to be asked again. Raises `ClientError` under
        on_failure="stop"."""
        self.failures.append(failure)
        where = (
            f"round {failure.round}, {failure.task}: site {failure.site!r} failed: {failure.reason}"
        )

        if self.config.on_failure == "stop":
            raise ClientError(where)

        again = self.config.on_failure == "retry" and attempt <= self.config.retries
        logger.warning("%s (%s)", where, "asked again" if again else "skipped")
        return again

    def reject(self, failure: Failure) -> None:
        """See `Fleet`; the site is not asked again, because its answer was read and counted."""
        self.failed(failure, self.config.retries + 1)

    def require_quorum(self, task: str, round: int, *, answered: int, asked: int) -> None:
        """See `Fleet`."""
        if answered < self.config.quorum * asked and self.config.on_failure != "stop":
            missing = sorted({failure.site for failure in self.failures if failure.round == round})
            raise ClientError(
                f"round {round}, {task}: {answered} of {asked} sites answered, fleet.quorum="
                f"{self.config.quorum} needs {self.config.quorum * asked:g}; missing: "
                f"{', '.join(missing)}. "
                f"Last problem: {self.failures[-1].reason}"
            )
