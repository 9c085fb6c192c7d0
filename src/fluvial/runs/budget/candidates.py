"""Candidates of a budget: what is open, what can be in its place, and what each costs."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from fluvial.codecs import CodecSettings, build
from fluvial.codecs.base import Codec
from fluvial.codecs.coding_time import coding_s
from fluvial.codecs.forecast import frame_size, shrunk
from fluvial.errors import ConfigError
from fluvial.federation.line import round_s
from fluvial.methods.measuring import Texts
from fluvial.models.pool import ModelPool
from fluvial.runs.budget.config import BudgetConfig
from fluvial.runs.budget.pairs import COARSEST, FINEST, Pair
from fluvial.runs.budget.settled import Open
from fluvial.runs.config import RunConfig
from fluvial.runs.opening import check_settings
from fluvial.runs.step_time import Clock, time_steps
from fluvial.storage import toml
from fluvial.wire.tensors import Layout

TIMED = 2**20
"""Values of the update by which a codec is timed, at most."""
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
    pair: Pair
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
    def up(self) -> int:
        """Return the bytes that a site sends in a round, at most."""
        return self.up_bytes // self.config.rounds

    @property
    def down_bytes(self) -> int:
        """Return the bytes that a site receives in all rounds, at most."""
        first, later = self.downs
        return first + (self.config.rounds - 1) * later

    @property
    def bits(self) -> tuple[float, float]:
        """Return the bits of a value in a round, first of the way that has fewer."""
        low, high = sorted((self.frame_bytes, self.downs[1]))
        return 8 * low / self.layout.numel, 8 * high / self.layout.numel


def adapters(budget: BudgetConfig, free: Open) -> list[Adapter]:
    """Return all adapters with all numbers of steps, in the order of the settings."""
    targets = list(dict.fromkeys(budget.target_modules)) if free.target_modules else [None]
    ranks = sorted(set(budget.r)) if free.r else [None]
    return [Adapter(t, r, s) for t in targets for r in ranks for s in steps_tried(budget, free)]


def steps_tried(budget: BudgetConfig, free: Open) -> list[int | None]:
    """Return the numbers of steps of a round, first that with which all adapters are tried; None
    stands for what the configuration sets."""
    if not free.max_steps:
        return [None]
    first = budget.first_steps
    return [first, *sorted(set(budget.max_steps) - {first})]


def with_choice(
    config: RunConfig,
    adapter: Adapter,
    codec: CodecSettings | None = None,
    downlink: CodecSettings | None = None,
) -> RunConfig:
    """Return `config` with an adapter, its steps and codecs in the place of what is open.

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
        if config.budget is not None and config.budget.total_steps is not None:
            table["rounds"] = config.budget.rounds_of(adapter.max_steps)
    if codec is not None:
        table["codec"] = codec.model_dump(exclude_unset=True)
    if downlink is not None:
        table["downlink"] = downlink.model_dump(exclude_unset=True)
    if not lora:
        del table["lora"]

    return toml.read(type(config), table, "a candidate of the budget")


def _with_all_sites(config: RunConfig) -> RunConfig:
    """Return a configuration whose sites take part in each round: no site moves more bytes."""
    return config.model_copy(update={"method": config.method.with_all_sites()})


def _targets(name: str) -> str | tuple[str, ...]:
    return name if name in ("attention", "all-linear") else tuple(name.split("+"))


@dataclass(frozen=True)
class Costs:
    """Prediction of what candidates cost, from the configuration, the base's shapes and this
    machine."""

    config: RunConfig
    budget: BudgetConfig
    texts: Texts
    clock: Clock = time.perf_counter
    _timed: dict[tuple[Any, ...], tuple[float, float]] = field(default_factory=dict)
    """Seconds of a step and of a call beside it, or of a codec, by what was timed."""

    def candidates(
        self, adapter: Adapter, pool: ModelPool, tried: Iterable[Pair]
    ) -> Iterator[Candidate]:
        """Yield the candidates of an adapter within the budget, one for each pair of codecs that is
        `tried`. Codecs with a rate have the lowest that fits.

        Raises `ConfigError` where the adapter does not go with the rest of the configuration.
        """
        for pair in tried:
            candidate = self._within(adapter, pool, pair)
            if candidate is not None:
                yield candidate

    def first(self, adapter: Adapter, pool: ModelPool, tried: Sequence[Pair]) -> Candidate | None:
        """Return the candidate of the first of `tried` that fits, None where none does.

        Those whose downlink is chosen and that have a rate come last, the one first whose coarser
        codec has the most bits, as far as transfer and steps tell. Raises as `candidates`.
        """
        rated = [pair for pair in tried if pair.down is not None and pair.rated]
        plain = [pair for pair in tried if pair not in rated]
        finest = []
        found = next(self.candidates(adapter, pool, plain), None)
        for pair in rated if found is None else []:
            with suppress(NoRoomError):
                finest.append(self._of(adapter, pool, pair, FINEST))

        finest.sort(key=self._room, reverse=True)
        later = self.candidates(adapter, pool, [each.pair for each in finest])
        return found or next(later, None)

    def starts(self, adapter: Adapter, pool: ModelPool, tried: Sequence[Pair]) -> list[Candidate]:
        """Return the candidates with which the trials of an adapter begin: the first that fits, and
        where this has one codec with a rate for both ways, each other such codec.

        Which of these loses less depends on the adapter: of matrices of rank 1 `powersgd` has
        nothing to leave out. Raises as `candidates`.
        """
        first = self.first(adapter, pool, tried)
        if first is None or not first.pair.is_one_codec:
            return [] if first is None else [first]
        others = [pair for pair in tried if pair.is_one_codec and pair != first.pair]
        return [first, *self.candidates(adapter, pool, others)]

    def _room(self, finest: Candidate) -> tuple[float, float]:
        """Return the bits of a value, first of the way that has fewer, with which a pair whose
        `finest` candidate this is would take all of the budget."""
        most = self._most(finest, finest.train_s)
        up = most if finest.pair.rated_up else finest.frame_bytes
        down = most if finest.pair.rated_down else finest.downs[1]
        return replace(finest, frame_bytes=up, downs=(finest.downs[0], down)).bits

    def _within(self, adapter: Adapter, pool: ModelPool, pair: Pair) -> Candidate | None:
        try:
            candidate = self._of(adapter, pool, pair, FINEST)
            if self._fits(candidate) or not pair.rated:
                return candidate if self._fits(candidate) else None
            return self._coarser(candidate, pool)
        except NoRoomError:
            return None

    def _coarser(self, finest: Candidate, pool: ModelPool) -> Candidate | None:
        """Return the candidate with about the lowest rate whose predicted bytes fit, None where
        there is none; raises `NoRoomError`. If both codecs have a rate, it is the same.

        What surrounds a frame, the doubt about its length, and the time of coding are known once a
        rate is tried.
        """
        latest = finest
        around = 0
        best = None

        for _ in range(TRIES):
            most = self._most(finest, latest.train_s)
            if most <= around:
                break
            rate = math.ceil(100 * max(finest.layout.raw_bytes / (most - around), FINEST)) / 100
            if rate > COARSEST:
                break
            latest = self._of(finest.adapter, pool, finest.pair, rate)
            if self._fits(latest) and (best is None or latest.bits > best.bits):
                best = latest
            needed = self._around(latest, rate)
            more = self._most(finest, latest.train_s) > 1.01 * most
            if best is not None and needed >= around and not more:
                break
            around = needed if needed > around else around + max(1, most // 100)

        return best

    def _of(self, adapter: Adapter, pool: ModelPool, pair: Pair, rate: float) -> Candidate:
        """Return a candidate with its costs; raises `NoRoomError` for a codec that has no room for
        the layout at this rate."""
        codec = pair.codec(rate)
        downlink = pair.downlink(rate)
        config = with_choice(self.config, adapter, codec, downlink)
        every = _with_all_sites(config)
        try:
            forecast = check_settings(every, pool.layout, pool.outline.base, self.texts).forecast()
        except ConfigError as error:
            chosen = {"codec": codec, "downlink": downlink}
            if any(each and str(error).startswith(name) for name, each in chosen.items()):
                raise NoRoomError(str(error)) from None
            raise

        rounds = config.rounds
        first, later = (forecast.traffic(min(n, rounds)) for n in (1, LATER))
        down = forecast.down if later.down.unknown else later.down.most
        up = forecast.frame if later.up.unknown else later.up.most
        downs = (first.down.most, down)
        train_s = None
        if self.budget.run_s is not None:
            train_s = self._train_s(config, pool)
            if self._run_s(rounds, downs, up, train_s) <= self.budget.run_s:  # else it is too slow
                train_s += self._both_codings_s(config, pool.layout)

        return Candidate(
            adapter=adapter,
            pair=pair,
            config=config,
            layout=pool.layout,
            frame_bytes=forecast.frame,
            up_bytes=rounds * up,
            downs=downs,
            train_s=train_s,
            run_s=None if train_s is None else self._run_s(rounds, downs, up, train_s),
        )

    def _fits(self, candidate: Candidate) -> bool:
        rounds = candidate.config.rounds
        return self._affords(rounds, candidate.downs, candidate.up, candidate.train_s)

    def _affords(self, rounds: int, downs: tuple[int, int], up: int, train_s: float | None) -> bool:
        """Return whether the budget has what all rounds need, with `up` bytes of a site in each."""
        budget = self.budget
        first, later = downs
        sent = rounds * up
        received = first + (rounds - 1) * later
        return (
            sent <= (budget.up_bytes or math.inf)
            and sent + received <= (budget.total_bytes or math.inf)
            and (
                train_s is None
                or self._run_s(rounds, downs, up, train_s) <= (budget.run_s or math.inf)
            )
        )

    def _around(self, candidate: Candidate, rate: float) -> int:
        """Return the bytes of a round beyond a frame with a rate, of the way that has more."""
        if not candidate.pair.rated_down:
            return candidate.up - candidate.frame_bytes
        most = max(candidate.downs[1], candidate.up if candidate.pair.rated_up else 0)
        return most - int(candidate.layout.raw_bytes / rate)

    def _most(self, finest: Candidate, train_s: float | None) -> int:
        """Return the bytes that a site may have in a round beside `train_s`, in each way whose
        codec has a rate; 0 where the budget has room for none."""
        pair = finest.pair
        up = finest.up
        most = max(up, finest.downs[1]) if pair.rated_down else up

        fits = 0
        while most - fits > 1:  # bytes and time grow together
            middle = (fits + most) // 2
            downs = (finest.downs[0], middle if pair.rated_down else finest.downs[1])
            sent = middle if pair.rated_up else up
            if self._affords(finest.config.rounds, downs, sent, train_s):
                fits = middle
            else:
                most = middle

        return fits

    def _run_s(self, rounds: int, downs: tuple[int, int], up: int, train_s: float) -> float:
        """Return the seconds of all rounds, with `up` bytes of a site in each."""
        first_s, later_s = (self._round_s(down, up, train_s) for down in downs)
        return first_s + (rounds - 1) * later_s

    def _round_s(self, down: int, up: int, train_s: float) -> float:
        line = self.config.fleet.line
        assert line is not None, "a limit of time needs a line"
        cohort = self.config.method.cohort(len(self.texts.names))
        return round_s(down, up, sites=cohort, line=line, train_s=train_s)

    def _train_s(self, config: RunConfig, pool: ModelPool) -> float:
        """Return the seconds of a site's steps in a round, as measured here."""
        examples = max(self.texts.public().values(), key=len)
        tuned: tuple[Any, ...] = (pool.layout, config.train.per_device_train_batch_size)
        if tuned not in self._timed:
            self._timed[tuned] = time_steps(config, pool, examples, self.clock)

        step_s, call_s = self._timed[tuned]
        return config.train.steps(len(examples)) * step_s + call_s

    def _both_codings_s(self, config: RunConfig, layout: Layout) -> float:
        """Return the seconds of the codecs of both ways in a round, as measured here."""
        codecs = [config.coding] + ([] if config.downlink is None else [config.downlink])
        return math.fsum(self._coding_s(codec, layout) for codec in codecs)

    def _coding_s(self, codec: CodecSettings, layout: Layout) -> float:
        """Return the seconds of a codec, timed once for frames of about one size; those of a large
        layout follow from smaller tensors."""
        coded = (layout, codec.name, frame_size(codec, layout).bit_length())
        if coded not in self._timed:
            timed = _timed_codec(codec, layout)
            seconds = coding_s(timed, self.clock) * layout.numel / timed.layout.numel
            self._timed[coded] = (seconds, 0.0)
        return self._timed[coded][0]


def _timed_codec(codec: CodecSettings, layout: Layout) -> Codec:
    """Return the codec to time: for `layout`, or if that is large for smaller tensors, where these
    have room for it."""
    if layout.numel > TIMED:
        with suppress(ConfigError):
            return build(codec, shrunk(layout, TIMED))
    return build(codec, layout)


class NoRoomError(Exception):
    """A codec has no room for a layout at its rate."""
