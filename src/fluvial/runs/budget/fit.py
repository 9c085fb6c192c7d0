"""Conflicts between a budget and the rest of a configuration."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fluvial.codecs import must_learn
from fluvial.codecs.auto import AutoSettings
from fluvial.methods.cgfedllm.config import CgFedLlmConfig

if TYPE_CHECKING:
    from fluvial.runs.config import RunConfig


_OWN_PLANS = {
    "fedpipe": "plans the ranks of every site itself (method.budgets)",
    "fedcybgd": "tunes blocks of weights, and has no rank",
    "flglm": "sends hidden states, and no update",
}


def budget_conflicts(config: "RunConfig") -> Iterator[str]:
    """Yield what does not go with the `[budget]` of `config`; nothing where there is none."""
    budget = config.budget
    if budget is None:
        return

    method: str = config.method.name
    if not config.entry.traits.budget:
        why = _OWN_PLANS.get(method, "shares no adapter of one layout through a codec")
        yield (
            f"budget: method {method!r} {why}; remove the table, or choose method.name='fedavg' "
            "or 'cgfedllm'"
        )
        return

    if config.rounds < 2:
        yield (
            "budget: one round leaves nothing to try; set rounds to 2 or more, or remove the table"
        )
    if config.tuned != "lora":
        yield "budget: an adapter is chosen, and here all weights are tuned; remove one of the two"
    if config.promise is not None:
        yield (
            "budget: trials measure no noise of method.privacy; remove the table, and set the "
            "adapter and the codec"
        )
    if budget.run_s is not None and config.fleet.line is None:
        yield "budget.run_s: no line is known; describe it in fleet.line"

    yield from _beside_the_codec(config)
    if isinstance(config.method, CgFedLlmConfig) and config.method.tgap.from_sites:
        yield (
            f"method.tgap.source={config.method.tgap.source!r}: sites would send more than the "
            "budget counts; set 'public' or 'none'"
        )


def _beside_the_codec(config: "RunConfig") -> Iterator[str]:
    codec = config.codec
    if isinstance(codec, AutoSettings):
        yield "codec.name='auto': the budget chooses the codec; remove [codec]"
    elif codec is not None and codec.snr_driven:
        yield (
            "codec.snr_db, codec.noise_ratio: the rate follows the noise and not the budget; "
            "remove them, and set codec.rate or remove [codec]"
        )
    elif codec is not None and must_learn(codec):
        yield (
            f"codec: {codec.name!r} is learned, and its fit is no part of a trial; remove it, or "
            "choose a codec that learns nothing"
        )
