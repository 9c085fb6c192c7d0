"""One call to many sites: exchanges of messages, each to its reply or its failure.

An exchange is one attempt at one site: a message down and its answer up, or several such turns
where the task converses.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

from fluvial.errors import WireError
from fluvial.federation.dispatch import Dispatcher
from fluvial.federation.failures import Failure, unreadable
from fluvial.federation.meter import Meter
from fluvial.federation.times import RoundTimes
from fluvial.federation.transport import Arrival, Request
from fluvial.federation.turns import Idle, Reply, Turn
from fluvial.wire.payload import Limits, Payload

logger = logging.getLogger(__name__)

H = TypeVar("H")
T = TypeVar("T")


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
    attempt: int | None
    """Number of the attempt at the site, from 1; None once no other may follow."""
    turns: int = 0
    """Turns of the site so far."""
    unanswered: deque[int] = field(default_factory=deque)
    """Numbers of the turns that the server half has not answered."""
    works: bool = False
    """True while the site is known to work."""
    failure: tuple[str, int] | None = None
    """Reason and bytes of a failure that counts once the turns that came before are answered."""
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
        window: int,
        began: Callable[[str], None],
        wake_s: Callable[[Mapping[str, float]], float],
        dispatcher: Dispatcher,
        failed: Callable[[Failure, int | None], bool],
        meter: Meter,
        times: RoundTimes,
        answers_level: int,
        limits: Limits,
    ) -> None:
        """`failed` takes a failure and the number of the attempt, None for one that no other may
        follow, and returns whether to retry; `hear` is None where no turn is expected."""
        self.num_answered = 0
        self._task = task
        self._round = round
        self._hear = hear
        self._read = read
        self._window = window
        self._began = began
        self._wake_s = wake_s
        self._dispatcher = dispatcher
        self._failed = failed
        self._meter = meter
        self._times = times
        self._answers_level = answers_level
        self._limits = limits
        self._wires = Wires(messages)
        self._num_asked = len(messages)
        self._to_begin = deque((site, 1) for site in messages)
        self._to_answer: deque[tuple[_Exchange, Request]] = deque()
        """Answers that are ready."""
        self._open: dict[int, _Exchange] = {}
        """Exchanges that have begun."""

    def events(self) -> Iterator[Turn[H] | Reply[T] | Idle]:
        """Yield turns and replies; drop what is open when the caller leaves early."""
        try:
            while True:
                self._end_failed()
                self._send()
                if not self._open:
                    return

                if not self._to_begin and not self._awaited():
                    before = self._num_unanswered()
                    idle = self._idle()
                    yield idle
                    went_on = self._num_unanswered() < before
                    assert went_on, f"sites {idle.sites} wait, and no turn was answered"
                    continue

                until_s = self._wake_s(self._working())
                arrival = self._dispatcher.next(self._reachable(), until_s)
                if arrival is None:
                    yield self._idle()
                    continue

                event = self._take(arrival)
                if event is not None:
                    yield event
                    del event  # so that no reply is held here while the next is waited for
        finally:
            for exchange in self._open.values():
                if exchange.failure is None:
                    self._dispatcher.drop(exchange.request)

    def _send(self) -> None:
        """Send what is ready while slots are free, answers before new beginnings."""
        while self._to_answer:
            exchange, request = self._to_answer[0]
            if not exchange.works and not self._slot_is_free():
                return

            self._to_answer.popleft()
            if self._open.get(request.number) is exchange and exchange.failure is None:
                self._send_one(exchange, request)

        while self._to_begin and self._slot_is_free():
            exchange = self._begin(*self._to_begin.popleft())
            self._open[exchange.request.number] = exchange
            self._send_one(exchange, exchange.request)

    def _slot_is_free(self) -> bool:
        working = sum(exchange.works for exchange in self._open.values())
        return working < self._dispatcher.transport.slots

    def _send_one(self, exchange: _Exchange, request: Request) -> None:
        exchange.request = request
        exchange.works = True
        exchange.bytes_down += len(request.data)
        self._meter.count(request.site, ("down", self._task), len(request.data))
        self._dispatcher.send(request, owes=bool(exchange.unanswered))

    def _reachable(self) -> list[int]:
        """Return the numbers of the exchanges from which something may arrive."""
        return [number for number, each in self._open.items() if each.failure is None]

    def _awaited(self) -> list[_Exchange]:
        """Return the exchanges whose turns are all answered."""
        return [exchange for exchange in self._open.values() if not exchange.unanswered]

    def _num_unanswered(self) -> int:
        return sum(len(exchange.unanswered) for exchange in self._open.values())

    def _working(self) -> dict[str, float]:
        """Return the sites whose message is awaited, with the time at which theirs left."""
        begun = {each.request.site: each.request.sent_s for each in self._awaited()}
        return dict.fromkeys((site for site, _ in self._to_begin), math.inf) | begun

    def _idle(self) -> Idle:
        waiting = sorted(each.request.site for each in self._open.values() if each.unanswered)
        return Idle(tuple(waiting), tuple(sorted(self._working())), self._leave_out)

    def _leave_out(self, site: str, reason: str) -> None:
        """End the exchange of a site for good, as its failure."""
        for exchange in self._open.values():
            if exchange.request.site == site:
                exchange.attempt = None
                self._drop(exchange, reason, 0)
                self._end(exchange)
                return

        raise AssertionError(f"no exchange with site {site!r} is open")

    def _begin(self, site: str, attempt: int) -> _Exchange:
        self._began(site)
        number = self._dispatcher.number()
        data = self._wires[site]
        request = Request(number, 0, site, self._task, self._round, data, self._window)
        return _Exchange(request, attempt)

    def _take(self, arrival: Arrival) -> Turn[H] | Reply[T] | None:
        """Count and read what arrived; return None where the site has failed, or only waits."""
        exchange = self._open[arrival.number]
        site = exchange.request.site
        arrived_s = self._dispatcher.clock()
        exchange.works = arrival.goes_on
        if not (arrival.final or arrival.data or arrival.problem):
            return None

        self._count(exchange, len(arrival.data))
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
                    if len(exchange.unanswered) >= self._window:
                        raise WireError(
                            f"turn {exchange.turns + 1} came before the answer to turn "
                            f"{exchange.unanswered[0]}; {self._window} may be open"
                        )
                    return self._turn(exchange, self._hear(site, payload))

                if exchange.unanswered:
                    raise WireError("it answered the task while its turn had no answer")
                with self._times.server.time("decoding"):
                    content = self._read(site, payload)
            except Exception as problem:
                reason = unreadable(problem)

        if reason:
            self._drop(exchange, reason, len(arrival.data))
            return None

        del self._open[arrival.number]
        self._dispatcher.accept(arrival)
        self._meter.answered.add((site, self._task))
        self.num_answered += 1
        logger.log(
            self._answers_level,
            "round %d, %s: %s answered (%d of %d)",
            self._round,
            self._task,
            site,
            self.num_answered,
            self._num_asked,
        )
        assert exchange.began_s is not None
        seconds = self._dispatcher.clock() - exchange.began_s
        took_s = arrived_s - exchange.began_s
        self._times.answered(site, self._task, took_s, arrival.times)

        return Reply(site, content, exchange.bytes_down, exchange.bytes_up, seconds)

    def _count(self, exchange: _Exchange, bytes_up: int) -> None:
        """Count what came of a site, for whose message there is no deadline now."""
        if exchange.began_s is None:
            exchange.began_s = exchange.request.sent_s

        exchange.request.sent_s = math.inf
        exchange.bytes_up += bytes_up
        if bytes_up:
            self._meter.count(exchange.request.site, ("up", self._task), bytes_up)

    def _turn(self, exchange: _Exchange, content: H) -> Turn[H]:
        exchange.turns += 1
        exchange.unanswered.append(exchange.turns)
        answer = partial(self._answer, exchange, exchange.turns)
        fail = partial(self._fail, exchange, exchange.turns)
        return Turn(exchange.request.site, content, answer, fail)

    def _answer(self, exchange: _Exchange, turn: int, payload: Payload) -> None:
        """Make the answer to a turn ready."""
        self._check_next(exchange, turn)
        exchange.unanswered.popleft()
        request = replace(exchange.request, turn=turn, data=payload.to_bytes(), sent_s=math.inf)
        self._to_answer.append((exchange, request))

    def _fail(self, exchange: _Exchange, turn: int, reason: str) -> None:
        """End an exchange whose turn waits, as a failure of its site."""
        self._check_next(exchange, turn)
        self._drop(exchange, reason, 0)
        self._end(exchange)

    def _check_next(self, exchange: _Exchange, turn: int) -> None:
        """Assert that a turn is the oldest one without an answer."""
        site = exchange.request.site
        there = self._open.get(exchange.request.number) is exchange
        waits = there and turn in exchange.unanswered
        assert waits, f"the turn of site {site!r} is answered, or its call has ended"
        assert turn == exchange.unanswered[0], f"turns of site {site!r} are answered in order"

    def _drop(self, exchange: _Exchange, reason: str, bytes_up: int) -> None:
        """Let nothing come of an exchange any more, whose site has failed."""
        if exchange.failure is None:
            exchange.failure = (reason, bytes_up)
            exchange.works = False
            self._dispatcher.drop(exchange.request)

    def _end_failed(self) -> None:
        """End exchanges that have failed and whose turns are all answered."""
        for exchange in self._awaited():
            if exchange.failure is not None:
                self._end(exchange)

    def _end(self, exchange: _Exchange) -> None:
        """Note the failure of an exchange, and begin another one at its site where the policy says
        so."""
        assert exchange.failure is not None
        reason, bytes_up = exchange.failure
        request = exchange.request
        del self._open[request.number]
        failure = Failure(
            request.site, self._round, self._task, reason, len(request.data), bytes_up
        )
        attempt = exchange.attempt
        if self._failed(failure, attempt) and attempt is not None:
            self._to_begin.append((request.site, attempt + 1))
