"""The fleet: what the server asks of the sites, and what happens when one does not answer.

Retry, deadline, quorum, the count of bytes and the reading of answers are here, once for every
transport. `ask` sends messages and yields the replies; `converse` does the same for tasks that
exchange more than one message with the server.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Never, TypeVar, cast

from fluvial.errors import ClientError, ConfigError
from fluvial.federation.calls import Call
from fluvial.federation.config import FleetConfig
from fluvial.federation.dispatch import Dispatcher
from fluvial.federation.failures import Failure
from fluvial.federation.meter import Kind, Meter
from fluvial.federation.times import RoundTimes
from fluvial.federation.transport import Transport
from fluvial.federation.turns import Idle, Reply, Turn
from fluvial.wire.payload import Limits, Payload, Value

logger = logging.getLogger(__name__)

H = TypeVar("H")
T = TypeVar("T")


def _nothing(_site: str) -> None:
    """Do nothing where a conversation begins."""


def _never(_working: Mapping[str, float]) -> float:
    """Ask for no wake-up."""
    return math.inf


class Fleet:
    """Everything that a method knows of the sites."""

    def __init__(
        self,
        transport: Transport,
        config: FleetConfig | None = None,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limits` bounds what is read of a site; `clock` gives seconds, the transport's own in a
        test."""
        self.transport = transport
        self.sites = transport.sites
        self.config = config or FleetConfig()
        self.clock = clock
        self.meter = Meter()
        self.times = RoundTimes()
        self.failures: list[Failure] = []
        self.answers_level = logging.INFO
        """Level of the message about each answer."""
        self._limits = limits or Limits()
        self._dispatcher = Dispatcher(transport, clock, self.config.deadline_s)

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

        `read(site, payload)` checks and decodes a reply; where it raises, the site has failed, as
        if it had not answered. Raises `ClientError` when the policy says so, or after all replies
        were yielded when the quorum is missed; that is left to the caller (see `require_quorum`)
        where this call is not `alone` but one of several that make a round.
        """
        replies: Iterator[Turn[Never] | Reply[T] | Idle] = self.converse(
            task, messages, round=round, hear=None, read=read, alone=alone
        )
        yield from cast(Iterator[Reply[T]], replies)  # a turn is the site's failure

    def converse(
        self,
        task: str,
        messages: Mapping[str, Payload],
        *,
        round: int,
        hear: Callable[[str, Payload], H] | None,
        read: Callable[[str, Payload], T],
        alone: bool = True,
        window: int = 1,
        began: Callable[[str], None] = _nothing,
        wake_s: Callable[[Mapping[str, float]], float] = _never,
    ) -> Iterator[Turn[H] | Reply[T] | Idle]:
        """Begin a conversation with each named site; yield its turns, and at its end the reply.

        `hear(site, payload)` reads a turn, which the caller answers by `turn.answer(payload)`, at
        once or after other turns, in any order; None expects no turn, as in `ask`. `Idle` comes
        where all sites that are left wait for such answers. Each turn has the deadline of its own;
        a failure in any turn is that site's, and a retry begins its task again. All else is as in
        `ask`.

        A site may send up to `window` turns before the first of them is answered (`talk.Ahead`).
        Turns of a site are answered in their order. It has no deadline while the server owes it an
        answer, and if it fails meanwhile, that counts once the turns that came are answered.

        `began(site)` is called when a conversation begins, the first time and after a failure.
        `wake_s(working)` is called before each wait, with the sites whose message is awaited and
        the time at which theirs left, infinite where it has not; it returns the time on `clock` at
        which `Idle` comes although not all wait.
        """
        unknown = sorted(messages.keys() - set(self.sites))
        if unknown:
            raise ConfigError(
                f"task {task!r}: the server half asks site {unknown[0]!r}, and the sites of the "
                f"run are {', '.join(self.sites[:5])}{', ...' if len(self.sites) > 5 else ''}"
            )

        call = Call(
            task,
            messages,
            round=round,
            hear=hear,
            read=read,
            window=0 if hear is None else window,
            began=began,
            wake_s=wake_s,
            dispatcher=self._dispatcher,
            failed=self.failed,
            meter=self.meter,
            times=self.times,
            answers_level=self.answers_level,
            limits=self._limits,
        )
        yield from call.events()
        if alone:
            self.require_quorum(task, round, answered=call.num_answered, asked=len(messages))

    def failed(self, failure: Failure, attempt: int | None) -> bool:
        """Note a failure, and return whether the site is to be asked again, which it is not after
        an attempt that has no number.

        Raises `ClientError` under on_failure="stop".
        """
        retries = self.config.retries if self.config.on_failure == "retry" else 0
        again = attempt is not None and attempt <= retries
        self.failures.append(replace(failure, asked_again=again))
        where = (
            f"round {failure.round}, {failure.task}: site {failure.site!r} failed: {failure.reason}"
        )

        if self.config.on_failure == "stop":
            log = self.transport.error_log(failure.site)
            there = log is not None and log.exists()
            errors = f"; the whole of its errors is in {log}" if there else ""
            remedy = "; fleet.on_failure='skip' would go on without it" * (len(self.sites) > 1)
            raise ClientError(f"{where}{remedy}{errors}")

        logger.warning("%s (%s)", where, "asked again" if again else "skipped")
        return again

    def reject(self, failure: Failure) -> None:
        """Note that an answer does not count after all; the site is not asked again.

        The bytes of the answer were counted when it came. Raises `ClientError` under
        on_failure="stop".
        """
        self.failed(failure, None)

    def require_quorum(self, task: str, round: int, *, answered: int, asked: int) -> None:
        """Raise `ClientError` if fewer sites answered than the policy asks for."""
        if answered < self.config.quorum * asked and self.config.on_failure != "stop":
            missing = sorted(
                {
                    failure.site
                    for failure in self.failures
                    if failure.round == round and not failure.asked_again
                }
            )
            raise ClientError(
                f"round {round}, {task}: {answered} of {asked} sites answered, fleet.quorum="
                f"{self.config.quorum} needs {self.config.quorum * asked:g}; missing: "
                f"{', '.join(missing)}. "
                f"Last problem: {self.failures[-1].reason}"
            )

    def close_round(self) -> tuple[dict[str, dict[Kind, int]], dict[str, Any]]:
        """Return the bytes by site and the seconds of parts since the last call."""
        return self.meter.close_round(), self.times.close_round()

    def close(self) -> None:
        """End: nothing is sent any more, and no site of this process works on."""
        self.transport.close()

    def state(self) -> dict[str, Value]:
        """Return what a checkpoint must keep of the fleet."""
        return self.transport.state()

    def restore(self, state: dict[str, Any], round: int) -> None:
        """Go on from a checkpoint of `round`, -1 for none; sites forget what they kept after it."""
        self.transport.restore(state, round)
