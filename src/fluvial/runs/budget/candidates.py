"""Candidates of a budget: what is open, what can be in its place, and what each costs."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fluvial.codecs import CodecSettings, build, read_settings
from fluvial.codecs.coding_time import coding_s
from fluvial.errors import ConfigError
from fluvial.federation.line import round_s
from fluvial.methods.measuring import Texts
from fluvial.models.pool import ModelPool
from fluvial.runs.budget.config import BudgetConfig
from fluvial.runs.budget.settled import Open
from fluvial.runs.config import RunConfig
from fluvial.runs.opening import check_settings
from fluvial.runs.step_time import Clock, time_steps
from fluvial.wire.tensors import Layout

FINEST = 8.0
"""Least rate of a codec with a rate: above it, `int4` and `int8` need no more bytes."""
COARSEST = 1024.0
"""Largest rate of a codec with a rate."""
UNRATED = ("int8", "int4")
"""Codecs without a rate."""
TRIES = 8
"""Rates that are tried at most, until the predicted bytes fit."""
LATER = 2
"""A round that sends what most rounds send: in the first, sites make the adapter themselves."""


@dataclass(frozen=True)
class Adapter:
    """An adapter and the local steps that tune it; None stands for what the configuration sets."""

    target_modules: str | None
    r: int | None
    max_steps: int | None


@dataclass(frozen=True)
class Candidate:
    """Everything that is chosen, and what a run with it costs."""

    adapter: Adapter
    config: RunConfig
    """The run's configuration with this choice."""
    layout: Layout
    """The adapter's tensors."""
    frame_bytes: int
    """Bytes of a coded update, at most."""
    up_bytes: int
    """Bytes that a site sends in all rounds, at most."""
    downs: tuple[int, int]
    """Bytes that a site receives in round 1, and in each later round, at most."""
    train_s: float | None
    """Seconds of a site's steps and coding in a round; None without a limit of time."""
    run_s: float | None
    """Seconds of all rounds over the line; None without a limit of time."""

    @property
    def down_bytes(self) -> int:
        """Return the bytes that a site receives in all rounds, at most."""
        first, later = self.downs
        return first + (self.config.rounds - 1) * later


def adapters(budget: BudgetConfig, free: Open) -> list[Adapter]:
    """Return all adapters with all numbers of steps, in the order of the settings."""
    targets = list(dict.fromkeys(budget.target_modules)) if free.target_modules else [None]
    ranks = sorted(set(budget.r)) if free.r else [None]
    steps = sorted(set(budget.max_steps)) if free.max_steps else [None]
    return [Adapter(t, r, s) for t in targets for r in ranks for s in steps]


def with_choice(config: RunConfig, adapter: Adapter, codec: CodecSettings | None) -> RunConfig:
    """Return `config` with an adapter, its steps and a codec in the place of what is open.

    Raises `ConfigError` where they do not go with the rest.
    """
    table = config.model_dump(exclude_unset=True)
    lora: dict[str, Any] = table.setdefault("lora", {})
    if adapter.target_modules is not None:
        lora["target_modules"] = _targets(adapter.target_modules)
    if adapter.r is not None:
        lora["r"] = adapter.r
    if adapter.max_steps is not None:
        table.setdefault("train", {})["max_steps"] = adapter.max_steps
    if codec is not None:
        table["codec"] = codec.model_dump(exclude_unset=True)
    if not lora:
        del table["lora"]

    return type(config).model_validate(table)


def _targets(name: str) -> str | tuple[str, ...] | None:
    if name in ("default", "all-linear"):
        return None if name == "default" else name
    return tuple(name.split("+"))


@dataclass(frozen=True)
class Costs:
    """Prediction of what candidates cost, from the configuration, the base's shapes and this
    machine."""

    config: RunConfig
    budget: BudgetConfig
    texts: Texts
    clock: Clock = time.perf_counter

    def candidates(
        self, adapter: Adapter, pool: ModelPool, codecs: Sequence[str | None]
    ) -> Iterator[Candidate]:
        """Yield the candidates of an adapter within the budget, one for each of `codecs`; None is
        the configuration's own. A codec with a rate has the lowest that fits.

        Raises `ConfigError` where the adapter does not go with the rest of the configuration.
        """
        for codec in codecs:
            candidate = self._within(adapter, pool, codec)
            if candidate is not None:
                yield candidate

    def _within(self, adapter: Adapter, pool: ModelPool, codec: str | None) -> Candidate | None:
        rated = codec is not None and codec not in UNRATED
        settings = None if codec is None else _settings(codec, FINEST if rated else None)
        try:
            candidate = self._of(adapter, pool, settings)
            if self._fits(candidate):
                return candidate
            return self._coarser(candidate, codec, pool) if codec and rated else None
        except NoRoomError:
            return None

    def _coarser(self, finest: Candidate, codec: str, pool: ModelPool) -> Candidate | None:
        """Return the candidate with about the lowest rate whose predicted bytes fit, None where
        there is none; raises `NoRoomError`.

        What surrounds a frame, and the doubt about its length, are known once a rate is tried.
        """
        most = self._most_up(finest)
        around = 0
        best = None

        for _ in range(TRIES):
            if most <= around:
                break
            rate = math.ceil(100 * max(finest.layout.raw_bytes / (most - around), FINEST)) / 100
            if rate > COARSEST:
                break
            candidate = self._of(finest.adapter, pool, _settings(codec, rate))
            if self._fits(candidate) and (best is None or candidate.frame_bytes > best.frame_bytes):
                best = candidate
            needed = candidate.up_bytes // self.config.rounds - candidate.frame_bytes
            if best is not None and needed >= around:
                break
            around = needed if needed > around else around + max(1, most // 100)

        return best

    def _of(self, adapter: Adapter, pool: ModelPool, codec: CodecSettings | None) -> Candidate:
        """Return a candidate with its costs; raises `NoRoomError` for a codec that has no room for
        the layout at this rate."""
        config = with_choice(self.config, adapter, codec)
        try:
            forecast = check_settings(config, pool.layout, pool.outline.base, self.texts).forecast()
        except ConfigError as error:
            if codec is not None and str(error).startswith("codec"):
                raise NoRoomError(str(error)) from None
            raise

        first, later = (forecast.traffic(min(n, config.rounds)) for n in (1, LATER))
        down = forecast.down if later.down.unknown else later.down.most
        up = forecast.frame if later.up.unknown else later.up.most
        downs = (first.down.most, down)
        train_s = None if self.budget.run_s is None else self._train_s(config, pool)

        return Candidate(
            adapter=adapter,
            config=config,
            layout=pool.layout,
            frame_bytes=forecast.frame,
            up_bytes=config.rounds * up,
            downs=downs,
            train_s=train_s,
            run_s=None if train_s is None else self._run_s(downs, up, train_s),
        )

    def _fits(self, candidate: Candidate) -> bool:
        budget = self.budget
        few = budget.up_bytes is None or candidate.up_bytes <= budget.up_bytes
        return few and (candidate.run_s is None or candidate.run_s <= (budget.run_s or math.inf))

    def _most_up(self, candidate: Candidate) -> int:
        """Return the bytes that a site may send in a round, 0 where there is no time for any."""
        rounds = self.config.rounds
        budget = self.budget
        most = candidate.up_bytes if budget.up_bytes is None else budget.up_bytes
        most //= rounds
        if budget.run_s is None or candidate.train_s is None:
            return most

        fits = 0
        while most - fits > 1:  # the time grows with the bytes
            middle = (fits + most) // 2
            if self._run_s(candidate.downs, middle, candidate.train_s) <= budget.run_s:
                fits = middle
            else:
                most = middle

        return fits

    def _run_s(self, downs: tuple[int, int], up: int, train_s: float) -> float:
        """Return the seconds of all rounds, with `up` bytes of a site in each."""
        first_s, later_s = (self._round_s(down, up, train_s) for down in downs)
        return first_s + (self.config.rounds - 1) * later_s

    def _round_s(self, down: int, up: int, train_s: float) -> float:
        line = self.config.fleet.line
        assert line is not None, "a limit of time needs a line"
        cohort = self.config.method.cohort(len(self.texts.names))
        return round_s(down, up, sites=cohort, line=line, train_s=train_s)

    def _train_s(self, config: RunConfig, pool: ModelPool) -> float:
        """Return the seconds of a site in a round, as measured here: its steps and its codec."""
        examples = max(self.texts.public().values(), key=len)
        step_s, call_s = time_steps(config, pool, examples, self.clock)
        coding = coding_s(build(config.coding, pool.layout), self.clock)
        return config.train.steps(len(examples)) * step_s + call_s + coding


class NoRoomError(Exception):
    """A codec has no room for a layout at its rate."""


def _settings(codec: str, rate: float | None) -> CodecSettings:
    table: dict[str, object] = {"name": codec, "error_feedback": True}
    return read_settings(table if rate is None else {**table, "rate": rate})
