"""Guards against a bad download or a bad update: gradients compared, and the true loss measured
before a step is taken.

Both need public text. The gradient of a block through a compressed model is biased
(docs/methods/fedcybgd.md); its cosine to the gradient through the exact model says how much is
left, and per byte it ranks the forms of download.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fluvial.data import Example
from fluvial.models.pool import ModelPool
from fluvial.models.tuning import tuned_parameters
from fluvial.settings import Settings
from fluvial.training.evaluate import heldout
from fluvial.training.train import collate, predictions, summed_loss
from fluvial.wire.tensors import Named


class GateConfig(Settings):
    """Measure of a compressed download before it is used: gradients on public text."""

    threshold: float = Field(0.7, ge=0, lt=1)
    """Least cosine between a block's gradient through the download and the exact one; 0 measures
    nothing."""
    examples: int = Field(16, ge=1, le=10**6)
    """Number of sequences of public text on which gradients are compared."""


class AcceptConfig(Settings):
    """Test of a step by its loss on public text."""

    on: Literal["always", "public loss"] = "always"
    """Steps that the server takes: all (the paper), or those that do not raise the loss on public
    text."""
    slack: float = Field(0.0, ge=0, le=1e6)
    """Rise of the public loss that is accepted, in nats per label token."""
    halvings: int = Field(2, ge=0, le=8)
    """Number of times that a refused step is halved and tried again before it is dropped."""
    examples: int = Field(32, ge=1, le=10**6)
    """Number of sequences of public text on which a step is measured."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        idle = sorted(self.model_fields_set - {"on"})
        if self.on == "always" and idle:
            yield f"{', '.join(idle)}: without effect under on='always'; set on='public loss'"


def gradient(
    model: nn.Module, names: Sequence[str], examples: Sequence[Example], pad_token_id: int
) -> Named:
    """Return the gradient of the mean loss by the weights of `names`, fp32, on the CPU."""
    parameters = {name: tuned_parameters(model)[name].requires_grad_() for name in names}
    device = next(iter(parameters.values())).device
    loss = summed_loss(*predictions(model, collate(examples, pad_token_id, device)))
    gradients = torch.autograd.grad(
        loss / sum(each.label_tokens for each in examples), list(parameters.values())
    )

    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return {name: each.float().cpu() for name, each in zip(names, gradients, strict=True)}


@dataclass(frozen=True)
class Judge:
    """The public loss, and what it makes of a step."""

    config: AcceptConfig
    pool: ModelPool
    examples: Sequence[Example]

    def loss(self, state: Named) -> float:
        """Return the loss on public text, in nats per label token."""
        with self.pool.model(state) as model:
            return heldout(model, self.examples, pad_token_id=self.pool.tokenizer.pad_token_id).loss

    def share(self, state: Named, moved: Callable[[float], Named]) -> tuple[float, float, float]:
        """Return the largest of 1, 1/2, 1/4, ... of a step that may be taken, or 0, and the loss
        before and after.

        `moved(share)` is the block after that share of the step. A step to a loss that is not
        finite is refused, whatever the loss before: which weights overflow depends on the
        processor.
        """
        before = self.loss(state)
        for halving in range(self.config.halvings + 1):
            share = 0.5**halving
            after = self.loss({**state, **moved(share)})
            better = after <= before + self.config.slack or not math.isfinite(before)

            if better and math.isfinite(after):
                return share, before, after

        return 0.0, before, before
