"""Multiple choice by log-likelihood: scores of the choices, and the accuracy with its interval.

The model prefers one of four answers; it does not write any.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fluvial.data import Example
from fluvial.errors import ConfigError
from fluvial.seeds import numpy_generator
from fluvial.training.choice_prompts import Prompt, Sheet
from fluvial.training.train import collate

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float64]

BATCH_ROWS = 16
BATCH_TOKENS = 2048
"""Bounds of one forward pass; the logits of a large vocabulary are what fills the memory."""
RESAMPLES = 2000


IntervalMethod = Literal["bootstrap", "clopper-pearson", "wilson", "sacrebleu"]
"""Origin of an interval: the BCa bootstrap over distinct questions (Efron 1987), the exact interval
of a share (Clopper and Pearson 1934), Wilson's of exact match, or the bootstrap of sacreBLEU over
answers."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    method: IntervalMethod


@torch.no_grad()
def score(model: nn.Module, prompts: Sequence[Prompt], *, pad_token_id: int) -> list[list[float]]:
    """Return log P(choice | prompt) of every question's choices, nats, divided by
    `Prompt.sizes`."""
    # Choices that differ in their last token only, as letters do, share one row: its last position
    # scores them all.
    rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for number, prompt in enumerate(prompts):
        for index, tokens in enumerate(prompt.endings):
            rows.setdefault((*prompt.prefix, *tokens[:-1]), []).append((number, index))

    device = next(model.parameters()).device
    scores = [[math.nan] * len(prompt.endings) for prompt in prompts]
    model.eval()
    done = 0
    logged_s = time.monotonic()

    for batch_rows in _batches(sorted(rows, key=len)):
        batch = collate([Example(row, row) for row in batch_rows], pad_token_id, device)
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        for place, row in enumerate(batch_rows):
            longest = max(len(prompts[number].endings[index]) for number, index in rows[row])
            since = len(row) - longest
            likely = logits[place, since : len(row)].float().log_softmax(-1)

            for number, index in rows[row]:
                prompt = prompts[number]
                targets = torch.tensor(prompt.endings[index], device=device)
                terms = likely[longest - len(targets) :].gather(1, targets[:, None])
                scores[number][index] = float(terms.sum()) / prompt.sizes[index]

                if math.isnan(scores[number][index]):
                    raise ConfigError(
                        f"{prompt.name}: the model's logits are not numbers; its "
                        "weights may be "
                        "damaged, or too large for model.dtype: choose 'float32'"
                    )

        done += len(batch_rows)
        if time.monotonic() - logged_s > 1:
            logged_s = time.monotonic()
            logger.info("multiple choice: %d of %d sequences", done, len(rows))

    return scores


def _batches(rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Yield consecutive `rows`, sorted by length, within the bounds of one forward pass.

    One row always fits.
    """
    batch: list[tuple[int, ...]] = []
    for row in rows:
        if batch and (len(batch) == BATCH_ROWS or (len(batch) + 1) * len(row) > BATCH_TOKENS):
            yield batch
            batch = []

        batch.append(row)

    if batch:
        yield batch


@dataclass(frozen=True)
class Marks:
    """The right answers of a model, in the order of the sheet."""

    right: tuple[bool, ...]
    subjects: tuple[str | None, ...]

    @classmethod
    def of(cls, sheet: Sheet, scores: Sequence[Sequence[float]]) -> "Marks":
        """Mark the choice with the highest score as the model's answer, the first of equal ones."""
        picked = [row.index(max(row)) for row in map(list, scores)]
        right = tuple(
            index == question.answer
            for index, question in zip(picked, sheet.questions, strict=True)
        )

        return cls(right, tuple(question.subject for question in sheet.questions))

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy: sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.right))

    def interval(self, seed: int) -> Interval:
        """Return the accuracy with its bootstrap interval.

        Where all answers are alike, the interval is the exact one (Clopper-Pearson).
        """
        found = bootstrap(self.right, seed)
        return exact_interval(sum(self.right), len(self.right)) if found is None else found

    def by_subject(self) -> dict[str, tuple[int, int]]:
        """Return right answers and questions of each subject, in alphabetical order; "" is no
        subject."""
        counts: dict[str, tuple[int, int]] = {}
        pairs = zip(self.subjects, self.right, strict=True)

        for subject, right in sorted((subject or "", right) for subject, right in pairs):
            hits, asked = counts.get(subject, (0, 0))
            counts[subject] = (hits + right, asked + 1)

        return counts


def exact_interval(hits: int, count: int) -> Interval:
    """Return the share `hits` of `count` with its exact 95 % interval (Clopper-Pearson)."""
    from scipy.stats import binomtest

    exact = binomtest(hits, count).proportion_ci(0.95)
    return Interval(hits / count, float(exact.low), float(exact.high), "clopper-pearson")


def bootstrap(
    values: Sequence[float], seed: int, counts: Sequence[int] | None = None
) -> Interval | None:
    """Return the mean of `values` with its 95 % BCa interval over questions (Efron 1987).

    `counts` has how often each question was asked, if not once: the mean is over all answers, and a
    question is drawn with all of its answers. Return None where all values are equal.
    """
    if len(set(values)) < 2:
        return None

    from scipy import stats

    weights = np.asarray([1] * len(values) if counts is None else counts, dtype=np.float64)
    sums = np.asarray(values, dtype=np.float64) * weights
    once = bool((weights == 1).all())
    result = stats.bootstrap(
        (sums,) if once else (sums, weights),
        np.mean if once else _ratio,
        paired=not once,
        n_resamples=RESAMPLES,
        batch=100,  # resamples at a time, so that a full MMLU needs megabytes
        confidence_level=0.95,
        method="BCa",
        random_state=numpy_generator(seed, "bootstrap"),
    )
    low, high = (float(end) for end in result.confidence_interval)

    return Interval(math.fsum(sums) / math.fsum(weights), low, high, "bootstrap")


def _ratio(sums: Array, weights: Array, axis: int) -> Array:
    """Return the mean over the answers to some questions, whose sums and numbers these are."""
    return np.asarray(sums.sum(axis) / weights.sum(axis))
