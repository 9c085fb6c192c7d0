"""The one call between server and sites, and the fleet that runs in one process.

`LocalFleet` sends everything through the real bytes and gives a site nothing that a message or its own store did not
bring, so a method that works here works over a network. `Metered` counts what was sent.
"""

import logging
import os
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator

from fluvial.errors import ClientError, ConfigError
from fluvial.line import Line
from fluvial.payload import Limits, Payload, Value
from fluvial.settings import Settings
from fluvial.sites import Site, Task

logger = logging.getLogger(__name__)


class FleetConfig(Settings):
    """How sites are asked, and what happens when one does not answer."""

    workers: int | Literal["auto"] = "auto"
    """Sites that work at the same time; "auto" is one for each core on a CPU and one on a GPU."""
    threads: int = Field(1, ge=1)
    """Threads for the tensor operations of one site, and of the server; fixed, so that results do not depend on
    `workers`."""
    sites: tuple[str, ...] = ()
    """Names of the sites that a deployed run waits for; where this is empty, those of data that all sites can read."""
    join_timeout_s: float = Field(120.0, gt=0)
    """A deployed run waits this long for its sites to join."""
    line: Line | None = None
    """What `fluvial check` predicts the time of a round from; a run does not ask for it."""
    deadline_s: float | None = Field(None, gt=0)
    """A site that has not answered this long after it was asked has failed."""
    on_failure: Literal["stop", "skip", "retry"] = "stop"
    """Of a site: stop the run, go on without it in this round, or ask it again first."""
    retries: int = Field(2, ge=1)
    """Further attempts under on_failure="retry"; a site that fails them all is skipped."""
    quorum: float = Field(0.5, gt=0, le=1)
    """Share of the asked sites that must have answered, or the run stops."""

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> "FleetConfig":
        fields = type(self).model_fields
        if self.on_failure == "stop" and self.quorum != fields["quorum"].default:
            raise ValueError("quorum: without effect under on_failure='stop'; set on_failure='skip' or 'retry'")
        if self.on_failure != "retry" and self.retries != fields["retries"].default:
            raise ValueError("retries: without effect unless on_failure='retry'")
        return self


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


class Fleet(Protocol):
    """Everything a method knows of the sites."""

    sites: tuple[str, ...]
    failures: list[Failure]

    def ask(
        self,
        task: str,
        messages: Mapping[str, Payload],
        *,
        round: int,
        read: Callable[[Payload], T],
        alone: bool = True,
    ) -> Iterator[Reply[T]]:
        """Send each named site its message and yield the replies as they come.

        `read` checks and decodes a reply; where it raises, the site has failed, as if it had not answered. Raises
        `ClientError` when the policy says so, or after all replies were yielded when the quorum is missed; that is left
        to the caller (see `require_quorum`) where this call is not `alone` but one of several that make a round.
        """
        ...

    def require_quorum(self, task: str, round: int, *, answered: int, asked: int) -> None:
        """Raise `ClientError` if fewer sites answered than the policy asks for."""
        ...

    def state(self) -> dict[str, Value]:
        """What a checkpoint must keep of the fleet."""
        ...

    def restore(self, state: dict[str, Any], round: int) -> None:
        """Go on from a checkpoint of `round`, -1 for none; sites forget what they kept after it."""
        ...


def sample(sites: Sequence[str], fraction: float, *, seed: int, round: int) -> list[str]:
    """The cohort of a round, counted from 1: max(int(fraction * N), 1) sites without replacement.

    `numpy.random.RandomState(seed + round - 1)`; with seed 0 these are Shepherd's, which counts from 0.
    """
    count = max(int(fraction * len(sites)), 1)
    chosen = np.random.RandomState((seed + round - 1) % 2**32).choice(len(sites), count, replace=False)
    return [sites[index] for index in sorted(chosen)]


class Wires:
    """Messages by site, as bytes; one that goes to many sites is serialised once, when it is first sent."""

    def __init__(self, messages: Mapping[str, Payload]) -> None:
        self._messages = messages
        self._made: dict[int, bytes] = {}

    def __getitem__(self, site: str) -> bytes:
        message = self._messages[site]
        if id(message) not in self._made:
            self._made[id(message)] = message.to_bytes()
        return self._made[id(message)]


@dataclass
class _Job:
    site: Site
    attempt: int
    started: float
    wire: bytes


class Policy:
    """What every fleet does when a site does not answer."""

    def __init__(self, config: FleetConfig) -> None:
        self.failures: list[Failure] = []
        self._config = config

    def failed(self, failure: Failure, attempt: int) -> bool:
        """Note a failure; whether the site is to be asked again. Raises `ClientError` under on_failure="stop"."""
        self.failures.append(failure)
        where = f"round {failure.round}, {failure.task}: site {failure.site!r} failed: {failure.reason}"
        if self._config.on_failure == "stop":
            raise ClientError(where)
        again = self._config.on_failure == "retry" and attempt <= self._config.retries
        logger.warning("%s (%s)", where, "asked again" if again else "skipped")
        return again

    def require_quorum(self, task: str, round: int, *, answered: int, asked: int) -> None:
        """See `Fleet`."""
        if answered < self._config.quorum * asked and self._config.on_failure != "stop":
            missing = sorted({failure.site for failure in self.failures if failure.round == round})
            raise ClientError(
                f"round {round}, {task}: {answered} of {asked} sites answered, fleet.quorum="
                f"{self._config.quorum} needs {self._config.quorum * asked:g}; missing: {', '.join(missing)}. "
                f"Last problem: {self.failures[-1].reason}"
            )


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
        self._open, self._tasks = open_site, tasks
        self._limits = limits or Limits()
        self._workers = self._config.workers

    def ask(
        self,
        task: str,
        messages: Mapping[str, Payload],
        *,
        round: int,
        read: Callable[[Payload], T],
        alone: bool = True,
    ) -> Iterator[Reply[T]]:
        """See `Fleet`."""
        assert task in self._tasks, f"unknown task {task!r}"
        wires = Wires(messages)
        waiting = deque((name, 1) for name in messages)
        working: dict[int, _Job] = {}
        done: queue.SimpleQueue[tuple[int, bytes | None, str]] = queue.SimpleQueue()
        answered, started = 0, 0
        while waiting or working:
            while waiting and len(working) < self._concurrency():
                name, attempt = waiting.popleft()
                started += 1
                working[started] = job = _Job(self._open(name), attempt, time.perf_counter(), wires[name])
                threading.Thread(
                    target=self._work,
                    args=(started, job, self._tasks[task], done),
                    daemon=True,
                    name=f"{task}:{name}",
                ).start()
            number, wire_up, problem = self._next(working, done)
            if number not in working:
                continue  # answered after its deadline; what it wanted to keep is dropped with it
            job = working.pop(number)
            name = job.site.name
            if wire_up is not None:
                try:
                    content = read(Payload.from_bytes(wire_up, self._limits))
                except Exception:
                    wire_up, problem = None, traceback.format_exc()
            if wire_up is None:
                if self.failed(Failure(name, round, task, problem, len(job.wire)), job.attempt):
                    waiting.append((name, job.attempt + 1))
                continue
            for slot, kept in job.site.kept.items():
                job.site.store.write(name, slot, kept, round)
            answered += 1
            seconds = time.perf_counter() - job.started
            logger.info("round %d, %s: %s answered (%d of %d)", round, task, name, answered, len(messages))
            yield Reply(name, content, len(job.wire), len(wire_up), seconds)
        if alone:
            self.require_quorum(task, round, answered=answered, asked=len(messages))

    def state(self) -> dict[str, Value]:
        """Nothing: what its sites keep lies in the run's own folder."""
        return {}

    def restore(self, state: dict[str, Any], round: int) -> None:  # noqa: ARG002
        """See `state`; raises `ConfigError` where sites elsewhere keep it."""
        if state:
            raise ConfigError(
                "this run was begun over Flower, and its sites keep there what they need to go on; resume it as it was "
                "begun: by submit --resume, or a simulation with --fleet flower"
            )

    def _concurrency(self) -> int:
        if self._workers == "auto":
            self._workers = 1 if torch.cuda.is_available() else (os.cpu_count() or 1)
        return self._workers

    def _work(
        self, number: int, job: _Job, task: Task, done: "queue.SimpleQueue[tuple[int, bytes | None, str]]"
    ) -> None:
        torch.set_num_threads(self._config.threads)
        try:
            done.put((number, task(job.site, Payload.from_bytes(job.wire, self._limits)).to_bytes(), ""))
        except BaseException:
            done.put((number, None, traceback.format_exc()))

    def _next(
        self, working: Mapping[int, _Job], done: "queue.SimpleQueue[tuple[int, bytes | None, str]]"
    ) -> tuple[int, bytes | None, str]:
        """The next finished job, or the first one whose deadline passes."""
        deadline = self._config.deadline_s
        if deadline is None:
            return done.get()
        oldest = min(working, key=lambda number: working[number].started)
        left = working[oldest].started + deadline - time.perf_counter()
        try:
            return done.get(timeout=max(left, 0))
        except queue.Empty:
            return oldest, None, f"no answer within fleet.deadline_s={deadline:g}"


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
        """Bytes by site since the last call; only the totals are kept, so memory does not grow with rounds."""
        closed, self.current = self.current, {}
        return closed


class Metered:
    """A fleet that counts the bytes of another, messages to sites that failed included."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self.meter = fleet, Meter()
        self.sites, self.failures = fleet.sites, fleet.failures

    def ask(
        self,
        task: str,
        messages: Mapping[str, Payload],
        *,
        round: int,
        read: Callable[[Payload], T],
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

    def require_quorum(self, task: str, round: int, *, answered: int, asked: int) -> None:
        """See `Fleet`."""
        self._fleet.require_quorum(task, round, answered=answered, asked=asked)

    def state(self) -> dict[str, Value]:
        """See `Fleet`."""
        return self._fleet.state()

    def restore(self, state: dict[str, Any], round: int) -> None:
        """See `Fleet`."""
        self._fleet.restore(state, round)
