"""Transport for tests: sites that answer by a function, on a clock that does not wait."""

import heapq
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from fluvial.federation.talk import Running, Talk
from fluvial.federation.transport import Arrival, Request
from fluvial.wire.payload import Payload, Value


class Mock:
    """Sites whose answers are `answer(site, task, payload)`; see `Transport`.

    An answer is a payload, or bytes that stand for one and need not be one; None stays silent, a
    generator talks, and what `answer` raises is the site's failure. An answer takes `delays_s`
    seconds, of its site, on `clock`.
    """

    def __init__(
        self,
        sites: Sequence[str],
        answer: Callable[[str, str, Payload], Payload | bytes | Talk | None],
        *,
        delays_s: Mapping[str, float] | None = None,
        slots: int | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self.slots = slots or len(self.sites)
        self.accepted: list[str] = []
        """Sites whose answers counted, in order."""
        self.dropped: list[str] = []
        """Sites of exchanges that did not count, in order."""
        self.now_s = 0.0
        self._answer = answer
        self._delays_s = delays_s or {}
        self._running: dict[int, Running] = {}
        self._sites: dict[int, str] = {}
        self._coming: list[tuple[float, int, Arrival]] = []
        self._order = count()
        self._last_s: dict[int, float] = {}
        """Time at which the last turn of an exchange arrives."""

    def clock(self) -> float:
        """Return the seconds since the mock was made; `next` moves them on."""
        return self.now_s

    def send(self, request: Request) -> None:
        """See `Transport`."""
        if request.turn == 0:
            answer: Any = partial(self._answer, request.site, request.task)
            self._running[request.number] = Running(answer)
            self._sites[request.number] = request.site

        for delay_s, arrival in self._step(request):
            last_s = self._last_s.get(request.number, 0.0)
            due_s = max(self.now_s + delay_s, last_s)  # turns of a site stay in their order
            self._last_s[request.number] = due_s
            heapq.heappush(self._coming, (due_s, next(self._order), arrival))

    def next(self, timeout_s: float | None) -> Arrival | None:
        """See `Transport`; raises `AssertionError` where all sites are silent for ever."""
        if self._coming and (timeout_s is None or self._coming[0][0] <= self.now_s + timeout_s):
            due_s, _, arrival = heapq.heappop(self._coming)
            self.now_s = max(self.now_s, due_s)
            return arrival

        assert timeout_s is not None, "every site is silent, and no deadline is set"
        self.now_s += timeout_s
        return None

    def accept(self, arrival: Arrival) -> None:
        """See `Transport`."""
        self.accepted.append(self._sites[arrival.number])

    def drop(self, request: Request) -> None:
        """See `Transport`."""
        self.dropped.append(request.site)
        self._running[request.number].close()

    def error_log(self, site: str) -> Path | None:  # noqa: ARG002
        """Return None: a mock writes no file."""
        return None

    def close(self) -> None:
        """Do nothing: a mock works in this thread."""

    def state(self) -> dict[str, Value]:
        """Return nothing."""
        return {}

    def restore(self, state: dict[str, Any], round: int) -> None:
        """See `Transport`; nothing is restored."""

    def _step(self, request: Request) -> list[tuple[float, Arrival]]:
        """Return what a site says, each with its delay, in seconds."""
        arrivals: list[tuple[float, Arrival]] = []

        def arrives(arrival: Arrival) -> None:
            arrivals.append((self._delays_s.get(request.site, 0.0), arrival))

        def say(answer: Payload | bytes, *, final: bool = False) -> None:
            data = answer if isinstance(answer, bytes) else answer.to_bytes()
            arrives(Arrival(request.number, data, final=final))

        try:
            message = Payload.from_bytes(request.data)
            answer, final = self._running[request.number].step(message, say)
            if answer is not None:
                say(answer, final=final)
        except Exception as problem:
            text = f"{type(problem).__name__}: {problem}"
            arrives(Arrival(request.number, text.encode(), problem=text))

        return arrivals
