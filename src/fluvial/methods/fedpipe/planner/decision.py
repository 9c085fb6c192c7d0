"""The decision: of all settings and ranks that keep a site's limits, the ones with the best score.

Inside a setting (format, batch, length, checkpointing, rate, steps) memory and time are linear in
the n parameters of the adapter, so both limits together are one capacity for n, and the ranks are
an exact multiple-choice knapsack. It does not depend on the setting: one table serves all settings
and all sites. The score of a plan is

    value              V retained(rate) - lambda_u (1 - c) - lambda_q err(format)
    value-per-second   V retained(rate) (1 - lambda_q err(format)) c / t

with V = sum S_m E_m(rank), in whole units. The worth of a round's tokens is

    c = (1 - u) / (1 + b / B)

and falls with the batch b: the same tokens are fewer steps, and a step of b sequences lowers the
loss by 1 / (1 + B / b) of what the exact gradient would (McCandlish, Kaplan, Amodei, "An Empirical
Model of Large-Batch Training", 2018, https://arxiv.org/abs/1812.06162). Ties go to the shorter
round, then to the smaller adapter, then to the setting that stands first in the configuration.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from fluvial.methods.fedpipe.planner.candidates import VALUE_UNIT, Candidate
from fluvial.methods.fedpipe.planner.choice import RankChoice, Ranks
from fluvial.methods.fedpipe.planner.formats import Format, Wire, formats_named, layered
from fluvial.methods.fedpipe.planner.memory import MemoryModel
from fluvial.methods.fedpipe.planner.mixing import mixtures, shares_of_layers, with_error
from fluvial.methods.fedpipe.planner.plan import Prediction, Setting, SitePlan
from fluvial.methods.fedpipe.planner.profile import Profile
from fluvial.methods.fedpipe.planner.settings import PlannerSettings
from fluvial.methods.fedpipe.planner.time import TimeModel

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
CHECKPOINTING = {"never": (False,), "always": (True,), "choose": (False, True)}
"""Choices of gradient checkpointing by the setting."""


@dataclass(frozen=True)
class Models:
    """A site's profile, and the models that follow from it."""

    profile: Profile
    memory: MemoryModel
    time: TimeModel

    def to_json(self) -> dict[str, Any]:
        """Return both models as JSON values, for the record of a run."""
        return {"memory": self.memory.to_json(), "time": self.time.to_json()}


@dataclass(frozen=True)
class Room:
    """A setting at a site, and the largest adapter that fits there."""

    setting: Setting
    format: Format
    wire: Wire
    memory: int
    """Parameters that the memory has room for; negative where not even the base fits."""
    time: int | None
    """Parameters that the deadline has room for, negative where not even the steps do; None without
    a deadline."""
    fixed_s: Fraction
    """Seconds of the round without an adapter."""
    each_s: Fraction
    """Seconds for each parameter."""
    side_s: Fraction
    """Seconds for each parameter of a side path."""
    beside: int
    """Parameters of the run's adapter; what is not trained of them may become a side path."""
    unprocessed: Fraction
    """Share of the site's tokens that a round does not process, u."""
    worth: Fraction
    """Worth of the tokens that it processes, c, from 0 to 1."""

    @property
    def capacity(self) -> int:
        """Return the parameters that both limits have room for."""
        return self.memory if self.time is None else min(self.memory, self.time)

    def seconds(self, lora: int) -> float:
        """Return the seconds of the round, rounded once."""
        return float(self.fixed_s + self.each_s * lora)

    def most_seconds(self, lora: int) -> float:
        """Return the seconds of the round with the largest side path, which a deadline bounds."""
        side = max(0, self.beside - lora)
        return float(self.fixed_s + self.each_s * lora + self.side_s * side)


SIDE_BYTES = 4
"""Bytes of a parameter of a side path, which is frozen and fp32."""


class Planner:
    """Plans of all sites for one set of candidates."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        settings: PlannerSettings,
        *,
        length: int,
        format: str | Format,
        rates: Sequence[int] = (1,),
        beside: int = 0,
        seed: int = 0,
    ) -> None:
        """Take the run's own `length` and `format` where the settings name none.

        `rates` are the codecs to choose from, of a run with one codec that of this codec. `beside`
        are the parameters of the run's adapter: what a site does not train of them may become a
        side path at any time, for which its memory must have room.
        """
        self.beside = beside
        self.settings = settings
        self.choice = RankChoice(candidates, settings.ranks, settings.granularity, seed=seed)
        self.lengths = settings.lengths or (length,)
        own = (format,) if isinstance(format, Format) else formats_named((format,))
        self.formats = formats_named(settings.formats) or own
        self.wires = [Wire.of(rate) for rate in rates]

    def at_rates(self, rates: Sequence[int]) -> "Planner":
        """Return a planner for time on the link with other codecs to choose from, which shares the
        solved knapsack."""
        other = copy.copy(self)
        other.settings = self.settings.model_copy(update={"objective": "value-per-second"})
        other.wires = [Wire.of(rate) for rate in rates]
        return other

    @property
    def least(self) -> int:
        """Return the parameters of the smallest adapter that a plan may have."""
        return self.choice.least(self.settings.selection)

    def fits(self, models: Models, deadline_s: float | None = None) -> bool:
        """Return whether a site has a plan: something was measured, and some setting has room for
        the smallest adapter."""
        if models.profile.unmeasured:
            return False
        return any(room.capacity >= self.least for room in self.rooms(models, deadline_s))

    def plan(self, models: Models, deadline_s: float | None = None) -> SitePlan | None:
        """Return the best plan of a site, or None where no setting has room for an adapter, or
        where nothing was measured."""
        if models.profile.unmeasured:
            return None

        best: tuple[float, float, int, int] | None = None
        chosen: tuple[Room, Ranks] | None = None

        for bound, place, room in self._promising(models, deadline_s):
            if best is not None and bound < -best[0]:
                break  # no later setting can be better

            ranks = self._best(room)
            score = self.score(room, ranks)
            key = (-score, room.seconds(ranks.lora), ranks.lora, place)
            if best is None or key < best:
                best = key
                chosen = (room, ranks)

        return None if chosen is None else self._site_plan(models, *chosen)

    def rooms(self, models: Models, deadline_s: float | None = None) -> Iterator[Room]:
        """Yield every setting of a site in order of the configuration, also those without room."""
        for format, length, batch, checkpointing, wire in product(
            self.choices(models),
            self.lengths,
            self.settings.batches,
            CHECKPOINTING[self.settings.checkpointing],
            self.wires,
        ):
            full = -(-models.profile.samples // batch)
            for steps in dict.fromkeys(
                -(-full * eighths // 8) for eighths in self.settings.eighths
            ):
                setting = Setting(
                    format.name, batch, length, checkpointing, wire.rate, steps, format.layers
                )
                yield self._room(models, setting, format, deadline_s)

    def choices(self, models: Models) -> list[Format]:
        """Return the formats of a site's base, each for all layers, then two of them by layer."""
        errors = models.profile.errors
        shares = self._shares(models)
        mixed = mixtures(
            self.formats, models.memory.sizes, errors, shares, self.settings.layer_groups
        )
        return [with_error(format, errors, shares) for format in (*self.formats, *mixed)]

    def _shares(self, models: Models) -> tuple[float, ...]:
        return shares_of_layers(self.choice.candidates, models.memory.sizes.layers)

    def room(self, models: Models, setting: Setting, deadline_s: float | None = None) -> Room:
        """Return the room of one setting."""
        format = layered(setting.format, setting.layer_formats)
        format = with_error(format, models.profile.errors, self._shares(models))
        return self._room(models, setting, format, deadline_s)

    def _room(
        self, models: Models, setting: Setting, format: Format, deadline_s: float | None
    ) -> Room:
        profile = models.profile
        wire = Wire.of(setting.rate)
        shape = (setting.batch, setting.length)
        tokens = processed(profile, setting)

        free = profile.memory_bytes - self.memory_bytes(models, setting, 0)
        for_each = models.memory.for_each(*shape, checkpointing=setting.checkpointing)
        if self.beside:
            for_each -= SIDE_BYTES  # a trained parameter is no part of the side path
        fixed_s, each_s = models.time.line(
            profile,
            format,
            wire,
            batch=setting.batch,
            tokens=tokens,
            checkpointing=setting.checkpointing,
            modules=len(self.choice.candidates),
        )

        side_s = Fraction(0)
        if self.beside:
            side_s = sum(
                models.time.side_path(
                    profile,
                    format,
                    batch=setting.batch,
                    tokens=tokens,
                    checkpointing=setting.checkpointing,
                ),
                Fraction(0),
            )

        time = None
        if deadline_s is not None:
            spare_s = Fraction(deadline_s) / Fraction(self.settings.safety)
            spare_s -= fixed_s + side_s * self.beside
            time = int(spare_s // (each_s - side_s)) if spare_s >= 0 else -1

        return Room(
            setting,
            format,
            wire,
            int(free // for_each) if free >= 0 else -1,
            time,
            fixed_s,
            each_s,
            side_s,
            self.beside,
            1 - Fraction(tokens, profile.all_tokens),
            Fraction(tokens, profile.all_tokens) * self._worth(setting.batch),
        )

    def _worth(self, batch: int) -> Fraction:
        """Return the worth of a token in a pass of `batch` sequences: 1 for batches that are small
        beside the critical one."""
        return 1 / (1 + batch / Fraction(self.settings.critical_batch))

    def memory_bytes(self, models: Models, setting: Setting, lora: int) -> int:
        """Return the most bytes that a site needs for an adapter of `lora` parameters, and for all
        others of the run's adapter as a side path."""
        trained = models.memory.total(
            layered(setting.format, setting.layer_formats),
            setting.batch,
            setting.length,
            checkpointing=setting.checkpointing,
            lora=lora,
        )
        return trained + SIDE_BYTES * max(0, self.beside - lora)

    def score(self, room: Room, ranks: Ranks) -> float:
        """Return the score of ranks within a room, by the objective."""
        return float(self._scores(room, np.array([ranks.value]), np.array([ranks.lora]))[0])

    def evaluated(
        self, models: Models, plan: SitePlan, deadline_s: float | None = None
    ) -> SitePlan | None:
        """Return an earlier plan with the figures of a present profile and present scores, or None
        where it no longer fits the site or these candidates."""
        known = {candidate.module for candidate in self.choice.candidates}
        if not known.issuperset(module for module, _ in plan.ranks):
            return None

        room = self.room(models, plan.setting, deadline_s)
        ranks = self.choice.of(dict(plan.ranks))
        return None if ranks.lora > room.capacity else self._site_plan(models, room, ranks)

    def gap(self, models: Models, plan: SitePlan, deadline_s: float | None = None) -> float:
        """Return the share of value, at most, by which other ranks in the setting of a plan would
        be better; 0 where the knapsack is exact.

        Under "value-per-second" these are other ranks with as many parameters.
        """
        knapsack = self.choice.knapsack
        if knapsack.exact or self.settings.selection != "importance":
            return 0.0

        capacity = self.choice.of(dict(plan.ranks)).lora
        if self.settings.objective == "value":
            capacity = self.room(models, plan.setting, deadline_s).capacity
        return max(0.0, knapsack.bound(capacity) / plan.value - 1)

    def _promising(self, models: Models, deadline_s: float | None) -> list[tuple[float, int, Room]]:
        """Return the settings with room, those with the highest bound of their score first."""
        bounded = [
            (self._bound(room), place, room)
            for place, room in enumerate(self.rooms(models, deadline_s))
            if room.capacity >= self.least
        ]
        return sorted(bounded, key=lambda entry: (-entry[0], entry[1]))

    def _bound(self, room: Room) -> float:
        """Return a score that no plan within `room` exceeds."""
        most = np.array([self.choice.knapsack.value(room.capacity)])
        return float(self._scores(room, most, np.array([0]))[0])

    def _best(self, room: Room) -> Ranks:
        """Return the ranks with the best score within a setting; of equal ones the fewest
        parameters."""
        if self.settings.selection != "importance" or self.settings.objective == "value":
            return self.choice.within(room.capacity, self.settings.selection)

        knapsack = self.choice.knapsack
        last = knapsack.column(room.capacity)
        columns = knapsack.steps[1 : np.searchsorted(knapsack.steps, last) + 1]
        scores = self._scores(room, knapsack.values[columns], columns * knapsack.unit)
        return self.choice.at(int(columns[np.argmax(scores)]))

    def _scores(self, room: Room, values: IntArray, lora: IntArray) -> FloatArray:
        """Return the scores of adapters with `values` (n,) and parameters `lora` (n,).

        Each operation is rounded as IEEE 754 says, entry by entry, so all machines agree.
        """
        error = self.settings.weight_of_error * room.format.error
        value: FloatArray = values * np.float64(room.wire.retained / VALUE_UNIT)
        if self.settings.objective == "value":
            value -= self.settings.weight_of_data * float(1 - room.worth) + error
            return value

        gain = value * (max(0.0, 1 - error) * float(room.worth))
        scores: FloatArray = gain / (float(room.fixed_s) + lora * float(room.each_s))
        return scores

    def _site_plan(self, models: Models, room: Room, ranks: Ranks) -> SitePlan:
        setting = room.setting
        seconds = models.time.seconds(
            models.profile,
            room.format,
            room.wire,
            batch=setting.batch,
            tokens=processed(models.profile, setting),
            checkpointing=setting.checkpointing,
            lora=ranks.lora,
            modules=len(ranks.ranks),
        )
        prediction = Prediction(
            models.memory.total(
                room.format,
                setting.batch,
                setting.length,
                checkpointing=setting.checkpointing,
                lora=ranks.lora,
            ),
            models.time.bytes_up(ranks.lora, len(ranks.ranks), room.wire),
            models.time.bytes_down(ranks.lora, len(ranks.ranks)),
            seconds.compute_s,
            seconds.link_s,
        )
        return SitePlan(
            setting,
            ranks.ranks,
            ranks.value,
            self.score(room, ranks),
            float(room.unprocessed),
            prediction,
        )


def processed(profile: Profile, setting: Setting) -> int:
    """Return the tokens of a round's steps, of sequences of the site's mean length."""
    sequences = min(setting.steps * setting.batch, profile.samples)
    return -(-profile.tokens_at(setting.length) * sequences // profile.samples)
