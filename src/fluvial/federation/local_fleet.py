"""The fleet that runs in one process, each task of a site in a thread of its own.

`LocalFleet` sends everything through the real bytes and gives a site nothing that a message or its
own store did not bring, so a method that works here works over a network.
"""

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fluvial.errors import ClientError, ConfigError
from fluvial.federation.boundary import outward
from fluvial.federation.fleet import Failure, FleetConfig, Policy, Reply, Wires, unreadable
from fluvial.federation.sites import Site, Task
from fluvial.wire.payload import Limits, Payload, Value

logger = logging.getLogger(__name__)
T = TypeVar("T")


Done = queue.SimpleQueue[tuple[int, bytes | None, str]]
"""Number of a job, its answer, and what the site tells of an error."""


@dataclass
class _Job:
    site: Site
    attempt: int
    started: float
    wire: bytes


def concurrency(config: FleetConfig) -> int:
    """Return how many sites of one process work at a time."""
    if config.workers != "auto":
        return config.workers
    return 1 if torch.cuda.is_available() else (os.cpu_count() or 1)


class LocalFleet(Policy):
    """Sites of one process, each task in a thread of its own."""

    def __init__(
        self,
        names: Sequence[str],
        open_site: Callable[[str], Site],
        tasks: Mapping[str, Task],
        config: FleetConfig | None = None,
        *,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(config or FleetConfig())
        self.sites = tuple(names)
        self._open = open_site
        self._tasks = tasks
        self._limits = limits or Limits()

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
        assert task in self._tasks, f"unknown task {task!r}"
        wires = Wires(messages)
        workers = concurrency(self.config)
        waiting = deque((name, 1) for name in messages)
        working: dict[int, _Job] = {}
        done: Done = queue.SimpleQueue()
        answered = 0
        started = 0

        while waiting or working:
            while waiting and len(working) < workers:
                name, attempt = waiting.popleft()
                started += 1
                working[started] = job = _Job(
                    self._open(name), attempt, time.perf_counter(), wires[name]
                )
                threading.Thread(
                    target=self._work,
                    args=(started, job, task, round, done),
                    daemon=True,
                    name=f"{task}:{name}",
                ).start()

            number, wire_up, problem = self._next(working, done)
            if number not in working:
                continue  # answered after its deadline; what it wanted to keep is dropped with it

            job = working.pop(number)
            name = job.site.name
            size = len(problem.encode()) if wire_up is None else len(wire_up)

            if wire_up is not None:
                try:
                    content = read(name, Payload.from_bytes(wire_up, self._limits))
                except Exception as error:
                    wire_up = None
                    problem = unreadable(error)

            if wire_up is None:
                if self.failed(
                    Failure(name, round, task, problem, len(job.wire), size), job.attempt
                ):
                    waiting.append((name, job.attempt + 1))

                continue

            for slot, kept in job.site.kept.items():
                job.site.store.write(name, slot, kept, round)
            answered += 1
            seconds = time.perf_counter() - job.started
            logger.info(
                "round %d, %s: %s answered (%d of %d)", round, task, name, answered, len(messages)
            )
            yield Reply(name, content, len(job.wire), len(wire_up), seconds)

        if alone:
            self.require_quorum(task, round, answered=answered, asked=len(messages))

    def failed(self, failure: Failure, attempt: int) -> bool:
        """See `Policy`; here the sites' own logs can be read, so the error says where they are."""
        try:
            return super().failed(failure, attempt)
        except ClientError as error:
            log = self._open(failure.site).store.errors(failure.site)
            where = (
                "" if log is None or not log.exists() else f"; the whole of its errors is in {log}"
            )
            raise ClientError(f"{error}{where}") from None

    def state(self) -> dict[str, Value]:
        """Nothing: what its sites keep lies in the run's own folder."""
        return {}

    def restore(self, state: dict[str, Any], round: int) -> None:  # noqa: ARG002
        """See `state`; raises `ConfigError` where sites elsewhere keep it."""
        if state:
            raise ConfigError(
                "this run was begun over Flower, and its sites keep there what they need to go on; "
                "resume it as it was begun: by submit --resume, or a simulation with --fleet flower"
            )

    def _work(self, number: int, job: _Job, task: str, round: int, done: Done) -> None:
        """Answer as the site; what it tells of an error is what would leave it."""
        site = job.site
        torch.set_num_threads(self.config.threads)

        try:
            message = Payload.from_bytes(job.wire, self._limits)
            site.accept_assignment(message)
            answer = self._tasks[task](site, message)
            done.put((number, answer.to_bytes(), ""))
        except BaseException as problem:
            log = site.store.errors(site.name)
            text = outward(problem, log, site=site.name, round=round, task=task)
            done.put((number, None, text))

    def _next(self, working: Mapping[int, _Job], done: Done) -> tuple[int, bytes | None, str]:
        """The next finished job, or the first one whose deadline passes."""
        deadline = self.config.deadline_s
        if deadline is None:
            return done.get()

        oldest = min(working, key=lambda number: working[number].started)
        left = working[oldest].started + deadline - time.perf_counter()
        try:
            return done.get(timeout=max(left, 0))
        except queue.Empty:
            return oldest, None, f"no answer within fleet.deadline_s={deadline:g}"
