"""The choice within a budget: trials of falling number and growing length, and what they found.

Successive halving (Jamieson and Talwalkar, AISTATS 2016): all adapters with one number of steps,
then the other numbers of steps for the two best adapters, then for the best of these the codecs of
the downlink, where a limit counts downloads, and those of the uplink. Every candidate has the
largest frames that the budget allows it, so all are compared at equal cost. An adapter whose frames
must be coarse in both directions begins with each codec that may carry both.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from fluvial.codecs import CodecSettings
from fluvial.errors import ClientError, ConfigError, DivergenceError
from fluvial.methods.measuring import Texts
from fluvial.models.pool import ModelPool
from fluvial.runs.budget.candidates import (
    Adapter,
    Candidate,
    Costs,
    adapters,
    steps_tried,
    with_choice,
)
from fluvial.runs.budget.config import BudgetConfig
from fluvial.runs.budget.effort import FINALISTS, KEEP, Effort, part_rounds, stages
from fluvial.runs.budget.pairs import EXACT, Pair, other_codecs, other_downlinks, pairs
from fluvial.runs.budget.reason import reason
from fluvial.runs.budget.settled import nothing_fits, opened
from fluvial.runs.budget.trials import PublicSites, Trial, alone_loss, base_loss
from fluvial.runs.config import RunConfig
from fluvial.wire.tensors import Layout

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Tried:
    """A candidate with its trial, and what was measured so far."""

    candidate: Candidate
    trial: Trial
    points: list[tuple[int, int, float]] = field(default_factory=list)
    """Rounds, bytes of a site in both directions, and held-out loss after them."""

    @property
    def loss(self) -> float:
        """Return the last loss."""
        return self.points[-1][2]

    @property
    def steps(self) -> int:
        """Return the optimizer steps of a site in a round; 1 where they follow from the data."""
        return self.candidate.config.train.max_steps or 1

    def left(self, rounds: int) -> int:
        """Return the rounds up to this one that are not measured yet."""
        return max(0, rounds - (self.points[-1][0] if self.points else 0))

    def go_on(self, rounds: int, ran: Callable[[int], None]) -> None:
        """Run up to this round, and measure; one that was measured there stays as it is. `ran`
        takes the number of each round that ends."""
        if not self.left(rounds):
            return
        try:
            for number in range(self.trial.rounds + 1, rounds + 1):
                self.trial.run_until(number)
                ran(number)
            loss = self.trial.loss()
        except (ClientError, DivergenceError) as error:
            logger.info("budget: %s has failed: %s", _named(self.candidate.adapter), error)
            loss = math.inf

        sent = sum(self.trial.bytes.values()) // len(self.trial.sites.names)
        self.points.append((rounds, sent, loss if math.isfinite(loss) else math.inf))


def choose(config: RunConfig, pool: ModelPool, texts: Texts) -> dict[str, Any]:
    """Return what is chosen for what `config` leaves open, and the trials, as JSON values.

    `pool` has the base. Raises `ConfigError` where no candidate is within the budget.
    """
    assert config.budget is not None
    search = _Search(config, config.budget, pool, texts)
    return search.record(search.best())


class _Search:
    """Trials of one choice; models of equal adapters share a pool, and all pools the base."""

    def __init__(
        self, config: RunConfig, budget: BudgetConfig, pool: ModelPool, texts: Texts
    ) -> None:
        self.config = config
        self.budget = budget.within(config.rounds)
        self.free = opened(config)
        self.costs = Costs(config, budget, texts)
        self.texts = texts
        self._pool = pool
        self._pools: dict[tuple[str | None, int | None], ModelPool] = {}
        self._sites: PublicSites | None = None
        self._impossible: dict[str, str] = {}
        self.tried: list[Tried] = []
        self.all_adapters = adapters(budget, self.free)
        self.pairs = pairs(budget, self.free)

    @cached_property
    def effort(self) -> Effort:
        """Progress of the trials."""
        fixed = self.config.train.max_steps or 1
        steps = [fixed if each is None else each for each in self._steps]
        adapters = len(self.all_adapters) // len(steps)
        known = self.free.max_steps or self.config.train.max_steps is not None
        return Effort(
            stages(self.budget, self.free, adapters, steps),
            len(self.sites.names),
            "steps" if known else "rounds",
        )

    @property
    def sites(self) -> PublicSites:
        """Return the simulated sites."""
        if self._sites is None:
            cohort = self.config.method.cohort(len(self.texts.names))
            self._sites = PublicSites.of(self.texts, self.budget.simulated_sites(cohort))
        return self._sites

    def best(self) -> Candidate:
        """Return the candidate of the least loss."""
        if not self.free:
            only = self._starts(self.all_adapters[0])
            if not only:
                raise ConfigError(self._nothing_fits())
            return only[0]

        first_steps, *other_steps = self._steps
        first = self._all_starts([a for a in self.all_adapters if a.max_steps == first_steps])
        if not first:
            raise ConfigError(self._nothing_fits())

        rounds = self.budget.trial_rounds
        going = self._try(first)
        for until in part_rounds(rounds):
            self._go_on(going, until)
            going = _least(going, max(FINALISTS, math.ceil(len(going) / KEEP)))
            self._close_all_but(going)

        finalists = _least(self._finish(going), FINALISTS)
        longer = [
            replace(each.candidate.adapter, max_steps=steps)
            for each in finalists
            for steps in other_steps
        ]
        finished = self._finish([*finalists, *self._try(self._all_starts(longer))])
        winner = _least(finished, 1)[0]
        for others in (other_downlinks, other_codecs):
            winner = self._best_of(winner, others(winner.candidate.pair, self.budget, self.free))
        self._close_all_but([])
        if not math.isfinite(winner.loss):
            raise ConfigError(
                "budget: no trial has ended with a finite loss; lower train.learning_rate, or set "
                "what the trials would choose"
            )
        return winner.candidate

    @property
    def _steps(self) -> list[int | None]:
        """Return the numbers of steps of a round, first that with which all adapters are tried."""
        return steps_tried(self.budget, self.free)

    def _pool_of(self, adapter: Adapter) -> ModelPool:
        key = (adapter.target_modules, adapter.r)
        if key not in self._pools:
            tuning = with_choice(self.config, adapter).adapter
            self._pools[key] = self._pool.beside(tuning)
        return self._pools[key]

    def _starts(self, adapter: Adapter) -> list[Candidate]:
        """Return the first candidates of an adapter within the budget.

        An adapter that the model cannot have has none, unless the configuration asks for it.
        """
        try:
            return self.costs.starts(adapter, self._pool_of(adapter), self.pairs)
        except ConfigError as error:
            proposed = self.free.target_modules or self.free.r
            if not (proposed and str(error).startswith("lora.")):
                raise
            logger.info("budget: %s is no candidate: %s", _named(adapter), error)
            self._impossible[_named(adapter)] = str(error)
            return []

    def _all_starts(self, some: Sequence[Adapter]) -> list[Candidate]:
        """Return the first candidates of each adapter; of adapters with equal tensors, those of
        one."""
        found: dict[tuple[Layout, int | None, Pair], Candidate] = {}
        for each in dict.fromkeys(some):
            for start in self._starts(each):
                found.setdefault((start.layout, each.max_steps, start.pair), start)
        return list(found.values())

    def _best_of(self, winner: Tried, tried: Sequence[Pair]) -> Tried:
        """Return the trial of least loss among that of `winner` and those with its adapter and
        codecs that were not tried with it."""
        adapter = winner.candidate.adapter
        known = {each.candidate.pair for each in self.tried if each.candidate.adapter == adapter}
        new = [pair for pair in tried if pair not in known]
        candidates = self.costs.candidates(adapter, self._pool_of(adapter), new)
        return _least(self._finish([winner, *self._try(list(candidates))]), 1)[0]

    def _try(self, candidates: Sequence[Candidate]) -> list[Tried]:
        new = [
            Tried(each, Trial(each.config, self._pool_of(each.adapter), self.sites))
            for each in candidates
        ]
        self.tried += new
        return new

    def _finish(self, some: Sequence[Tried]) -> list[Tried]:
        self._go_on(some, self.budget.trial_rounds)
        return list(some)

    def _go_on(self, some: Sequence[Tried], rounds: int) -> None:
        """Let trials go on as far as `rounds` of the steps with which all adapters are tried."""
        until = {
            tried: self.budget.trial_of(rounds, tried.candidate.adapter.max_steps) for tried in some
        }
        going = [tried for tried in some if tried.left(until[tried])]
        self.effort.begin(sum(tried.left(until[tried]) * tried.steps for tried in going))
        for place, tried in enumerate(going, start=1):
            words = f"trial {place} of {len(going)}, round %d of {until[tried]}"
            tried.go_on(until[tried], partial(self._ran, tried.steps, words))

    def _ran(self, steps: int, words: str, number: int) -> None:
        self.effort.add(steps * self.effort.sites, words % number)

    def _close_all_but(self, going: Sequence[Tried]) -> None:
        for tried in self.tried:
            if tried not in going:
                tried.trial.close()

    def _nothing_fits(self) -> str:
        possible = {_named(each) for each in self.all_adapters} - self._impossible.keys()
        if not possible:
            name, why = next(iter(self._impossible.items()))
            return f"budget.target_modules, budget.r: no candidate can be built; {name}: {why}"

        return nothing_fits(self.config, self.free, len(possible))

    def record(self, candidate: Candidate) -> dict[str, Any]:
        """Return the choice, its reason and all trials as JSON values."""
        chosen: dict[str, Any] = {}
        if self.free.target_modules:
            chosen["target_modules"] = _plain(candidate.config.lora.target_modules)
        if self.free.r:
            chosen["r"] = candidate.config.lora.r
        if self.free.max_steps:
            chosen["max_steps"] = candidate.config.train.max_steps
        if self.free.rounds:
            chosen["rounds"] = candidate.config.rounds
        if self.free.codec:
            chosen["codec"] = candidate.config.coding.model_dump(mode="json", exclude_unset=True)
        if self.free.downlink:
            down = candidate.config.downlink
            chosen["downlink"] = down and down.model_dump(mode="json", exclude_unset=True)

        record: dict[str, Any] = {
            "chosen": chosen,
            "up_bytes": candidate.up_bytes,
            "down_bytes": candidate.down_bytes,
            "run_s": candidate.run_s,
            "limits": self.budget.limits,
            "trials": [
                self._row(tried, chosen=tried.candidate is candidate) for tried in self.tried
            ],
        }
        if self.tried:
            record["sites"] = len(self.sites.names)
            record["base_loss"] = base_loss(self._pool_of(candidate.adapter), self.sites)
            steps = candidate.config.train.max_steps or 1
            rounds = self._longest(candidate)
            self.effort.begin(rounds * steps)
            record["alone_loss"] = alone_loss(
                candidate.config,
                self._pool_of(candidate.adapter),
                self.sites,
                rounds,
                lambda: self.effort.add(steps, "at sites that train alone"),
            )

        return record | {"why": reason(record)}

    def _longest(self, candidate: Candidate) -> int:
        """Return the rounds of a trial that is not ended early."""
        return self.budget.trial_of(self.budget.trial_rounds, candidate.adapter.max_steps)

    def _row(self, tried: Tried, *, chosen: bool) -> dict[str, Any]:
        candidate = tried.candidate
        codec = candidate.config.coding
        down = candidate.config.downlink
        return {
            "target_modules": candidate.adapter.target_modules
            or _words(candidate.config.lora.target_modules),
            "r": candidate.config.lora.r,
            "max_steps": candidate.config.train.max_steps,
            "codec": codec.name,
            "rate": _rate(codec, candidate.layout, candidate.frame_bytes),
            "downlink": EXACT if down is None else down.name,
            "down_rate": _rate(down, candidate.layout, candidate.downs[1]),
            "values": candidate.layout.numel,
            "frame_bytes": candidate.frame_bytes,
            "up_bytes": candidate.up_bytes,
            "down_bytes": candidate.down_bytes,
            "run_s": candidate.run_s,
            "rounds": tried.points[-1][0],
            "of_rounds": self._longest(candidate),
            "loss": _finite(tried.loss),
            "points": [[sent, _finite(loss)] for _, sent, loss in tried.points],
            "chosen": chosen,
        }


def _rate(codec: CodecSettings | None, layout: Layout, size: int) -> float:
    """Return the rate that the settings of a codec have, else that of an update of `size` bytes."""
    rate = None if codec is None else codec.model_dump().get("rate")
    return layout.raw_bytes / size if rate is None else float(rate)


def _least(some: Sequence[Tried], count: int) -> list[Tried]:
    return sorted(some, key=lambda tried: tried.loss)[:count]


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _named(adapter: Adapter) -> str:
    return f"rank {adapter.r} on {adapter.target_modules}"


def _plain(targets: str | tuple[str, ...]) -> str | list[str]:
    return list(targets) if isinstance(targets, tuple) else targets


def _words(targets: str | tuple[str, ...]) -> str:
    return "+".join(targets) if isinstance(targets, tuple) else targets
