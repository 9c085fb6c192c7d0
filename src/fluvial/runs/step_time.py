"""Seconds of an optimizer step and of a written answer on this machine, measured on a site's own
records."""

import math
from collections.abc import Callable, Sequence

from fluvial.data import Example, Question
from fluvial.models.generation import AT_ONCE, SHORT, continuations
from fluvial.models.hf import PreTrainedModel
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
LONG = 3 * SHORT
"""Tokens of an answer that are timed, at most."""


def time_steps(
    config: RunConfig,
    pool: ModelPool,
    examples: Sequence[Example],
    clock: Clock,
    enough_s: float = ENOUGH_S,
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
    if one >= enough_s:
        return one, 0.0

    further = min(MAX_STEPS, math.ceil(enough_s / max(one, 1e-9)))
    step_s = max((call(1 + further) - one) / further, 0.0)
    return step_s, max(one - step_s, 0.0)


def time_answers(
    config: RunConfig,
    pool: ModelPool,
    model: PreTrainedModel,
    questions: Sequence[Question],
    clock: Clock,
) -> float:
    """Return the seconds of one greedy answer of the untuned model, of a batch of some questions;
    0 where the run writes none.

    A long answer is timed by its first tokens and by the pace of the next.
    """
    tokens = config.evaluate.max_new_tokens
    prompts = [question.asked for question in questions[:AT_ONCE]]
    if not tokens or not prompts:
        return 0.0

    def write(count: int) -> float:
        before = clock()
        continuations(
            model,
            pool.tokenizer,
            prompts,
            max_new_tokens=count,
            context=pool.outline.context,
        )
        return clock() - before

    if tokens <= LONG:
        return write(tokens) / len(prompts)
    first, more = write(SHORT + 1), write(LONG)
    pace = max(more - first, 0.0) / (LONG - SHORT - 1)
    return (more + pace * (tokens - LONG)) / len(prompts)
