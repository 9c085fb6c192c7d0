"""The choice of a run's cut, from its configuration, the model's shapes and the number of sites.

It depends on nothing else, so `fluvial check`, the process of a run and its resumption choose
alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from fluvial.data import Example
from fluvial.errors import ConfigError
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
from fluvial.models.split import decoder_layers

MB = 10**6
Costs = Callable[[], Profile]
"""Returns the costs of all cuts of a run's model, or raises `ConfigError`."""
SHORTEST = 2
"""Tokens of the shortest sequence of which one is predicted."""


def is_open(config: FlGlmConfig) -> bool:
    """Return true where the cut is to be chosen."""
    return config.front == "auto" or config.back == "auto"


def check_bounds(config: FlGlmConfig, given: Given, costs: Costs) -> None:
    """Raise `ConfigError` where a cut in numbers does not keep the bounds of the settings."""
    bounds = bounds_of(config)
    if bounds.site is not None or bounds.server is not None:
        choose(cuts(config, costs), bounds)
    elif bounds.read is not None:
        front = config.cut(len(decoder_layers(given.base)[1])).front
        read = expected(front, config.noise)
        if read > bounds.read:
            raise ConfigError(f"method.{too_readable(read, bounds.read)}; {NO_CUT_PROTECTS}")


def settled(config: FlGlmConfig, given: Given, costs: Costs | None = None) -> FlGlmConfig:
    """Return the settings with the cut in numbers; raises `ConfigError` where none fits."""
    if not is_open(config):
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
    kept = kept_bytes(given)

    def in_layer(name: str) -> int | None:
        inside = name.removeprefix(f"{path}.")
        return int(inside.partition(".")[0]) if inside != name else None

    weights: dict[int | None, int] = {}
    for name, parameter in given.base.named_parameters():
        place = in_layer(name)
        weights[place] = weights.get(place, 0) + parameter.numel() * given.width_bytes

    optimizer: dict[int | None, int] = {}
    for name, shape in given.layout.shapes:
        place = in_layer(name)
        size = kept
        for length in shape:
            size *= length
        optimizer[place] = optimizer.get(place, 0) + size

    known: dict[int, Cost] = {}

    def cost(front: int, back: int) -> Cost:
        """Return what the traffic of a cut costs, which follows from the layers that are shared."""
        fixed = config.model_copy(update={"front": front, "back": back})
        places = Places.of(fixed, given.base, given.layout)
        size = places.shared.numel
        if size not in known:
            known[size] = _cost(fixed, given, places)
        return known[size]

    numbers = range(len(layers))
    return Profile(
        weights.get(None, 0),
        optimizer.get(None, 0),
        tuple(weights[number] for number in numbers),
        tuple(optimizer.get(number, 0) for number in numbers),
        passes(config, given),
        config.frozen,
        replicas(config, given),
        cost,
        lambda front: expected(front, config.noise),
    )


def kept_bytes(given: Given) -> int:
    """Return the bytes that stay for each tuned value: moments, the value before, the value.

    The value itself counts with the base where the base's own weights are tuned in fp32.
    """
    return 12 if not given.tunes_factors and given.width_bytes == 4 else 16


def replicas(config: FlGlmConfig, given: Given) -> int:
    """Return the replicas of the server's layers at a time."""
    return config.cohort(given.sites) if config.mode == "hierarchical" else 1


def passes(config: FlGlmConfig, given: Given) -> Footprint:
    """Return the memory of passes, of sequences of the greatest length."""
    assert given.blank is not None
    batch = given.train.per_device_train_batch_size
    together = config.cohort(given.sites) if config.mode == "client-batch" else 1
    most = given.train.gradient_accumulation_steps
    return footprint(
        given.blank(),
        config,
        given.train,
        site=Batch(batch, given.max_length, min(config.window, most)),
        server=Batch(batch * together, given.max_length, min(config.in_flight, most)),
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
