"""One call to many sites: exchanges of messages, each to its reply or its failure.

An exchange is one attempt at one site: a message down and its answer up, or several such turns
where the task converses.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

from fluvial.errors import WireError
from fluvial.federation.dispatch import Dispatcher
from fluvial.federation.failures import Failure, unreadable
from fluvial.federation.meter import Meter
from fluvial.federation.transport import Arrival, Request
from fluvial.federation.turns import Idle, Reply, Turn
from fluvial.wire.payload import Limits, Payload

logger = logging.getLogger(__name__)

H = TypeVar("H")
T = TypeVar("T")


_LAST = 10**9
"""Number of an attempt after which none follows."""


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


@dataclass(eq=False)
class _Exchange:
    """One attempt at one site."""

    request: Request
    """Last message."""
    attempt: int
    began_s: float | None = None
    """Time at which the first message left."""
    bytes_down: int = 0
    """Bytes of the messages to the site so far."""
    bytes_up: int = 0
    """Bytes of its answers so far."""


class Call(Generic[H, T]):
    """One call of `Fleet.converse`."""

    def __init__(
        self,
        task: str,
        messages: Mapping[str, Payload],
        *,
        round: int,
        hear: Callable[[str, Payload], H] | None,
        read: Callable[[str, Payload], T],
        began: Callable[[str], None],
        wake_s: Callable[[Mapping[str, float]], float],
        dispatcher: Dispatcher,
        failed: Callable[[Failure, int], bool],
        meter: Meter,
        limits: Limits,
    ) -> None:
        """`failed` takes a failure and the number of the attempt, and returns whether to retry;
        `hear` is None where no turn is expected."""
        self.num_answered = 0
        self._task = task
        self._round = round
        self._hear = hear
        self._read = read
        self._began = began
        self._wake_s = wake_s
        self._dispatcher = dispatcher
        self._failed = failed
        self._meter = meter
        self._limits = limits
        self._wires = Wires(messages)
        self._num_asked = len(messages)
        self._to_begin = deque((site, 1) for site in messages)
        self._to_answer: deque[_Exchange] = deque()
        """Exchanges whose next message is ready."""
        self._at_sites: dict[int, _Exchange] = {}
        self._at_server: dict[int, _Exchange] = {}
        """Exchanges whose last turn was not answered yet."""

    def events(self) -> Iterator[Turn[H] | Reply[T] | Idle]:
        """Yield turns and replies; drop what is open when the caller leaves early."""
        try:
            while True:
                self._send()
                if self._at_sites:
                    until_s = self._wake_s(self._working())
                    arrival = self._dispatcher.next(self._at_sites.keys(), until_s)
                    if arrival is None:
                        yield self._idle()
                        continue

                    event = self._take(arrival)
                    if event is not None:
                        yield event
                        del event  # so that no reply is held here while the next is waited for
                elif self._at_server:
                    idle = self._idle()
                    yield idle
                    went_on = len(self._at_server) < len(idle.sites)
                    assert went_on, f"sites {idle.sites} wait, and no turn was answered"
                else:
                    return
        finally:
            for exchange in (*self._at_sites.values(), *self._at_server.values(), *self._to_answer):
                self._dispatcher.drop(exchange.request)

    def _send(self) -> None:
        """Send what is ready while slots are free, answers before new beginnings."""
        slots = self._dispatcher.transport.slots
        while len(self._at_sites) < slots and (self._to_answer or self._to_begin):
            if self._to_answer:
                exchange = self._to_answer.popleft()
            else:
                exchange = self._begin(*self._to_begin.popleft())

            self._at_sites[exchange.request.number] = exchange
            self._dispatcher.send(exchange.request)

    def _working(self) -> dict[str, float]:
        """Return the sites whose message is awaited, with the time at which theirs left."""
        sent = {each.request.site: each.request.sent_s for each in self._at_sites.values()}
        unsent = [*(each.request.site for each in self._to_answer)]
        unsent += [site for site, _ in self._to_begin]
        return dict.fromkeys(unsent, math.inf) | sent

    def _idle(self) -> Idle:
        waiting = sorted(each.request.site for each in self._at_server.values())
        return Idle(tuple(waiting), tuple(sorted(self._working())), self._leave_out)

    def _leave_out(self, site: str, reason: str) -> None:
        """End the exchange of a site for good, as its failure."""
        for exchanges in (self._at_sites, self._at_server):
            for number, exchange in list(exchanges.items()):
                if exchange.request.site == site:
                    del exchanges[number]
                    self._failure(replace(exchange, attempt=_LAST), reason, 0)
                    return

        raise AssertionError(f"no exchange with site {site!r} is open")

    def _begin(self, site: str, attempt: int) -> _Exchange:
        self._began(site)
        number = self._dispatcher.number()
        data = self._wires[site]
        converses = self._hear is not None
        request = Request(number, 0, site, self._task, self._round, data, converses)
        return _Exchange(request, attempt)

    def _take(self, arrival: Arrival) -> Turn[H] | Reply[T] | None:
        """Count and read what arrived; return None where the site has failed."""
        exchange = self._at_sites.pop(arrival.number)
        request = exchange.request
        site = request.site
        self._count(exchange, len(request.data), len(arrival.data))
        reason = arrival.problem

        if not reason:
            try:
                payload = Payload.from_bytes(arrival.data, self._limits)
                if not arrival.final:
                    if self._hear is None:
                        raise WireError(
                            "the task sends a turn, but was asked for one answer only; use "
                            "`Fleet.converse` for it"
                        )
                    return self._turn(exchange, self._hear(site, payload))

                content = self._read(site, payload)
            except Exception as problem:
                reason = unreadable(problem)

        if reason:
            self._failure(exchange, reason, len(arrival.data))
            return None

        self._dispatcher.transport.accept(arrival)
        self._meter.answered.add((site, self._task))
        self.num_answered += 1
        logger.info(
            "round %d, %s: %s answered (%d of %d)",
            self._round,
            self._task,
            site,
            self.num_answered,
            self._num_asked,
        )
        assert exchange.began_s is not None
        seconds = self._dispatcher.clock() - exchange.began_s

        return Reply(site, content, exchange.bytes_down, exchange.bytes_up, seconds)

    def _count(self, exchange: _Exchange, bytes_down: int, bytes_up: int) -> None:
        """Count one message down and what came back."""
        if exchange.began_s is None:
            exchange.began_s = exchange.request.sent_s

        exchange.bytes_down += bytes_down
        exchange.bytes_up += bytes_up
        self._meter.count(exchange.request.site, ("down", self._task), bytes_down)
        if bytes_up:
            self._meter.count(exchange.request.site, ("up", self._task), bytes_up)

    def _turn(self, exchange: _Exchange, content: H) -> Turn[H]:
        self._at_server[exchange.request.number] = exchange
        answer = partial(self._answer, exchange)
        return Turn(exchange.request.site, content, answer, partial(self._fail, exchange))

    def _answer(self, exchange: _Exchange, payload: Payload) -> None:
        """Make the next message of an exchange ready."""
        last = exchange.request
        there = self._at_server.pop(last.number, None)
        assert there is exchange, (
            f"the turn of site {last.site!r} is answered, or its call has ended"
        )

        exchange.request = replace(
            last, turn=last.turn + 1, data=payload.to_bytes(), sent_s=math.inf
        )
        self._to_answer.append(exchange)

    def _fail(self, exchange: _Exchange, reason: str) -> None:
        """End an exchange whose turn waits, as a failure of its site."""
        there = self._at_server.pop(exchange.request.number, None)
        assert there is exchange, "the turn was answered, or its call has ended"
        self._failure(exchange, reason, 0)

    def _failure(self, exchange: _Exchange, reason: str, bytes_up: int) -> None:
        """Drop an exchange, and begin another one at its site where the policy says so."""
        request = exchange.request
        self._dispatcher.drop(request)
        failure = Failure(
            request.site, self._round, self._task, reason, len(request.data), bytes_up
        )
        if self._failed(failure, exchange.attempt):
            self._to_begin.append((request.site, exchange.attempt + 1))
