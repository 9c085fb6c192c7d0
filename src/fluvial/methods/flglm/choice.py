"""The choice of a run's cut, from its configuration, the model's shapes and the number of sites.

It depends on nothing else, so `fluvial check`, the process of a run and its resumption choose
alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import get_args

from fluvial.data import Example
from fluvial.errors import ConfigError
from fluvial.methods.flglm.base_memory import base_bytes
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.cuts import (
    NO_CUT_PROTECTS,
    Bounds,
    Candidate,
    Cost,
    Profile,
    candidates,
    choose,
    too_readable,
)
from fluvial.methods.flglm.footprint import Batch, Footprint, footprint
from fluvial.methods.flglm.leakage.measured import expected
from fluvial.methods.flglm.line_time import round_over_line_s
from fluvial.methods.flglm.places import Places
from fluvial.methods.flglm.traffic import Conversation, conversations
from fluvial.methods.interface import Given
from fluvial.models.outline import Outline
from fluvial.models.part_tuning import PartKind, PartNames, PartTuning, Place
from fluvial.models.quantised import largest_decoded
from fluvial.models.split import decoder_layers
from fluvial.wire.tensors import factor

MB = 10**6
Costs = Callable[[], Profile]
"""Returns the costs of all cuts of a run's model, or raises `ConfigError`."""
SHORTEST = 2
"""Tokens of the shortest sequence of which one is predicted."""


def check_bounds(config: FlGlmConfig, costs: Costs) -> None:
    """Raise `ConfigError` where a cut in numbers does not keep the bounds of the settings."""
    bounds = bounds_of(config)
    if bounds.site is not None or bounds.server is not None:
        choose(cuts(config, costs), bounds)
    elif bounds.read is not None:
        front, _ = config.layers
        read = expected(front, config.noise, gradients=config.sends_gradient)
        if read > bounds.read:
            raise ConfigError(f"method.{too_readable(read, bounds.read)}; {NO_CUT_PROTECTS}")


def settled(config: FlGlmConfig, given: Given, costs: Costs | None = None) -> FlGlmConfig:
    """Return the settings with the cut in numbers; raises `ConfigError` where none fits."""
    if not config.is_open:
        return config
    chosen = choose(cuts(config, costs or partial(profile, config, given)), bounds_of(config))
    return config.model_copy(update={"front": chosen.front, "back": chosen.back})


def bounds_of(config: FlGlmConfig) -> Bounds:
    """Return the bounds that the settings have."""
    return Bounds(
        None if config.site_memory_mb is None else config.site_memory_mb * MB,
        None if config.server_memory_mb is None else config.server_memory_mb * MB,
        config.leakage.most,
    )


def cuts(config: FlGlmConfig, costs: Costs) -> list[Candidate]:
    """Return the cuts that the settings leave open, the preferred ones first."""
    return candidates(costs(), config.front, config.back)


def profile(config: FlGlmConfig, given: Given) -> Profile:
    """Return what cuts of the run's model cost, whichever of them `config` has; raises
    `ConfigError` where that is not known."""
    path, layers = decoder_layers(given.base)
    kinds = kinds_of(config, given)
    outside = PartNames.of(given.base, 0, 0)

    def in_layer(name: str) -> int | None:
        inside = name.removeprefix(f"{path}.")
        return int(inside.partition(".")[0]) if inside != name else None

    weights: dict[int | None, int] = {}
    for name, size in base_bytes(given).items():
        place = in_layer(name)
        weights[place] = weights.get(place, 0) + size

    ends_optimizer = 0
    optimizer: dict[PartKind, list[int]] = {kind: [0] * len(layers) for kind in get_args(PartKind)}
    for name, size in zip(given.layout.names, given.layout.sizes, strict=True):
        kind: PartKind = "lora" if factor(name) else "full"
        number = in_layer(name)
        if number is not None:
            optimizer[kind][number] += size * held_bytes(kind, given)
        elif kinds[outside.place(name)] == kind:
            ends_optimizer += size * held_bytes(kind, given)

    known: dict[tuple[int, int, bool, bool], Cost] = {}

    def cost(front: int, back: int) -> Cost:
        """Return what the traffic of a cut costs, which follows from the layers that are shared."""
        fixed = config.model_copy(update={"front": front, "back": back})
        places = places_of(fixed, given)
        key = (
            places.shared.numel,
            len(places.shared.shapes),
            places.front_is_tuned,
            places.needs_gradient,
        )
        if key not in known:
            known[key] = _cost(fixed, given, places)
        return known[key]

    return Profile(
        weights.get(None, 0),
        ends_optimizer,
        tuple(weights[number] for number in range(len(layers))),
        optimizer,
        passes(config, given),
        kinds,
        replicas(config, given),
        cost,
        lambda front: expected(front, config.noise, gradients=config.sends_gradient),
    )


def kinds_of(config: FlGlmConfig, given: Given) -> dict[Place, PartKind]:
    """Return the kind of tuning of each part."""
    tuning = _outline(given).tuning
    if isinstance(tuning, PartTuning):
        return dict(tuning.kinds)
    return config.parts.kinds("full" if tuning is None else "lora")


def places_of(config: FlGlmConfig, given: Given) -> Places:
    """Return the places of a run under the cut of `config`, which the run's own may leave open."""
    tuning = _outline(given).tuning
    layout = given.layout
    if isinstance(tuning, PartTuning):
        layout = tuning.within(layout, given.base, config.layers)
    return Places.of(config, given.base, layout)


def _outline(given: Given) -> Outline:
    assert given.outline is not None, "the facts of a run have its model"
    return given.outline


def held_bytes(kind: PartKind, given: Given) -> int:
    """Return the bytes that stay for each value tuned so: moments, the value before, the value.

    The value itself counts with the base where the base's own weights are tuned in fp32.
    """
    return 12 if kind == "full" and given.width_bytes == 4 else 16


def replicas(config: FlGlmConfig, given: Given) -> int:
    """Return the replicas of the server's layers at a time."""
    return config.cohort(given.sites) if config.mode == "hierarchical" else 1


def passes(config: FlGlmConfig, given: Given) -> Footprint:
    """Return the memory of passes, of sequences of the greatest length."""
    batch = given.train.per_device_train_batch_size
    together = config.cohort(given.sites) if config.mode == "client-batch" else 1
    most = given.train.gradient_accumulation_steps
    return footprint(
        _outline(given).blank,
        kinds_of(config, given),
        given.train,
        site=Batch(batch, given.max_length, min(config.window, most)),
        server=Batch(batch * together, given.max_length, min(config.in_flight, most)),
        decoded=largest_decoded(given.base, given.quantisation),
    )


def _cost(config: FlGlmConfig, given: Given, places: Places) -> Cost:
    conversation = longest(config, given, places, given.rounds, steps=given.train.max_steps or 1)
    seconds = None
    if given.line is not None:
        seconds = over_line_s(config, given, conversation)
    return Cost(conversation.up.most + conversation.down.most, seconds)


def over_line_s(config: FlGlmConfig, given: Given, conversation: Conversation) -> float:
    """Return the seconds of a round in which every site has this conversation."""
    assert given.line is not None
    alike = {str(number): conversation for number in range(config.cohort(given.sites))}
    return round_over_line_s(config, given, alike, given.line)


def longest(
    config: FlGlmConfig, given: Given, places: Places, round: int, *, steps: int
) -> Conversation:
    """Return the conversation of a site whose sequences all have the greatest length."""
    size = given.train.logical_batch
    return _alike(config, given, places, round, steps, [given.max_length] * size)


def shortest(
    config: FlGlmConfig, given: Given, places: Places, round: int, *, steps: int
) -> Conversation:
    """Return the conversation of a site that has one sequence, and a short one."""
    return _alike(config, given, places, round, steps, [SHORTEST])


def _alike(
    config: FlGlmConfig,
    given: Given,
    places: Places,
    round: int,
    steps: int,
    lengths: list[int],
) -> Conversation:
    """Return the conversation of `steps` steps on the same sequences: of one period, repeated."""
    period = min(config.sync_steps or 1, steps)
    periods, rest = divmod(steps, period)
    examples = [Example([0] * length, [0] * length) for length in lengths]

    def of(count: int) -> Conversation:
        train = given.train.model_copy(update={"max_steps": count, "num_train_epochs": 1.0})
        sites: Mapping[str, list[Example]] = {"a site": examples}
        few = replace(given, examples=lambda: sites, train=train)
        # Where an end holds hidden states, the first round sends all of them.
        return conversations(config, few, places, 1 if config.remembers else round)["a site"]

    one = of(period)
    sizes = [
        replace(size, step=size.step + number * period)
        for number in range(periods)
        for size in one.sizes
    ]
    up, down = one.up, one.down
    tokens = periods * one.tokens
    for _ in range(periods - 1):
        up += one.up
        down += one.down
    surplus = periods - 1
    if rest:
        last = of(rest)
        sizes += [replace(size, step=size.step + periods * period) for size in last.sizes]
        up += last.up
        down += last.down
        tokens += last.tokens
        surplus += 1

    return replace(
        one,
        up=up.less(one.last_up, surplus),
        down=down.less(one.first_down, surplus),
        sizes=tuple(sizes),
        tokens=tokens,
    )


def predicted_memory(config: FlGlmConfig, costs: Costs) -> Candidate | str:
    """Return the costs of the run's cut, or why they are not known."""
    try:
        (found,) = cuts(config, costs)
    except ConfigError as unknown:
        return f"not predicted: {unknown}"
    return found
