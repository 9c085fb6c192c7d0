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
from typing import TypeVar

import torch
from torch import Tensor, nn

from fluvial.data import IGNORE_INDEX, Example
from fluvial.errors import DivergenceError
from fluvial.models.behaviour import packed
from fluvial.models.tuning import reseed_dropout, switch_dropout, tuned_parameters
from fluvial.seeds import derive
from fluvial.training.config import TrainConfig
from fluvial.training.stepper import Stepper
from fluvial.training.team import ALONE, Team
from fluvial.wire.tensors import Named

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
    ids = batch["input_ids"]
    if "position_ids" in batch:
        logits = model(**packed(model, ids, batch["position_ids"])).logits
        logits = logits.reshape(*ids.shape, -1)
    else:
        logits = model(
            input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False
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
    """Return right-padded `input_ids`, `attention_mask` and `labels` (batch, longest), int64.

    Beside packed sequences, `position_ids` begin at 0 with each record, and with the padding.
    """
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

    if any(example.lengths for example in examples):
        batch["position_ids"] = torch.stack([_positions(each, longest) for each in examples])

    return {name: tensor.to(device) for name, tensor in batch.items()}


def _positions(example: Example, longest: int) -> Tensor:
    """Return the positions (longest,) of the records of a sequence and of the padding after it."""
    length = len(example.input_ids)
    lengths = (*(example.lengths or (length,)), longest - length)
    return torch.cat([torch.arange(each) for each in lengths])


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
    team: Team = ALONE,
) -> TrainReport:
    """Tune the parameters of `model` that require gradients, in place, with a fresh optimizer.

    `start` has values by the names of `models.tuning.tuned_parameters`; see `Stepper`. `watch`
    sees the parameters of each step with their gradients; False makes that step the last. The
    processes of `team` share each batch. Raises `DivergenceError` when a loss or a gradient norm is
    not finite; the step is then not taken.
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
        seed = derive(dropout_seed, step)
        loss = _backward(model, batch, tokens, config, pad_token_id, seed, team)
        loss = team.sum_gradients(parameters, loss)
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
    team: Team,
) -> float:
    """Accumulate the gradient of this process's share of one logical batch; returns the loss of the
    share over the label tokens of the whole batch, nats."""
    total = 0.0
    size = team.micro_batch(len(batch), config.per_device_train_batch_size)
    device = next(iter(tuned_parameters(model).values())).device

    for number, start in enumerate(range(0, len(batch), size)):
        if number % team.size != team.rank:
            continue
        reseed_dropout(model, derive(dropout_seed, number))
        autocast = torch.autocast(device.type, torch.bfloat16) if config.bf16 else nullcontext()
        with autocast:
            inputs = collate(batch[start : start + size], pad_token_id, device)
            loss = summed_loss(*predictions(model, inputs))

        (loss / tokens).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())

    return total / tokens
