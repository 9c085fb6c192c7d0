"""Measures of a model: held-out loss and accuracy, and the effect of an adapter."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.data import IGNORE_INDEX, Example
from fluvial.models.pool import ModelPool
from fluvial.training.train import collate, predictions, summed_loss
from fluvial.wire.tensors import Named

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Heldout:
    """Sums over label tokens, so that results of several sites add up exactly."""

    loss_sum: float
    hits: int
    label_tokens: int

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "Heldout":
        """Return the sums over logits (positions, vocabulary) and their labels (positions,)."""
        return cls(
            float(summed_loss(logits, labels)),
            int((logits.argmax(-1) == labels).sum()),
            int((labels != IGNORE_INDEX).sum()),
        )

    @classmethod
    def sum(cls, parts: Sequence["Heldout"]) -> "Heldout":
        """Return the sums over all parts."""
        return cls(
            math.fsum(sums.loss_sum for sums in parts),
            sum(sums.hits for sums in parts),
            sum(sums.label_tokens for sums in parts),
        )

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats per label token."""
        return self.loss_sum / self.label_tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the loss; infinite beyond 64-bit floats."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def accuracy(self) -> float:
        """Share of label tokens that are the model's first choice."""
        return self.hits / self.label_tokens


@torch.no_grad()
def heldout(
    model: nn.Module, examples: Sequence[Example], *, pad_token_id: int, batch_size: int = 16
) -> Heldout:
    """Return loss and next-token accuracy of `model` on `examples`.

    Sequences of like length share a batch.
    """
    assert examples, "no examples"
    device = next(model.parameters()).device

    if model.training:
        model.eval()

    loss_sum = 0.0
    hits = 0
    logged_s = time.monotonic()
    order = sorted(examples, key=lambda example: len(example.input_ids))

    for start in range(0, len(order), batch_size):
        logits, labels = predictions(
            model, collate(order[start : start + batch_size], pad_token_id, device)
        )
        sums = Heldout.of(logits, labels)
        loss_sum = loss_sum + sums.loss_sum
        hits = hits + sums.hits

        if time.monotonic() - logged_s > 1:
            logged_s = time.monotonic()
            logger.info(
                "held-out loss: %d of %d sequences", min(start + batch_size, len(order)), len(order)
            )

    return Heldout(loss_sum, hits, sum(example.label_tokens for example in examples))


def on_public_text(pool: ModelPool, adapter: Named, examples: Sequence[Example]) -> dict[str, Any]:
    """Return loss and accuracy of the base and of `adapter` on text that belongs to no site."""
    result: dict[str, Any] = {"sequences": len(examples)}
    for name, state in (("base", pool.base_state()), ("final", adapter)):
        with pool.model(state) as model:
            sums = heldout(model, examples, pad_token_id=pool.tokenizer.pad_token_id)
        result[name] = {"loss": sums.loss, "accuracy": sums.accuracy}

    return result


def has_effect(pool: ModelPool, adapter: Named, input_ids: Sequence[int]) -> bool:
    """Return False if `adapter` gives exactly the base's logits."""
    tokens = torch.tensor([list(input_ids)], device=pool.device)
    logits = []

    with torch.no_grad():
        for state in (pool.base_state(), adapter):
            with pool.model(state) as model:
                logits.append(model(input_ids=tokens, use_cache=False).logits)

    return not torch.equal(*logits)
