"""Requests on their way: their numbers, when each left, and which of them is past its deadline."""

import math
from collections.abc import Callable, Collection
from itertools import count

from fluvial.federation.transport import Arrival, Request, Transport


class Dispatcher:
    """The transport of a fleet as its calls use it, several of which may be open at a time."""

    def __init__(
        self, transport: Transport, clock: Callable[[], float], deadline_s: float | None
    ) -> None:
        """`clock` gives seconds; a request is late `deadline_s` seconds after it was sent."""
        self.transport = transport
        self.clock = clock
        self._deadline_s = deadline_s
        self._numbers = count(1)
        self._open: dict[int, Request] = {}
        """Last request of each open exchange, by number."""
        self._early: list[Arrival] = []
        """Arrivals that came while another call waited."""

    def number(self) -> int:
        """Return the number of a new exchange."""
        return next(self._numbers)

    def send(self, request: Request, *, owes: bool) -> None:
        """Send a request; its deadline counts from now, unless the server `owes` the site another
        answer."""
        request.sent_s = math.inf if owes else self.clock()
        self._open[request.number] = request
        self.transport.send(request)

    def next(self, numbers: Collection[int], until_s: float = math.inf) -> Arrival | None:
        """Return what arrives next of the exchanges `numbers`, or the failure of the first of them
        that is late; None at the time `until_s`."""
        while True:
            oldest = min((self._open[number] for number in numbers), key=_sent)
            late_s = math.inf
            if self._deadline_s is not None:
                late_s = oldest.sent_s + self._deadline_s

            now_s = self.clock()
            arrival = self._arrival(numbers, max(min(late_s, until_s) - now_s, 0))
            if arrival is None and late_s <= now_s:
                reason = f"no answer within fleet.deadline_s={self._deadline_s:g}"
                arrival = Arrival(oldest.number, b"", reason)

            if arrival is not None:
                return arrival

            if until_s <= now_s:
                return None

    def accept(self, arrival: Arrival) -> None:
        """End an exchange whose last answer counts."""
        del self._open[arrival.number]
        self.transport.accept(arrival)

    def drop(self, request: Request) -> None:
        """End an exchange that does not count."""
        self._open.pop(request.number, None)
        self._early = [each for each in self._early if each.number != request.number]
        self.transport.drop(request)

    def _arrival(self, numbers: Collection[int], timeout_s: float) -> Arrival | None:
        """Return what is there or comes in time; keep what another call waits for."""
        for place, early in enumerate(self._early):
            if early.number in numbers:
                return self._early.pop(place)

        arrival = self.transport.next(None if timeout_s == math.inf else timeout_s)
        if arrival is None or arrival.number in numbers:
            return arrival

        if arrival.number in self._open:
            self._early.append(arrival)
        return None  # else it came too late, and nothing of it counts


def _sent(request: Request) -> float:
    return request.sent_s
