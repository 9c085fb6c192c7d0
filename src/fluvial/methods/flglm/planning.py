"""Plan of a split run: the cut, the bytes of a token, the memory of each end."""

from collections.abc import Callable, Mapping
from functools import cache, partial

import torch

from fluvial.codecs.activations import build_activation
from fluvial.errors import ConfigError
from fluvial.formatting import epsilon_words
from fluvial.methods.flglm.accounting import outside, passes_of_round
from fluvial.methods.flglm.base_memory import base_rows
from fluvial.methods.flglm.choice import (
    Costs,
    bounds_of,
    check_bounds,
    cuts,
    kinds_of,
    longest,
    over_line_s,
    places_of,
    predicted_memory,
    profile,
    settled,
    shortest,
)
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.held_room import remarks, room_words
from fluvial.methods.flglm.leakage.measured import GRADIENTS
from fluvial.methods.flglm.leakage.noise import spent
from fluvial.methods.flglm.line_time import round_over_line_s
from fluvial.methods.flglm.places import Places
from fluvial.methods.flglm.traffic import Conversation, conversations
from fluvial.methods.interface import CheckRow, Forecast, Given, Plan
from fluvial.methods.planning import line_row
from fluvial.methods.traffic import Bytes, Traffic, unknown
from fluvial.models.part_tuning import KIND_WORDS
from fluvial.models.pretrained import hidden_width

SHOWN = 24
"""Open cuts that `fluvial check` shows, at least."""


def plan(config: FlGlmConfig, given: Given) -> Plan:
    """Return the plan of a run; raises `ConfigError` for a cut that the model does not have."""
    written = config
    costs = cache(partial(profile, config, given))  # of passes that run on shapes
    config = settled(config, given, costs)
    places = places_of(config, given)
    _check_parts(config, given, places)

    if config.mode == "hierarchical" and not places.shared.shapes + places.middle.shapes:
        raise ConfigError(
            "method.mode='hierarchical': no tensor is shared, with the server's layers frozen and "
            "ends = 'own', so there is nothing to average; set mode = 'sequential', tune the "
            "middle, or share the ends"
        )

    if config.mode == "client-batch" and places.shares_weights:
        raise ConfigError(
            "method.mode='client-batch': with all weights tuned, shared layers would bring "
            "embedding or head to the server; set ends = 'own', another mode, or LoRA in front and "
            "back (tune, method.parts)"
        )

    _check_codecs(config, given)
    later = {}
    if config.leakage.every >= given.rounds:
        later["method.leakage.every"] = "the run is over before, and its end is measured anyway"

    if config.sends_changes and _passes(given) == 1:
        later["method.recurring"] = "the run sends no sample a second time"

    if not written.is_open:
        check_bounds(config, costs)
    forecast = partial(_forecast, written, config, given, places, costs)
    return Plan(
        places.shared,
        forecast,
        idle=_idle(config, given),
        later=later,
        remarks=partial(remarks, config, given),
        num_trained=places.layout.numel,
    )


def _check_parts(config: FlGlmConfig, given: Given, places: Places) -> None:
    """Raise `ConfigError` where nothing is tuned, or nothing in a part that is said to be."""
    if not places.layout.shapes:
        raise ConfigError(
            "method.parts: nothing is left to tune, since the adapter is in frozen parts only; "
            "tune another part, or adapt other modules"
        )

    tuned = {places.place(name) for name in places.layout.names}
    for place, kind in kinds_of(config, given).items():
        if kind == "lora" and place in config.parts.model_fields_set and place not in tuned:
            raise ConfigError(
                f"method.parts.{place}='lora': no module of lora.target_modules is in the {place}; "
                f"name one that is, or set method.parts.{place} to 'full' or 'frozen'"
            )


def _passes(given: Given) -> int:
    """Return how often the run sends a sequence in training, at most."""
    known = None if given.examples is None else given.examples().values()
    fewest = None if known is None else min(map(len, known))
    return given.rounds * passes_of_round(given.train, fewest)


def _check_codecs(config: FlGlmConfig, given: Given) -> None:
    """Raise `ConfigError` for an activation codec that does not fit the model's width."""
    width = hidden_width(given.base)
    for table, settings in (("method.hidden", config.hidden), ("method.gradient", config.gradient)):
        try:
            build_activation(settings, torch.float32).size(1, width)
        except ConfigError as error:
            raise ConfigError(f"{table}.{error}") from None


def _idle(config: FlGlmConfig, given: Given) -> dict[str, str]:
    """Return the settings that cannot change this run, and why."""
    return _idle_in_flight(config, given) | _idle_in_mode(config, given)


def _idle_in_flight(config: FlGlmConfig, given: Given) -> dict[str, str]:
    """Return the micro-batches in flight where a step has fewer, and why."""
    most = given.train.gradient_accumulation_steps
    if 1 < most >= config.in_flight:
        return {}
    words = "one micro-batch" if most == 1 else f"at most {most} micro-batches"
    reason = f"a step has {words}, by train.gradient_accumulation_steps"
    return {"method.in_flight": reason}


def _idle_in_mode(config: FlGlmConfig, given: Given) -> dict[str, str]:
    """Return the settings of a mode that cannot change this run, and why."""
    if config.step_deadline_s is not None:
        return _idle_deadline(config.step_deadline_s, config, given)
    if config.sync_steps is None or (given.train.max_steps is None and given.examples is None):
        return {}

    counts = [1] if given.examples is None else map(len, given.examples().values())
    steps = max(map(given.train.steps, counts))
    if config.sync_steps <= steps:
        return {}
    most = f"{steps} step{'s' if steps > 1 else ''}"
    return {"method.sync_steps": f"no site makes more than {most} in a round"}


def _idle_deadline(step_s: float, config: FlGlmConfig, given: Given) -> dict[str, str]:
    """Return the deadline of a step where no site can miss it, and why."""
    reason = None
    if config.cohort(given.sites) == 1:
        reason = "a step has one site only"
    elif given.deadline_s is not None and step_s >= given.deadline_s:
        reason = f"a site has failed before, by fleet.deadline_s={given.deadline_s:g}"
    return {} if reason is None else {"method.step_deadline_s": reason}


def _forecast(
    written: FlGlmConfig, config: FlGlmConfig, given: Given, places: Places, costs: Costs
) -> Forecast:
    """Return what is predicted of a run, and the cuts that the `written` settings leave open."""
    whole = {name: each.numel() for name, each in given.base.named_parameters()}
    site = {name: size for name, size in whole.items() if places.place(name) != "middle"}
    at_site = sum(site.values())
    at_server = sum(whole.values()) - at_site
    rows: list[CheckRow] = [
        (
            "cut",
            f"{_layers(places.cut.front)} and the embedding | "
            f"{_layers(len(places.cut.middle))} at the server | "
            f"{_layers(places.cut.back)} and the head",
        ),
        ("parameters of a site", f"{at_site:,} ({at_site / (at_site + at_server):.1%})"),
        *base_rows(given, places),
        *_tuned_rows(config, given, places),
        *_memory_rows(config, given, costs),
        *_open_rows(written, config, given, costs),
    ]
    if config.remembers or config.runs_front_alone:
        rows.append(("hidden states by sample", room_words(config, given)))
    if config.noise is not None:
        passes = _passes(given)
        epsilon = spent(config.noise, passes)
        words = (
            f"standard deviation {config.noise.std:.3g} on a norm of at most "
            f"{config.noise.clip:g}; epsilon at most {epsilon_words(epsilon)} at delta "
            f"{config.noise.delta:g} for each hidden state of at most {passes} passes of training; "
            f"outside: {'; '.join(outside(config.noise, gradients=config.sends_gradient))}"
        )
        rows.append(("noise", words))

    if given.examples is None:
        return _without_data(config, given, places, rows)

    predict = cache(partial(conversations, config, given, places))
    last = predict(given.rounds)
    tokens = sum(each.tokens for each in last.values())
    turns = sum(each.turns for each in last.values())
    sent = sum(each.up.most + each.down.most for each in last.values())
    steps = sum(len({size.step for size in each.sizes}) for each in last.values())
    rows += [
        ("bytes of a token, both ways", f"{sent / tokens:,.0f} B with all that is around"),
        ("bytes of a step of a site, both ways", _beside_formula(sent / steps, given)),
        ("turns of a site in a round", f"{turns / len(last):,.0f}, {_waiting(config)}"),
        ("graphs of micro-batches at the server", _graphs(config, given)),
    ]
    if config.step_deadline_s is not None:
        words = "not predicted: a step made again adds bytes, a missed one saves some, and a site "
        rows.append(("late sites", words + "that rejoins receives weights and moments"))

    seconds = None
    if given.line is not None:
        seconds = round_over_line_s(config, given, last, given.line)
        rows.append(line_row(seconds))

    return Forecast(0, 0, partial(_traffic, predict), rows, seconds)


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _without_data(
    config: FlGlmConfig, given: Given, places: Places, rows: list[CheckRow]
) -> Forecast:
    """Return a forecast by data.max_length, where the lengths of sequences are not known."""
    steps = given.train.max_steps
    if steps is None:
        why = (
            "it follows from the steps and tokens of the sites, and the data is elsewhere; "
            "train.max_steps would bound it"
        )
        return Forecast(0, 0, lambda _round: Traffic(unknown(why), unknown(why)), rows)

    @cache
    def predict(round: int) -> Traffic:
        least = shortest(config, given, places, round, steps=steps)
        most = longest(config, given, places, round, steps=steps)
        return Traffic(Bytes(least.down.least, most.down.most), Bytes(least.up.least, most.up.most))

    most = longest(config, given, places, given.rounds, steps=steps)
    sent = most.up.most + most.down.most
    rows = [
        *rows,
        (
            "bytes of a step of a site, both ways",
            f"at most {_beside_formula(sent / steps, given)}; all sequences of data.max_length",
        ),
        ("turns of a site in a round", f"{most.turns:,} at most, {_waiting(config)}"),
    ]
    seconds = None
    if given.line is not None:
        seconds = over_line_s(config, given, most)
        what, words = line_row(seconds)
        rows.append((what, f"at most {words}"))

    return Forecast(0, 0, predict, rows, seconds)


def _beside_formula(sent: float, given: Given) -> str:
    """Return the bytes of a step beside those of FL-GLM: 4 b T d beta, with beta = 2."""
    formula = 4 * given.train.logical_batch * given.max_length * hidden_width(given.base) * 2
    return (
        f"{sent:,.0f} B with all that is around; {formula:,} B by the paper's 4 b T d beta, "
        "padded to T = data.max_length, 16 bits"
    )


def _tuned_rows(config: FlGlmConfig, given: Given, places: Places) -> list[CheckRow]:
    """Return the tuned weights of each part, where the parts differ."""
    kinds = kinds_of(config, given)
    if len(set(kinds.values())) == 1:
        return []

    counts = dict.fromkeys(kinds, 0)
    for name, size in zip(places.layout.names, places.layout.sizes, strict=True):
        counts[places.place(name)] += size

    words = [
        f"{place}: {KIND_WORDS[kind]}" + (f", {counts[place]:,} values" if counts[place] else "")
        for place, kind in kinds.items()
    ]
    rows = [("tuned in each part", " | ".join(words))]
    if kinds["front"] != kinds["back"] and places.head_is_embedding(given.base):
        rows.append(("head", "the embedding, which belongs to the front and is tuned with it"))
    return rows


def _memory_rows(config: FlGlmConfig, given: Given, costs: Costs) -> list[CheckRow]:
    """Return the rows about memory beside the base's weights."""
    found = predicted_memory(config, costs)
    if isinstance(found, str):
        return [("memory in training, site and server", found)]

    batch = given.train.per_device_train_batch_size
    at = f"at {batch} x {given.max_length} tokens of a site"
    if given.train.gradient_checkpointing:
        at += ", with checkpointing"
    cohort = config.cohort(given.sites)
    together = {
        "client-batch": f", of {cohort} sites together",
        "hierarchical": f", for {cohort} replicas",
        "sequential": "",
    }[config.mode]
    rows = []
    for end, memory, words in (
        ("site", found.site, at),
        ("server", found.server, at + together),
    ):
        rows += [
            (f"what is tuned and optimizer in memory, {end}", f"{memory.optimizer:,} B"),
            (f"activations and gradients in memory, {end}", f"{memory.passes:,} B {words}"),
            (f"all of it in training, {end}", f"{memory.total:,} B"),
        ]
    return rows


def _open_rows(
    written: FlGlmConfig, config: FlGlmConfig, given: Given, costs: Costs
) -> list[CheckRow]:
    """Return a row for each cut that was open, the preferred ones first."""
    if not written.is_open:
        return []

    bounds = bounds_of(written)
    found = cuts(written, costs)
    steps = given.train.max_steps
    rows = [
        (
            f"cut {each.front} + {each.back}"
            + (", chosen" if (each.front, each.back) == (config.front, config.back) else ""),
            each.words(bounds, steps=steps),
        )
        for each in found
    ]
    chosen = next(number for number, (what, _) in enumerate(rows) if what.endswith("chosen"))
    shown = rows[: max(SHOWN, chosen + 1)]
    if len(rows) > len(shown):
        shown.append(("further cuts", f"{len(rows) - len(shown)}, which take no less"))
    return [
        *shown,
        (
            "why this cut",
            "of the cuts within all bounds it has the "
            + ("fewest bytes" if given.line is None else "shortest round over fleet.line")
            + ", then the least memory at a site, then the deeper front. Its bytes and seconds are "
            "those of sequences that all have data.max_length tokens, since the choice may not "
            "follow from the sites' text; the rows below follow from the text where it is known. "
            "No cut protects the text: a server read all tokens of hidden states without noise"
            + (
                f", and {GRADIENTS:.0%} or more from gradients at any noise"
                if written.sends_gradient
                else ""
            ),
        ),
    ]


def _waiting(config: FlGlmConfig) -> str:
    """Return the words about turns that wait for each other."""
    if config.in_flight == 1:
        return "each a round trip"
    return f"of which up to {config.window} are on their way at a time"


def _graphs(config: FlGlmConfig, given: Given) -> str:
    """Return the words about the memory of passes whose gradient is awaited."""
    most = min(config.in_flight, given.train.gradient_accumulation_steps)
    whose = {"client-batch": "of all sites", "hierarchical": "for each site at work"}
    words = whose.get(config.mode, "of a site")
    return f"{most} {words}; its memory in training has the activations of each"


def _traffic(predict: Callable[[int], Mapping[str, Conversation]], round: int) -> Traffic:
    """Return the bytes of a site in a round: of any, since its sequences decide."""
    found = predict(round).values()
    return Traffic(
        Bytes(min(each.down.least for each in found), max(each.down.most for each in found)),
        Bytes(min(each.up.least for each in found), max(each.up.most for each in found)),
    )
