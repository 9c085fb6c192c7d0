"""Plan of a split run: the cut, the bytes of a token, the memory of each end."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from fluvial.codecs.activations.samples import SAMPLE_BYTES
from fluvial.errors import ConfigError
from fluvial.methods.flglm.accounting import outside, passes_of_round
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.leakage.noise import spent
from fluvial.methods.flglm.places import Places
from fluvial.methods.flglm.traffic import Conversation, conversations, round_over_line_s
from fluvial.methods.interface import CheckRow, Forecast, Given, Plan
from fluvial.methods.planning import OPTIMIZER_BYTES, line_row
from fluvial.methods.traffic import Bytes, Traffic, unknown


def plan(config: FlGlmConfig, given: Given) -> Plan:
    """Return the plan of a run; raises `ConfigError` for a cut that the model does not have."""
    places = Places.of(config, given.base, given.layout)
    full = not given.tunes_factors

    if not places.tuned_ends.shapes and not places.tuned_middle.shapes:
        raise ConfigError(
            "method.frozen: nothing is left to tune, since the adapter is in frozen parts only; "
            "tune another part, or adapt other modules"
        )

    if full and config.mode == "client-batch" and config.ends == "shared":
        raise ConfigError(
            "method.mode='client-batch': with all weights tuned, shared layers would bring "
            "embedding and head to the server; set ends = 'own', another mode, or tune = 'lora'"
        )

    later = {}
    if config.leakage.every >= given.rounds:
        later["method.leakage.every"] = "the run is over before, and its end is measured anyway"

    forecast = partial(_forecast, config, given, places)
    return Plan(places.shared, forecast, idle=_idle(config, given), later=later)


def _idle(config: FlGlmConfig, given: Given) -> dict[str, str]:
    """Return the settings that cannot change this run, and why."""
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


def _forecast(config: FlGlmConfig, given: Given, places: Places) -> Forecast:
    """Return what is known before the lengths of sequences are."""
    whole = {name: each.numel() for name, each in given.base.named_parameters()}
    site = {name: size for name, size in whole.items() if places.place(name) != "middle"}
    at_site = sum(site.values())
    at_server = sum(whole.values()) - at_site
    rows: list[CheckRow] = [
        (
            "cut",
            f"{config.front} layers and the embedding | {len(places.cut.middle)} at the server | "
            f"{config.back} layers and the head",
        ),
        ("parameters of a site", f"{at_site:,} ({at_site / (at_site + at_server):.1%})"),
        ("base in memory, site", f"{at_site * given.width_bytes:,} B"),
        ("base in memory, server", f"{at_server * given.width_bytes:,} B"),
        (
            "what is tuned and optimizer in memory, site",
            f"{places.tuned_ends.numel * OPTIMIZER_BYTES:,} B",
        ),
        (
            "what is tuned and optimizer in memory, server",
            f"{places.tuned_middle.numel * OPTIMIZER_BYTES:,} B",
        ),
    ]
    if config.remembers or config.runs_front_alone:
        rows.append(("hidden states by sample", _held_by_sample(config, given)))
    if config.noise is not None:
        known = None if given.examples is None else given.examples().values()
        fewest = None if known is None else min(map(len, known))
        passes = given.rounds * passes_of_round(given.train, fewest)
        epsilon = spent(config.noise, passes)
        words = (
            f"standard deviation {config.noise.std:.3g} on a norm of at most "
            f"{config.noise.clip:g}; epsilon at most {epsilon:.3g} at delta "
            f"{config.noise.delta:g} for each hidden state of at most {passes} passes of training; "
            f"outside: {'; '.join(outside(config.noise))}"
        )
        rows.append(("noise", words))

    if given.examples is None:
        traffic = unknown("it follows from the tokens of each step, and the data is elsewhere")
        return Forecast(0, 0, lambda _round: Traffic(traffic, traffic), rows)

    predict = cache(partial(conversations, config, given, places))
    last = predict(given.rounds)
    tokens = sum(each.tokens for each in last.values())
    turns = sum(each.turns for each in last.values())
    sent = sum(each.up.most + each.down.most for each in last.values())
    rows += [
        ("bytes of a token, both ways", f"{sent / tokens:,.0f} B with all that is around"),
        ("turns of a site in a round", f"{turns / len(last):,.0f}, each a round trip"),
    ]
    seconds = None
    if given.line is not None:
        seconds = round_over_line_s(config, given, last, given.line)
        rows.append(line_row(seconds))

    return Forecast(0, 0, partial(_traffic, predict), rows, seconds)


def _traffic(predict: Callable[[int], Mapping[str, Conversation]], round: int) -> Traffic:
    """Return the bytes of a site in a round: of any, since its sequences decide."""
    found = predict(round).values()
    return Traffic(
        Bytes(min(each.down.least for each in found), max(each.down.most for each in found)),
        Bytes(min(each.up.least for each in found), max(each.up.most for each in found)),
    )


def _held_by_sample(config: FlGlmConfig, given: Given) -> str:
    """Return the words about hidden states that the ends hold."""
    if not config.remembers:
        return "none held; the frozen front is sent in every pass, since memory_bytes = 0"

    words = []
    if config.caches_front:
        words.append("the frozen front is sent in a sample's first pass only")
    if config.sends_changes:
        words.append("first passes are exact, later ones changes")

    ways = 2 if config.sends_changes else 1
    most = ways * config.memory_bytes
    words.append(f"at most {most:,} B for a site at the server and in its checkpoints")
    if config.sends_changes:
        at_site = most - config.memory_bytes * config.caches_front
        words.append(f"{at_site:,} B at the site")
    if given.examples is not None:
        model: Any = given.base
        token_bytes = model.config.get_text_config().hidden_size * given.width_bytes
        largest = max(
            sum(SAMPLE_BYTES + token_bytes * len(example.input_ids) for example in examples)
            for examples in given.examples().values()
        )
        words.append(f"the largest site needs {largest:,} B for a way")
    return "; ".join(words)
