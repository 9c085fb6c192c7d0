"""The measures of one site: its memory, its speed by batch, its data; nothing is asked of a person.

A limit or a rate that the run's `method.budgets` gives takes the place of the measure.
"""

import os
import resource
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fluvial.data import Example
from fluvial.errors import ConfigError
from fluvial.federation.sites import Site
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.planner.profile import (
    MOST_RATE,
    Peak,
    Profile,
    Speed,
    Tokens,
)
from fluvial.methods.fedpipe.planner.settings import SiteBudget
from fluvial.methods.fedpipe.site_configuration import format_of
from fluvial.models.states import initial_state
from fluvial.models.tuning import checkpointed_layers, tuned_parameters
from fluvial.training.train import TrainConfig, collate, predictions, summed_loss

CGROUP = Path("/sys/fs/cgroup/memory.max")
MEGA = 10**6
TIMED = 2
"""Timed passes at each batch, after one that warms up; the quickest counts."""
MOST_UNKNOWN = 4
"""Sequences of a pass of which it is not known whether it fits, at most twice as many."""
OPTIMIZER_BYTES = 12
"""Bytes for each trained value beside its weight: fp32 gradient and two moments of AdamW."""
DIGITS = 4
"""Significant digits of a measured speed on the wire."""


def measured(site: Site, config: FedPipeConfig) -> Profile:
    """Return the profile of a site: measured, where its budget gives no limit or rate."""
    budget = config.budget(site.name)
    examples = site.load().train
    limits = [limit for limit in (budget.memory_mb, site.memory_mb) if limit is not None]
    memory = int(min(limits) * MEGA) if limits else memory_limit()
    speeds, peaks = _passes(site, config, budget, examples, memory)

    return Profile(
        memory_bytes=memory,
        speeds={format_of(site.assignment): speeds},
        up_bytes_s=_rate(budget.up_mbit_s),
        down_bytes_s=_rate(budget.down_mbit_s),
        latency_s=(budget.rtt_ms or 0.0) / 1000,
        samples=full_load(site.train, len(examples)),
        tokens=_tokens(examples, full_load(site.train, len(examples))),
        peaks=peaks,
    )


def memory_limit() -> int:
    """Return the bytes that this process may have: of the GPU, or the least of the machine's
    memory, the limit of its control group and its own resource limit."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()

    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    if CGROUP.is_file() and (text := CGROUP.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)


def _rate(mbit: float | None) -> float:
    """Return bytes a second; a link of which nothing is known costs no time."""
    return MOST_RATE if mbit is None else mbit * MEGA / 8


def full_load(train: TrainConfig, examples: int) -> int:
    """Return the sequences that a round of the run trains on, of a site with so many of them."""
    if train.max_steps is not None:
        return train.max_steps * train.logical_batch
    return max(1, round(train.num_train_epochs * examples))


def _tokens(examples: Sequence[Example], samples: int) -> tuple[Tokens, ...]:
    """Return the tokens of a round of `samples` sequences of the mean length: cut to a quarter of
    the longest, to half, and whole."""
    lengths = [len(example.input_ids) for example in examples]
    longest = max(lengths)
    return tuple(
        Tokens(most, -(-sum(min(length, most) for length in lengths) * samples // len(lengths)))
        for most in sorted({max(2, longest // 4), max(2, longest // 2), longest})
    )


def _passes(
    site: Site,
    config: FedPipeConfig,
    budget: SiteBudget,
    examples: Sequence[Example],
    memory: int,
) -> tuple[tuple[Speed, ...], tuple[Peak, ...]]:
    """Return the speed by batch, and the memory of the two smallest batches.

    Batches ascend until one does not fit into the memory. If none does, the speed is that of a
    single sequence, so that no pass ends the process.
    """
    longest = sorted(examples, key=lambda example: -len(example.input_ids))
    state = initial_state(site.layout, site.seed)
    speeds: list[Speed] = []
    peaks: list[Peak] = []

    with site.pool.model(state, trainable="A and B", assignment=site.assignment) as model:

        def inputs_of(batch: int) -> dict[str, Tensor]:
            rows = [longest[index % len(longest)] for index in range(batch)]
            return collate(rows, site.pool.tokenizer.pad_token_id or 0, _device(model))

        def speed_of(batch: int) -> Speed:
            speed = budget.tokens_s or budget.speed * _speed(model, inputs_of(batch))
            return Speed(batch, float(f"{speed:.{DIGITS}g}"))

        batches = sorted(config.planner.batches)
        for batch in _two(batches):
            inputs = inputs_of(batch)
            length = inputs["input_ids"].shape[1]
            plain, recomputed = peak_bytes(model, inputs)
            peaks.append(Peak(batch, length, False, plain))
            peaks.append(Peak(batch, length, True, recomputed))

        first, second = (peak for peak in peaks if not peak.checkpointing)
        sequence_bytes = (second.bytes - first.bytes) / (second.batch - first.batch)
        for batch in batches:
            if first.bytes + sequence_bytes * (batch - first.batch) > memory:
                break  # without a pass, which could end the process

            speeds.append(speed_of(batch))

        if not speeds:
            speeds.append(speed_of(1))

    return tuple(speeds), tuple(peaks)


def _two(batches: Sequence[int]) -> list[int]:
    """Return the two smallest of ascending batches; beside a single one its half, or 2 beside 1.

    Two points determine the line of memory over the tokens of a pass. Where the smallest batch is
    large, they are 1 and 2: whether a large one fits must be known before a pass with it.
    """
    if batches[0] > MOST_UNKNOWN:
        return [1, 2]
    if len(batches) > 1:
        return [batches[0], min(batches[1], 2 * batches[0])]
    only = batches[0]
    return [only // 2, only] if only > 1 else [1, 2]


def _device(model: nn.Module) -> torch.device:
    return next(iter(tuned_parameters(model).values())).device


def _pass(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Run one forward and backward pass, and drop the gradients."""
    summed_loss(*predictions(model, inputs)).backward()  # type: ignore[no-untyped-call]
    for parameter in tuned_parameters(model).values():
        parameter.grad = None


def _speed(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Return tokens a second of a forward and backward pass."""
    _pass(model, inputs)
    seconds = []
    for _ in range(TIMED):
        _wait(inputs)
        started = time.perf_counter()
        _pass(model, inputs)
        _wait(inputs)
        seconds.append(time.perf_counter() - started)

    return inputs["input_ids"].numel() / max(min(seconds), 1e-9)


def _wait(inputs: dict[str, Tensor]) -> None:
    """Wait for the device."""
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize()


def peak_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """Return the bytes of weights, optimizer and everything that one forward pass saves for its
    backward pass, each memory once: without and with gradient checkpointing.

    With checkpointing these are what is saved outside the layers, the input of each layer, and what
    the largest layer saves when it is computed again. Without layers to recompute both are equal.
    """
    weights = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for parameter in model.parameters()
    }
    trained = sum(parameter.numel() for parameter in tuned_parameters(model).values())
    fixed = sum(weights.values()) + OPTIMIZER_BYTES * trained
    layers = _layers(model)
    saved: list[dict[int, int]] = [{} for _ in range(len(layers) + 1)]
    inside = [len(layers)]
    between = [0]

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            saved[inside[-1]][memory.data_ptr()] = memory.nbytes()
        return tensor

    def enter(number: int, _layer: nn.Module, given: tuple[Any, ...]) -> None:
        inside.append(number)
        between[0] += sum(each.nbytes for each in given if isinstance(each, Tensor))

    def leave(_layer: nn.Module, _given: object, _result: object) -> None:
        inside.pop()

    hooks = [layer.register_forward_pre_hook(partial(enter, n)) for n, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = summed_loss(*predictions(model, inputs))
            by_place = [sum(memories.values()) for memories in saved]
            everything = {key: size for memories in saved for key, size in memories.items()}
            del loss
    finally:
        for hook in hooks:
            hook.remove()

    *by_layer, outside = by_place
    recomputed = outside + between[0] + max(by_layer, default=0)
    return fixed + sum(everything.values()), fixed + recomputed


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that checkpointing recomputes, none where the architecture has none."""
    try:
        return checkpointed_layers(model)
    except ConfigError:
        return []
