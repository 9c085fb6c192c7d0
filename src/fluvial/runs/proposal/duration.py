"""The time of a proposed run on this machine, and a short run for a first look.

A small model is timed as `fluvial check --time` times it. A larger one, or much text, would take
long to load: its time follows from its parameters, the tokens, and a product of matrices here.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fluvial.models.generation import AT_ONCE
from fluvial.models.loading import resolve_device
from fluvial.models.pretrained import dtype_of
from fluvial.models.threads import with_threads
from fluvial.runs.config import RunConfig
from fluvial.runs.proposal.aims import SMALL
from fluvial.runs.proposal.document import toml_value
from fluvial.runs.proposal.lengths import Lengths
from fluvial.runs.proposal.models import ModelFacts
from fluvial.runs.remaining import rough
from fluvial.runs.timed_plan import runs_s
from fluvial.runs.timing import MeasuredTimes, measure

LONG_S = 300.0
"""Seconds of a run from which a shorter one is proposed for a first look."""
FIRST_LOOK_S = 180.0
"""Seconds that a first look aims at."""
LEAST_ROUNDS = 2
"""Rounds of a first look at least."""
SHORTER: Sequence[Mapping[str, Any]] = (
    {},
    {"data.max_heldout": 16},
    {"data.max_heldout": 8, "compare": ()},
    {"data.max_heldout": 4, "compare": (), "train.max_steps": 2},
)
"""Settings of a first look beside its rounds; the first that make it short enough are taken."""
ENOUGH_S = 0.2
"""Seconds of optimizer steps that are timed, about: less than `check --time` takes for them."""
MOST_TOKENS = 2_000_000
"""Tokens of all records that are read once more to time a step."""
EFFICIENCY = 0.5
"""Share of a product's speed that a training step reaches, about."""
LAYER_S = {"cpu": 5e-3, "cuda": 5e-4}
"""Seconds of a pass through a layer beside its products of matrices, about, by the kind of
device."""
_PRODUCT = {"cpu": 512, "cuda": 8192}
"""Rows and columns of the product that is timed, by the kind of device."""

Seconds = Callable[[RunConfig], float]


@dataclass(frozen=True)
class Duration:
    """The time of a run on this machine, and of a shorter one."""

    run_s: float
    is_measured: bool
    """True where a step of the model was timed; else the time is rougher."""
    overrides: Sequence[str] = ()
    """Values of `--set` for a first look; none where the run itself is short."""
    first_look_s: float = 0.0

    def words(self) -> str:
        """Return the time of the run, and how it is known."""
        how = "" if self.is_measured else ", by the size of the model"
        return f"about {rough(self.run_s)} here{how}"


def duration_of(
    config: RunConfig, sites: Sequence[Mapping[str, Any]], model: ModelFacts, lengths: Lengths
) -> Duration:
    """Return the time of a run; `sites` are those of `plan.plan`, `lengths` those of its records.

    Raises `ConfigError` for a small model that cannot be loaded.
    """
    records = sum(site["records"] for site in sites)
    is_small = model.parameters < SMALL and records * lengths.mean < MOST_TOKENS
    ahead_s = 0.0
    if is_small:
        found, _, ahead_of_rounds = measure(config, enough_s=ENOUGH_S)
        coding = found.coding
        ahead_s = found.load_s + ahead_of_rounds.seconds(
            step_s=found.step_s, call_s=found.call_s, coding_s=coding.coding_s if coding else 0.0
        )
    else:
        found = _estimated(config, model, lengths)

    def seconds(changed: RunConfig) -> float:
        return ahead_s + runs_s(changed, found, _measured(changed, sites))

    run_s = seconds(config)
    overrides, first_look_s = first_look(config, seconds) if run_s > LONG_S else ((), 0.0)
    return Duration(run_s, is_small, overrides, first_look_s)


def first_look(config: RunConfig, seconds: Seconds) -> tuple[list[str], float]:
    """Return the values of `--set` that make a run short, and its seconds.

    Rounds are taken away first, and other settings where `LEAST_ROUNDS` still take too long.
    """
    for each in SHORTER:
        changes = {name: _lower(_value(config, name), value) for name, value in each.items()}
        changed = _with(config, {**changes, "rounds": LEAST_ROUNDS})
        if seconds(changed) <= LONG_S:
            break

    least_s = seconds(changed)
    round_s = seconds(_with(changed, {"rounds": LEAST_ROUNDS + 1})) - least_s
    further = max(0, int((FIRST_LOOK_S - least_s) / max(round_s, 1e-9)))
    changes = {"rounds": min(config.rounds, LEAST_ROUNDS + further), **changes}
    set_here = [
        f"{name}={toml_value(value)}"
        for name, value in changes.items()
        if value != _value(config, name)
    ]
    return set_here, seconds(_with(config, changes))


def _with(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return the settings with some changed, each named as `--set` names it."""
    for name, value in changes.items():
        table, _, key = name.rpartition(".")
        if not table:
            config = config.model_copy(update={key: value})
            continue
        before = getattr(config, table)
        config = config.model_copy(update={table: before.model_copy(update={key: value})})
    return config


def _lower(before: Any, value: Any) -> Any:
    """Return a value of a setting that is not above the one before; None is no bound."""
    return min(before, value) if isinstance(before, int) else value


def _value(config: RunConfig, name: str) -> Any:
    value: Any = config
    for key in name.split("."):
        value = getattr(value, key)
    return value


def _measured(config: RunConfig, sites: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the sites with at most `data.max_heldout` held-out sequences and questions."""
    most = config.data.max_heldout
    if most is None:
        return sites
    return [
        {**site, **{key: min(site[key], most) for key in ("heldout", "questions")}}
        for site in sites
    ]


def _estimated(config: RunConfig, model: ModelFacts, lengths: Lengths) -> MeasuredTimes:
    """Return the times of the work of a model by its parameters: 2 operations for each and each
    token forward, and as many backward through a frozen base."""
    rate = EFFICIENCY * _operations_a_second(config)
    train = config.train
    tokens = min(lengths.quantile(0.9), config.data.max_length)  # a batch is padded
    sequence_s = 2 * model.parameters * tokens / rate
    layers_s = model.layers * LAYER_S[resolve_device(config.model.device).type]
    passes = 3 if train.gradient_checkpointing else 2
    written = config.evaluate.max_new_tokens or 0
    answer_s = (1 + written / tokens) * sequence_s + (1 + written) * layers_s / AT_ONCE
    return MeasuredTimes(
        site="",
        load_s=0.0,
        step_s=passes
        * (train.logical_batch * sequence_s + train.gradient_accumulation_steps * layers_s),
        call_s=0.0,
        heldout_s=sequence_s + layers_s,
        answer_s=answer_s if written else 0.0,
    )


def _operations_a_second(config: RunConfig) -> float:
    """Return the operations of a second of a product of matrices on the run's device."""
    device = resolve_device(config.model.device)
    size = _PRODUCT[device.type]
    rows = torch.ones(size, size, dtype=dtype_of(config.model), device=device)
    times = []
    with with_threads(config.fleet.threads):
        for _ in range(3):
            before = time.perf_counter()
            torch.mm(rows, rows)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - before)

    return 2 * size**3 / max(min(times), 1e-9)
