"""The settings of local training."""

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fluvial.settings import Settings


class TrainConfig(Settings):
    """Local training of one site in one round; names as in Hugging Face's `TrainingArguments`."""

    learning_rate: float = Field(1.5e-4, ge=1e-30, le=100)
    """Peak learning rate; the default is CG-FedLLM's value for LLaMA-7B with Dolly."""
    per_device_train_batch_size: int = Field(8, ge=1, le=10**6)
    """Sequences of one forward pass (micro-batch)."""
    gradient_accumulation_steps: int = Field(1, ge=1, le=10**6)
    """Micro-batches of one optimizer step; their product is the logical batch."""
    num_train_epochs: float = Field(1.0, ge=1e-6, le=10**6)
    """Passes over the site's data in one round; refused where `max_steps` is set."""
    max_steps: int | None = Field(None, ge=1, le=10**9)
    """Optimizer steps of one round, instead of `num_train_epochs`."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "linear"
    """Decay of the learning rate after the warm-up; "constant" has the warm-up that is set, as
    "constant_with_warmup"."""
    round_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate over the rounds of the run, beside the schedule of each round: in
    round r of R the peak has the share 1 - (r - 1) / R, or half a cosine of it."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    warmup_steps: int = Field(0, ge=0, le=10**9)
    """Steps of a round in which the learning rate rises, instead of `warmup_ratio`."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """Decoupled weight decay (AdamW), or L2 penalty (SGD)."""
    max_grad_norm: float = Field(1.0, ge=0, le=1e9)
    """Clipping threshold of the global gradient norm; 0 switches clipping off."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "sgd"] = "adamw_torch"
    """Optimizer, made anew in each round; "adamw_torch_fused" is AdamW in one kernel, quicker on a
    GPU."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = Field(1e-8, ge=1e-30, le=1)
    """Term that AdamW adds to the denominator."""
    gradient_checkpointing: bool = False
    """Recomputation of activations in the backward pass: less memory, more time."""
    bf16: bool = False
    """Forward passes under bfloat16 autocast; weights, gradients and optimizer stay fp32."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.max_steps is not None and self.num_train_epochs != 1:
            yield "num_train_epochs: without effect beside max_steps; remove one of the two"

        if self.warmup_steps and self.warmup_ratio:
            yield "warmup_ratio: without effect beside warmup_steps; remove one of the two"

        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if self.optim == "sgd" and self.differs(name):
                yield f"{name}: without effect under optim='sgd'; remove it"

    @property
    def logical_batch(self) -> int:
        """Sequences of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def in_round(self, round: int, rounds: int) -> "TrainConfig":
        """Return the settings of `round` (from 1) of `rounds`, with its own learning rate."""
        done = (round - 1) / rounds
        match self.round_scheduler_type:
            case "constant":
                return self
            case "linear":
                share = 1.0 - done
            case "cosine":
                share = 0.5 * (1 + math.cos(math.pi * done))

        return self.model_copy(update={"learning_rate": self.learning_rate * share})

    def warmup(self, steps: int) -> int:
        """Return the steps of warm-up in a round of `steps`."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * steps)

    def steps(self, num_examples: int) -> int:
        """Return the optimizer steps of one round on `num_examples` sequences.

        The last, smaller batch of an epoch counts.
        """
        if self.max_steps is not None:
            return self.max_steps
        return max(1, round(self.num_train_epochs * math.ceil(num_examples / self.logical_batch)))
