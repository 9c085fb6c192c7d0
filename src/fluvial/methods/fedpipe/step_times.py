"""Seconds of a site's training: of whole steps by batch, and of a round beside its steps."""

import itertools
import time
from collections.abc import Mapping, Sequence
from statistics import median

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
MOST_STEPS = 3
"""Steps of a large batch that are timed at most."""
SLOW = 1.25
"""Seconds of a token, over those in the batch before, from which a step is timed again."""
REPEATS_S = 30.0
"""Seconds that the repeated steps of a profile may take, and coding that is timed again."""
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


class StepTimer:
    """Times whole training steps of one model, for one batch after another.

    A step that a busy machine holds up once must not pass for the speed of a site. The seconds are
    the median of several steps, of two the shorter. A step that was timed once is timed again where
    it is much slower for each token than those of the batch before, or where none was timed before.
    """

    def __init__(self, model: nn.Module, settings: TrainConfig, pad_token_id: int) -> None:
        self._model = model
        self._settings = settings
        self._pad_token_id = pad_token_id
        self.longest_s = 0.0
        """Seconds of the longest step so far."""
        self._token_s: float | None = None
        self._left_s = REPEATS_S

    def step_s(self, rows: Sequence[Example]) -> float:
        """Return the seconds of a training step over `rows`: forward and backward pass, clipping
        and optimizer, as the run's own loop makes them, after one step that warms up."""
        steps = max(1, SEQUENCES // len(rows))
        tokens = sum(len(row.input_ids) for row in rows)
        usual_s = None if self._token_s is None else tokens * self._token_s
        marks: list[float] = []

        def watch(parameters: Mapping[str, nn.Parameter]) -> bool:
            if next(iter(parameters.values())).is_cuda:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
            took_s = [after - before for before, after in itertools.pairwise(marks)]
            return len(took_s) < steps or self._again(took_s, steps, usual_s)

        alone = {
            "learning_rate": UNCHANGED,
            "per_device_train_batch_size": len(rows),
            "gradient_accumulation_steps": 1,
        }
        train(
            self._model,
            rows,
            self._settings.model_copy(update=alone),
            pad_token_id=self._pad_token_id,
            generator=torch.Generator().manual_seed(0),
            steps=1 + max(steps, MOST_STEPS),
            watch=watch,
        )
        took_s = [after - before for before, after in itertools.pairwise(marks)]
        seconds = max(_usual(took_s), LEAST_S)
        self._token_s = seconds / tokens
        self.longest_s = max(self.longest_s, seconds)
        return seconds

    def _again(self, took_s: Sequence[float], steps: int, usual_s: float | None) -> bool:
        """Return whether a further step is timed, beyond the `steps` that are timed in any case."""
        if len(took_s) > steps:
            self._left_s -= took_s[-1]
        if len(took_s) >= MOST_STEPS or min(took_s) > self._left_s:
            return False
        return usual_s is None or _usual(took_s) > SLOW * usual_s


def _usual(seconds: Sequence[float]) -> float:
    """Return the median of several times, of two the shorter one."""
    return median(seconds) if len(seconds) > 2 else min(seconds)


def fixed_s(site: Site, state: Named, step_s: float) -> float:
    """Return the seconds of a round beside its steps: `state` is loaded into the model, and an
    update of its size is coded, unless the codec is learned from the first updates.

    The model is made before, which happens once in a run. Where this takes longer than a step of
    `step_s`, it is timed again, and the shorter time counts.
    """
    _load(site, state)
    took_s = _beside_s(site, state)
    if step_s < took_s <= REPEATS_S:
        took_s = min(took_s, _beside_s(site, state))
    return took_s


def _beside_s(site: Site, state: Named) -> float:
    started = time.perf_counter()
    _load(site, state)
    if not must_learn(site.codec):
        build(site.codec, site.trained).encode(state)
    return time.perf_counter() - started


def _load(site: Site, state: Named) -> None:
    with site.pool.model(state, trainable="A and B", assignment=site.assignment):
        pass
