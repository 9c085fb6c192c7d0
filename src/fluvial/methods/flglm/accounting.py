"""Epsilon of a run's hidden states: one state, over all times that it is sent.

A hidden state is sent once in every pass over its text. Epsilon and delta are those of one state
against any other in its place; a token, which changes all states behind it, and a text spend more.
"""

import math
from typing import Any

from fluvial.formatting import epsilon_words
from fluvial.methods.flglm.leakage.noise import NoiseConfig, spent
from fluvial.training.config import TrainConfig

GRADIENTS = "gradients, which show labels"
"""Information that leaves a site beside hidden states, unless front and middle are frozen."""
OUTSIDE = (
    "updates of layers that sites share",
    "lengths and losses",
    "a round that is done again with other answers of the server",
)
"""The same in every run."""
HELDOUT = "held-out hidden states, which leave exactly"
"""The same, unless there is noise in inference."""
MEASURES = "measures that a server asks for beyond those of the run"
"""The same where there is, since the site's ledger counts conversations of training only."""


def outside(noise: NoiseConfig, *, gradients: bool) -> list[str]:
    """Return information that leaves a site and that epsilon does not count."""
    sent = (GRADIENTS, *OUTSIDE) if gradients else OUTSIDE
    return [*sent, MEASURES if noise.inference else HELDOUT]


def passes_of_round(train: TrainConfig, fewest: int | None) -> int:
    """Return how often a sequence is sent in one round at most.

    `fewest` is the number of sequences of the smallest site; None where it is not known.
    """
    if train.max_steps is None:
        return max(1, math.ceil(train.num_train_epochs))
    if fewest is None:
        return train.max_steps
    return math.ceil(train.max_steps / math.ceil(fewest / train.logical_batch))


def account(
    noise: NoiseConfig, passes: int, heldout_passes: int, *, gradients: bool
) -> dict[str, Any]:
    """Return the entry of result.json for texts that are sent `passes` times in training.

    `heldout_passes` counts those of held-out text, which is disturbed with `inference` only.
    `gradients` says that steps of training send them.
    """
    others = outside(noise, gradients=gradients)
    epsilon = spent(noise, passes)
    heldout = spent(noise, heldout_passes) if noise.inference else None
    counted = (
        f"epsilon {epsilon_words(epsilon)} for each hidden state, sent {_times(passes)} in training"
    )
    if heldout is not None:
        counted += (
            f", {epsilon_words(heldout)} for those of held-out text, sent {_times(heldout_passes)}"
        )

    return {
        "clip": noise.clip,
        "std": noise.std,
        "delta": noise.delta,
        "inference": noise.inference,
        "passes": passes,
        "epsilon": epsilon,
        "heldout_passes": heldout_passes if noise.inference else None,
        "heldout_epsilon": heldout,
        "outside": others,
        "sentence": f"{counted}, at delta {noise.delta:g}; outside: {'; '.join(others)}",
    }


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
