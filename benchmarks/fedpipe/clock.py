"""Clocks of sites: the processor time of a site's thread, stretched by the speed of its budget.

Sites share one machine with each other and with other processes, so wall time says how busy it was.
A site here lives on the time that its own thread computes. The loop that throttles a slow site
(`tasks.Pace`) waits by moving this clock on instead of sleeping. Deadlines, measured speeds and the
seconds of a round are therefore those of a site that has its share of one core for itself.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from benchmarks.fedpipe import fedadapter
from benchmarks.fedpipe.hetlora import SelfPruning
from fluvial.methods import fedavg
from fluvial.methods.fedpipe import step_times, tasks


class SiteClock:
    """The part of Python's `time` that FedPipe's sites use, by processor time."""

    def __init__(self) -> None:
        self._own = threading.local()

    def monotonic(self) -> float:
        """Return the seconds that this thread has computed and waited."""
        waited: float = getattr(self._own, "waited", 0.0)
        return time.thread_time() + waited

    def perf_counter(self) -> float:
        """Return the same."""
        return self.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait, which takes no time of the machine."""
        waited: float = getattr(self._own, "waited", 0.0)
        self._own.waited = waited + seconds


@dataclass
class Ledger:
    """Seconds of the sites, by their own clocks."""

    speeds: Mapping[str, float]
    """Share of the machine's speed that each site has; 1 for one that is not named."""
    setup: dict[str, float] = field(default_factory=dict)
    """Seconds of measures and probes by site."""
    rounds: dict[tuple[str, int], float] = field(default_factory=dict)
    """Seconds of training by site and round."""

    def training(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `train_locally` with its time written down."""

        def timed(site: Any, received: Any, round: int, **named: Any) -> Any:
            started = time.thread_time()
            result = function(site, received, round, **named)
            seconds = (time.thread_time() - started) / self.speed(site.name)
            if named.get("purpose") == "probe":
                self.setup[site.name] = self.setup.get(site.name, 0.0) + seconds
            else:
                self.rounds[site.name, round] = seconds
            return result

        return timed

    def measuring(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `measured` with its time written down."""

        def timed(site: Any, config: Any) -> Any:
            started = time.thread_time()
            result = function(site, config)
            seconds = (time.thread_time() - started) / self.speed(site.name)
            self.setup[site.name] = self.setup.get(site.name, 0.0) + seconds
            return result

        return timed

    def speed(self, site: str) -> float:
        """Return the share of the machine's speed of a site."""
        return self.speeds.get(site, 1.0)


@contextmanager
def enforced(
    speeds: Mapping[str, float], *, pruning: SelfPruning | None = None
) -> Iterator[Ledger]:
    """Have the sites of this process live by their own clocks; yield what they take.

    With `pruning` the sites that train by a plan prune their ranks, as in HetLoRA.
    """
    ledger = Ledger(speeds)
    clock = SiteClock()
    planned = vars(tasks)["train_locally"]
    if pruning is not None:
        planned = pruning.training(planned)

    with ExitStack() as stack:
        for module, name, value in (
            (tasks, "time", clock),
            (step_times, "time", clock),
            (tasks, "train_locally", ledger.training(planned)),
            (tasks, "measured", ledger.measuring(vars(tasks)["measured"])),
            *(
                (module, "train_locally", ledger.training(vars(module)["train_locally"]))
                for module in (fedavg, fedadapter)
            ),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield ledger
