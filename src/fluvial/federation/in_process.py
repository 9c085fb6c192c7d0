"""Transport within one process: each step of a site in a thread of its own.

Everything goes through the real bytes, and a site gets nothing that a message or its own store did
not bring, so a method that works here works over a network. Between two turns of a conversation no
thread waits.
"""

import atexit
import contextvars
import ctypes
import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from fluvial import caller
from fluvial.errors import ConfigError
from fluvial.federation.boundary import outward
from fluvial.federation.config import FleetConfig
from fluvial.federation.fleet import Fleet
from fluvial.federation.sites import Site, Task
from fluvial.federation.talk import Running, checked_answer
from fluvial.federation.transport import Arrival, Request
from fluvial.wire.payload import Limits, Payload, Value

logger = logging.getLogger(__name__)


def concurrency(config: FleetConfig) -> int:
    """Return how many sites of one process work at a time."""
    if config.workers != "auto":
        return config.workers
    return 1 if torch.cuda.is_available() else (os.cpu_count() or 1)


def local_fleet(
    names: Sequence[str],
    open_site: Callable[[str], Site],
    tasks: Mapping[str, Task],
    config: FleetConfig | None = None,
    *,
    limits: Limits | None = None,
) -> Fleet:
    """Return the fleet of sites that all run in this process."""
    config = config or FleetConfig()
    transport = InProcess(
        names, open_site, tasks, slots=concurrency(config), threads=config.threads, limits=limits
    )

    return Fleet(transport, config, limits=limits)


class _Visit:
    """A site while it works on one exchange."""

    def __init__(self, site: Site, task: Task, round: int) -> None:
        self.site = site
        self.site.round = round
        self.round = round
        self.running = Running(partial(task, site))
        self._lock = threading.Lock()
        self._requests: deque[Request] = deque()
        """Messages that came while it worked."""
        self._busy = False
        self._dropped = False

    def begin(self, request: Request) -> bool:
        """Take a message; return False where a thread of the site works, which will come to it."""
        with self._lock:
            if self._busy:
                self._requests.append(request)
                return False

            self._busy = True
            return True

    def drop(self) -> None:
        """End the exchange: at once between two steps, else when the step that runs has ended."""
        with self._lock:
            self._dropped = True
            if self._busy:
                return

        self.close()

    def leave(self, *, ended: bool) -> Request | None:
        """Return after a step the message with which the site goes on; None where it waits, has
        ended or was dropped."""
        with self._lock:
            if self._requests and not (ended or self._dropped):
                return self._requests.popleft()

            self._busy = False
            dropped = self._dropped

        if dropped:
            self.close()
        return None

    def close(self) -> None:
        """Close the task's generator; what it raises changes nothing any more, and is logged."""
        try:
            self.running.close()
        except BaseException:
            logger.exception("site %s: a dropped conversation did not end cleanly", self.site.name)


_working: WeakSet[threading.Thread] = WeakSet()
"""Threads of sites, some of which may work on after their answer is no longer waited for: late
ones, and the others when one has failed."""
_MOMENT_S = 0.5
"""Time for which such a thread may go on before it is stopped."""
_AGAIN_S = 5.0
"""Time after which a thread is stopped again: Python drops an exception in a finaliser."""
_STOP_S = 30.0
"""Time for which the end of a run, or of this process, waits for such a thread."""


class _Stopped(SystemExit):
    """The run of this thread has ended, and its site with it."""


@atexit.register
def _stop_all() -> None:
    """Stop the threads of sites before the interpreter ends.

    A thread that is inside PyTorch when the interpreter ends aborts the process, whatever its exit
    code would have been.
    """
    _stop(_working)


def _stop(working: Iterable[threading.Thread]) -> None:
    """Wait until threads have ended; those that go on for more than a moment get `_Stopped` raised
    where they run Python next."""
    until_s = time.monotonic() + _MOMENT_S
    for thread in list(working):
        thread.join(max(0.0, until_s - time.monotonic()))

    threads = [thread for thread in working if thread.is_alive()]
    until_s = time.monotonic() + _STOP_S
    with _stops_unreported():
        while threads and time.monotonic() < until_s:
            for thread in threads:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stopped)
                )

            again_s = min(until_s, time.monotonic() + _AGAIN_S)
            for thread in threads:
                thread.join(max(0.0, again_s - time.monotonic()))
            threads = [thread for thread in threads if thread.is_alive()]


@contextmanager
def _stops_unreported() -> Iterator[None]:
    """Say nothing of a `_Stopped` that was raised in a finaliser or a callback of a weak reference,
    where Python reports an exception and goes on."""
    report = sys.unraisablehook

    def without_stops(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not _Stopped:
            report(unraisable)

    sys.unraisablehook = without_stops
    try:
        yield
    finally:
        sys.unraisablehook = report


class InProcess:
    """Sites of one process; see `Transport`."""

    def __init__(
        self,
        names: Sequence[str],
        open_site: Callable[[str], Site],
        tasks: Mapping[str, Task],
        *,
        slots: int,
        threads: int = 1,
        limits: Limits | None = None,
    ) -> None:
        """`threads` are those of one site's tensor operations."""
        self.sites = tuple(names)
        self.slots = slots
        self.tasks = tasks
        self._open = open_site
        self._threads = threads
        self._limits = limits or Limits()
        self._visits: dict[int, _Visit] = {}
        self._working: WeakSet[threading.Thread] = WeakSet()
        self._arrived: queue.SimpleQueue[Arrival] = queue.SimpleQueue()

    def send(self, request: Request) -> None:
        """Begin a thread in which the site answers, unless one works at the same exchange."""
        if request.turn == 0:
            if request.task not in self.tasks:
                raise ConfigError(
                    f"the server half asks for the task {request.task!r}, and the sites of this "
                    f"method have {', '.join(sorted(self.tasks))}; add it to the method's tasks"
                )

            self._visits[request.number] = _Visit(
                self._open(request.site), self.tasks[request.task], request.round
            )

        visit = self._visits[request.number]
        if not visit.begin(request):
            return

        thread = threading.Thread(
            target=contextvars.copy_context().run,  # errors name arguments as `caller` has them
            args=(self._work, visit, request),
            daemon=True,
            name=f"{request.task}:{request.site}",
        )
        _working.add(thread)
        self._working.add(thread)
        thread.start()

    def next(self, timeout_s: float | None) -> Arrival | None:
        """See `Transport`."""
        try:
            return self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def accept(self, arrival: Arrival) -> None:
        """See `Transport`."""
        visit = self._visits.pop(arrival.number)
        for slot, payload in visit.site.kept.items():
            visit.site.store.write(visit.site.name, slot, payload, visit.round)

    def drop(self, request: Request) -> None:
        """See `Transport`."""
        visit = self._visits.pop(request.number, None)
        if visit is not None:
            visit.drop()

    def error_log(self, site: str) -> Path | None:
        """See `Transport`."""
        return self._open(site).store.errors(site)

    def close(self) -> None:
        """Stop sites that still work: they would draw random numbers beside a next run."""
        _stop(self._working)

    def state(self) -> dict[str, Value]:
        """Return nothing: what the sites keep lies in the run's own folder."""
        return {}

    def restore(self, state: dict[str, Any], round: int) -> None:  # noqa: ARG002
        """See `Transport`; raises `ConfigError` where sites elsewhere keep what they need."""
        if state:
            raise ConfigError(
                "this run was begun over Flower, and its sites keep there what they need to go on; "
                "resume it as it was begun: by submit --resume, or a simulation with "
                f"{caller.argument('fleet', 'flower')}"
            )

    def _work(self, visit: _Visit, request: Request) -> None:
        """Make steps as the site while messages are there, and hand in what comes of them."""
        torch.set_num_threads(self._threads)
        due: Request | None = request
        with suppress(_Stopped):
            while due is not None:
                arrival = self._step(visit, due)
                due = visit.leave(ended=arrival.final)
                if due is None or arrival.data or arrival.problem:
                    arrival.goes_on = due is not None
                    self._arrived.put(arrival)

    def _step(self, visit: _Visit, request: Request) -> Arrival:
        """Return the site's answer, empty where it waits for that to a turn ahead; of an error only
        what may leave a site."""
        site = visit.site
        name = site.of_method(f"task {request.task!r}")
        began_s = time.perf_counter()

        def ahead(turn: object) -> None:
            data = checked_answer(turn, name, final=False).to_bytes()
            self._arrived.put(Arrival(request.number, data, final=False, goes_on=True))

        try:
            message = Payload.from_bytes(request.data, self._limits)
            if request.turn == 0:
                site.accept_assignment(message)

            answer, final = visit.running.step(message, ahead)
            if answer is None and not final:
                site.stopwatch.add("work", time.perf_counter() - began_s)
                return Arrival(request.number, b"", final=False)
            data = checked_answer(answer, name, final=final).to_bytes()
            site.stopwatch.add("work", time.perf_counter() - began_s)
            return Arrival(request.number, data, final=final, times=site.stopwatch.seconds)
        except _Stopped:
            raise
        except BaseException as problem:
            log = site.store.errors(site.name)
            text = outward(problem, log, site=site.name, round=request.round, task=request.task)
            return Arrival(request.number, text.encode(errors="replace"), problem=text)
