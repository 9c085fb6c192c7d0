"""Seconds of a site's training: of whole steps by batch, and of a round beside its steps."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fluvial.codecs import build, must_learn
from fluvial.data import Example
from fluvial.federation.sites import Site
from fluvial.training.config import TrainConfig
from fluvial.training.train import train
from fluvial.wire.tensors import Named

SEQUENCES = 8
"""Sequences over which a small batch is timed, so that short steps are timed more than once."""
LEAST_S = 1e-9
"""Least seconds of a step, by a clock that is too coarse."""
UNCHANGED = 1e-30
"""Learning rate of the timed steps, which changes no weight and takes as long as any other."""


def spread_rows(examples: Sequence[Example], batch: int) -> list[Example]:
    """Return `batch` examples at even distances in the order of their lengths.

    A batch is padded to its longest sequence, so that the examples of one length would be faster
    for each token than those that training draws.
    """
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    places = [(2 * row + 1) * len(ordered) // (2 * batch) for row in range(batch)]
    return [ordered[place] for place in places]


def step_s(
    model: nn.Module, rows: Sequence[Example], settings: TrainConfig, pad_token_id: int
) -> float:
    """Return the mean seconds of a training step over `rows`: forward and backward pass, clipping
    and optimizer, as the run's own loop makes them, after one step that warms up."""
    steps = max(1, SEQUENCES // len(rows))
    marks: list[float] = []

    def watch(parameters: Mapping[str, nn.Parameter]) -> bool:
        if next(iter(parameters.values())).is_cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return True

    alone = {
        "learning_rate": UNCHANGED,
        "per_device_train_batch_size": len(rows),
        "gradient_accumulation_steps": 1,
    }
    train(
        model,
        rows,
        settings.model_copy(update=alone),
        pad_token_id=pad_token_id,
        generator=torch.Generator().manual_seed(0),
        steps=1 + steps,
        watch=watch,
    )
    return max((marks[-1] - marks[0]) / steps, LEAST_S)


def fixed_s(site: Site, state: Named) -> float:
    """Return the seconds of a round beside its steps: `state` is loaded into the model, and an
    update of its size is coded, unless the codec is learned from the first updates."""
    started = time.perf_counter()
    with site.pool.model(state, trainable="A and B", assignment=site.assignment):
        pass
    if not must_learn(site.codec):
        build(site.codec, site.trained).encode(state)
    return time.perf_counter() - started
