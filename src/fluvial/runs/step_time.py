"""Seconds of an optimizer step on this machine, measured on a site's own sequences."""

import math
from collections.abc import Callable, Sequence

from fluvial.data import Example
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.runs.config import RunConfig
from fluvial.seeds import generator
from fluvial.training.train import train

Clock = Callable[[], float]
ENOUGH_S = 2.0
"""Steps are timed together until they take about this long, so that a small model's are measured
too."""
MAX_STEPS = 32
"""Steps that are timed together, at most."""


def time_steps(
    config: RunConfig, pool: ModelPool, examples: Sequence[Example], clock: Clock
) -> tuple[float, float]:
    """Return the seconds of one optimizer step, and those of a call of `train` beside its steps."""
    state = initial_state(pool.layout, config.seed)

    def call(steps: int) -> float:
        checkpointing = config.train.gradient_checkpointing
        with pool.model(state, trainable="A and B", checkpointing=checkpointing) as model:
            before = clock()
            train(
                model,
                examples,
                config.train,
                pad_token_id=pool.tokenizer.pad_token_id,
                generator=generator(config.seed, "time"),
                steps=steps,
                start=pool.weights(state),
            )
            return clock() - before

    call(1)  # the first step allocates and compiles
    one = call(1)
    if one >= ENOUGH_S:
        return one, 0.0

    further = min(MAX_STEPS, math.ceil(ENOUGH_S / max(one, 1e-9)))
    step_s = max((call(1 + further) - one) / further, 0.0)
    return step_s, max(one - step_s, 0.0)
