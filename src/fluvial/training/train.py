"""The one training loop and the one loss.

The loss of a logical batch is the summed token cross-entropy divided by the label tokens of that
whole batch, however it is cut into micro-batches: averaging each micro-batch over its own tokens
gives another gradient (cosine 0.87 to the right one was measured in a reproduction of CG-FedLLM).
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fluvial.data import IGNORE_INDEX, Example
from fluvial.errors import DivergenceError
from fluvial.models.tuning import reseed_dropout, switch_dropout, tuned_parameters
from fluvial.seeds import derive
from fluvial.settings import Settings
from fluvial.wire.tensors import Layout, Named

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after the warm-up."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """Decoupled weight decay (AdamW), or L2 penalty (SGD)."""
    max_grad_norm: float = Field(1.0, ge=0, le=1e9)
    """Clipping threshold of the global gradient norm; 0 switches clipping off."""
    optim: Literal["adamw_torch", "sgd"] = "adamw_torch"
    """Optimizer, made anew in each round."""
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
        fields = type(self).model_fields
        if self.max_steps is not None and self.num_train_epochs != 1:
            yield "num_train_epochs: without effect beside max_steps; remove one of the two"

        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if self.optim == "sgd" and getattr(self, name) != fields[name].default:
                yield f"{name}: without effect under optim='sgd'; remove it"

    @property
    def logical_batch(self) -> int:
        """Sequences of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def steps(self, num_examples: int) -> int:
        """Return the optimizer steps of one round on `num_examples` sequences.

        The last, smaller batch of an epoch counts.
        """
        if self.max_steps is not None:
            return self.max_steps
        return max(1, round(self.num_train_epochs * math.ceil(num_examples / self.logical_batch)))


@dataclass(frozen=True)
class TrainReport:
    """The result of one call of `train`."""

    steps: int
    label_tokens: int
    loss: float
    """Mean loss per label token over all steps, nats, each batch measured before its step."""
    grad_norm: float
    """Mean global gradient norm before clipping."""
    weights: Named = field(default_factory=dict, compare=False, repr=False)
    """The trained parameters, by the names of `tuned_parameters`, fp32, on the CPU."""


def predictions(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits (batch * (seq - 1), vocabulary), fp32, and the labels (batch * (seq - 1),).

    Position by position, the label is the next token of `batch`.
    """
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    return shifted(logits, batch["labels"])


def shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (batch, seq, vocabulary) and labels (batch, seq) as `predictions` has them."""
    return logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy in nats, summed over the labels that are not `IGNORE_INDEX`."""
    return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def collate(
    examples: Sequence[Example], pad_token_id: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return right-padded `input_ids`, `attention_mask`, `labels`, (batch, longest sequence),
    int64."""
    longest = max(len(example.input_ids) for example in examples)
    rows = len(examples)
    batch = {
        "input_ids": torch.full((rows, longest), pad_token_id),
        "attention_mask": torch.zeros((rows, longest), dtype=torch.int64),
        "labels": torch.full((rows, longest), IGNORE_INDEX),
    }

    for row, example in enumerate(examples):
        length = len(example.input_ids)
        batch["input_ids"][row, :length] = torch.tensor(example.input_ids)
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, :length] = torch.tensor(example.labels)

    return {name: tensor.to(device) for name, tensor in batch.items()}


def shuffled_batches(
    examples: Sequence[T], size: int, generator: torch.Generator
) -> Iterator[list[T]]:
    """Yield batches of `size` without end.

    Each epoch is a fresh permutation, and its last batch may be smaller.
    """
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [examples[index] for index in order[start : start + size]]


def drawn_seed(generator: torch.Generator) -> int:
    """Draw the seed of dropout, which comes before the first permutation of a training."""
    return int(torch.randint(2**62, (1,), generator=generator))


def learning_rate_share(step: int, steps: int, config: TrainConfig) -> float:
    """Return the share of the peak learning rate at `step` (0-based) of `steps`.

    It rises in the warm-up, then decays towards 0.
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return 1.0

    done = (step - warmup) / max(1, steps - warmup)
    return (
        1.0 - done if config.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    )


AT_ONCE = 2**24
"""Parameters below which AdamW updates all tensors at once, with 4 more bytes for each."""


class Stepper:
    """The optimizer of one round for some parameters of a model, with its learning rates.

    Parameters in half precision are tuned by way of fp32 masters that last for all steps, because a
    step is smaller than what half precision resolves (Micikevicius et al., ICLR 2018,
    https://arxiv.org/abs/1710.03740).
    """

    def __init__(
        self,
        trained: dict[str, nn.Parameter],
        config: TrainConfig,
        *,
        steps: int,
        start: Named | None = None,
    ) -> None:
        """Begin `steps` steps; masters begin at `start`, by name, or else at the parameters."""
        self.steps = steps
        self._trained = trained
        self._config = config
        self._masters = _masters(trained, start or {})
        self._optimizer = _optimizer(list(self._masters.values()), config) if trained else None

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Make step `number`, counted from 0, with the parameters' gradients, and drop these."""
        if self._optimizer is None:
            return

        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * learning_rate_share(
                number, self.steps, self._config
            )

        copies = [
            (parameter, self._masters[name])
            for name, parameter in self._trained.items()
            if self._masters[name] is not parameter
        ]
        for parameter, master in copies:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for parameter, master in copies:
            parameter.copy_(master)

    @torch.no_grad()
    def replace(self, weights: Named) -> None:
        """Go on from `weights`, fp32, by name; the optimizer keeps its moments."""
        for name, parameter in self._trained.items():
            self._masters[name].copy_(weights[name])
            parameter.copy_(self._masters[name])

    def state(self) -> Named:
        """Return weights and moments after at least one step, in the `stepper_layout`, fp32."""
        state = {f"weights/{name}": tensor for name, tensor in self.weights().items()}
        for name, master in self._masters.items():
            for moment in _moments(self._config):
                state[f"{moment}/{name}"] = self._state(master)[moment].to("cpu", copy=True)
        return state

    def restore(self, state: Named, steps: int) -> None:
        """Go on from the `state` of a stepper that has made `steps` steps."""
        self.replace({name: state[f"weights/{name}"] for name in self._masters})
        for name, master in self._masters.items():
            for moment in _moments(self._config):
                values = state[f"{moment}/{name}"].to(master.device, copy=True)
                self._state(master).update({moment: values, "step": torch.tensor(float(steps))})

    def _state(self, master: nn.Parameter) -> dict[str, Tensor]:
        assert self._optimizer is not None, "nothing is trained"
        state: dict[str, Tensor] = self._optimizer.state[master]
        return state

    def weights(self) -> Named:
        """Return the trained parameters by name, fp32, on the CPU."""
        return {
            name: master.detach().to("cpu", copy=True) for name, master in self._masters.items()
        }


def stepper_layout(tuned: Layout, config: TrainConfig) -> Layout:
    """Return the layout of `Stepper.state` for parameters of the layout `tuned`."""
    kinds = ("weights", *_moments(config))
    names = ((f"{kind}/{name}", shape) for kind in kinds for name, shape in tuned.shapes)
    return Layout(tuple(names))


def _moments(config: TrainConfig) -> tuple[str, ...]:
    """Return PyTorch's names of the optimizer's moments."""
    return () if config.optim == "sgd" else ("exp_avg", "exp_avg_sq")


def _masters(trained: dict[str, nn.Parameter], start: Named) -> dict[str, nn.Parameter]:
    """Return the optimizer's parameters: those in fp32 themselves, else copies in fp32."""
    return {
        name: parameter
        if parameter.dtype == torch.float32
        else nn.Parameter(
            start.get(name, parameter.detach()).to(parameter.device, torch.float32, copy=True)
        )
        for name, parameter in trained.items()
    }


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optim == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )

    return torch.optim.AdamW(
        parameters,
        # The same operations on all tensors at once: torch's choice on a GPU, and quicker on a CPU.
        foreach=sum(parameter.numel() for parameter in parameters) < AT_ONCE,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def train(
    model: nn.Module,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    pad_token_id: int,
    generator: torch.Generator,
    steps: int | None = None,
    start: Named | None = None,
    watch: Callable[[Mapping[str, nn.Parameter]], bool] | None = None,
) -> TrainReport:
    """Tune the parameters of `model` that require gradients, in place, with a fresh optimizer.

    `start` has values by the names of `models.tuning.tuned_parameters`; see `Stepper`. `watch`
    sees the parameters of each step with their gradients; False makes that step the last. Raises
    `DivergenceError` when a loss or a gradient norm is not finite; the step is then not taken.
    """
    trained = {
        name: parameter
        for name, parameter in tuned_parameters(model).items()
        if parameter.requires_grad
    }
    parameters = list(trained.values())
    assert parameters, "nothing to train"
    assert examples, "no examples"
    steps = config.steps(len(examples)) if steps is None else steps
    stepper = Stepper(trained, config, steps=steps, start=start)
    batches = shuffled_batches(examples, config.logical_batch, generator)
    dropout_seed = drawn_seed(generator)
    losses = 0.0
    norms = 0.0
    label_tokens = 0
    switch_dropout(model, active=True)

    for step in range(steps):
        batch = next(batches)
        tokens = sum(example.label_tokens for example in batch)
        assert tokens > 0, "a batch without label tokens"
        loss = _backward(model, batch, tokens, config, pad_token_id, derive(dropout_seed, step))
        go_on = watch is None or watch(trained)
        norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf))
        check_finite(loss, norm, step, steps, config)
        stepper.step(step)
        if (step + 1) % 50 == 0:
            logger.info("step %d of %d, loss %.4f", step + 1, steps, loss)

        losses = losses + loss * tokens
        norms = norms + norm
        label_tokens = label_tokens + tokens
        if not go_on:
            break

    switch_dropout(model, active=False)
    made = step + 1
    return TrainReport(made, label_tokens, losses / label_tokens, norms / made, stepper.weights())


def check_finite(loss: float, norm: float, step: int, steps: int, config: TrainConfig) -> None:
    """Raise `DivergenceError` where the loss or the gradient norm of a step is not finite."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise DivergenceError(
            f"step {step + 1} of {steps}: the loss or the gradient norm is not finite; "
            f"lower train.learning_rate (now {config.learning_rate}) or switch train.bf16 off"
        )


def _backward(
    model: nn.Module,
    batch: Sequence[Example],
    tokens: int,
    config: TrainConfig,
    pad_token_id: int,
    dropout_seed: int,
) -> float:
    """Accumulate the gradient of one logical batch; returns its loss per label token, nats."""
    total = 0.0
    size = config.per_device_train_batch_size
    device = next(iter(tuned_parameters(model).values())).device

    for number, start in enumerate(range(0, len(batch), size)):
        reseed_dropout(model, derive(dropout_seed, number))
        autocast = torch.autocast(device.type, torch.bfloat16) if config.bf16 else nullcontext()
        with autocast:
            inputs = collate(batch[start : start + size], pad_token_id, device)
            loss = summed_loss(*predictions(model, inputs))

        (loss / tokens).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())

    return total / tokens
