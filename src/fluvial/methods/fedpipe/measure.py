"""The measures of one site: its memory, its speed by batch, its data; nothing is asked of a person.

A limit or a rate that the run's `method.budgets` gives takes the place of the measure.
"""

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from fluvial.methods.fedpipe.format_errors import layer_errors
from fluvial.methods.fedpipe.holding import holdings, smallest
from fluvial.methods.fedpipe.planner.profile import (
    LEAST_RATE,
    MOST_RATE,
    Peak,
    Profile,
    Speed,
    Tokens,
)
from fluvial.methods.fedpipe.planner.settings import SiteBudget
from fluvial.methods.fedpipe.site_configuration import format_of
from fluvial.methods.fedpipe.step_times import StepTimer, fixed_s, spread_rows
from fluvial.models.assignment import Assignment
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.models.tuning import checkpointed_layers, tuned_parameters
from fluvial.training.config import TrainConfig
from fluvial.training.train import collate, predictions, summed_loss

CGROUP = Path("/sys/fs/cgroup/memory.max")
MEGA = 10**6
MOST_UNKNOWN = 4
"""Sequences of a pass of which it is not known whether it fits, at most twice as many."""
OPTIMIZER_BYTES = 12
"""Bytes for each trained value beside its weight: fp32 gradient and two moments of AdamW."""
DIGITS = 4
"""Significant digits of a measured speed, and of seconds, on the wire."""


def measured(site: Site, config: FedPipeConfig) -> Profile:
    """Return the profile of a site: measured, where its budget gives no limit or rate.

    The base is in the format in which the site holds it. Where no sequence fits whole beside it, it
    is in the smallest format that a plan may have.
    """
    budget = config.budget(site.name)
    examples = site.load().train
    memory = memory_of(config, site.name, site.memory_mb)
    for held in holdings(config, site.pool, memory):
        site.assigned = replace(held, batch=site.train.per_device_train_batch_size)
        passes = _passes(site, config, budget, examples, memory)
        if passes.whole:
            break

    return Profile(
        memory_bytes=memory,
        speeds={format_of(site.assignment): passes.speeds},
        up_bytes_s=_rate(budget.up_mbit_s, site.transfers.up_bytes_s),
        down_bytes_s=_rate(budget.down_mbit_s, site.transfers.down_bytes_s),
        latency_s=(budget.rtt_ms or 0.0) / 1000,
        samples=full_load(site.train, len(examples)),
        tokens=_tokens(examples, full_load(site.train, len(examples))),
        fixed_s=passes.fixed_s,
        peaks=passes.peaks,
        errors=layer_errors(site.pool, config.planner.measured_formats),
    )


def held(config: FedPipeConfig, pool: ModelPool, site: str, memory_mb: float | None) -> Assignment:
    """Return the run's assignment in the format in which a site holds the base, of which nothing
    was measured yet; `memory_mb` is the limit of the site's own file."""
    if not config.planner.formats:
        return pool.outline.assignment
    return holdings(config, pool, memory_of(config, site, memory_mb))[0]


def memory_of(config: FedPipeConfig, site: str, memory_mb: float | None) -> int:
    """Return the most bytes of a site: the lower limit of its budget and its file, else what the
    machine allows."""
    budget = config.budget(site)
    limits = [limit for limit in (budget.memory_mb, memory_mb) if limit is not None]
    return int(min(limits) * MEGA) if limits else memory_limit()


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


def _rate(mbit: float | None, measured: float | None) -> float:
    """Return bytes a second: those of the budget, else those that the site's messages showed; a
    link of which nothing is known costs no time."""
    if mbit is not None:
        return mbit * MEGA / 8
    return MOST_RATE if measured is None else min(max(_rounded(measured), LEAST_RATE), MOST_RATE)


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


@dataclass(frozen=True)
class Passes:
    """The measures of a site's passes."""

    speeds: tuple[Speed, ...]
    """Speeds by batch, in ascending order."""
    peaks: tuple[Peak, ...]
    """Memory of two passes, each without and with checkpointing; none where no pass fits."""
    fixed_s: float
    """Seconds of a round beside its steps."""
    whole: bool
    """True where a sequence fits whole, as long as the longest."""


def _passes(
    site: Site,
    config: FedPipeConfig,
    budget: SiteBudget,
    examples: Sequence[Example],
    memory: int,
) -> Passes:
    """Return the speed by batch, the memory of two passes, and the seconds beside steps.

    No pass is made that would need more than `memory`, by what shorter passes needed. Where no
    batch fits whole, speed is that of a single sequence, cut to what fits, and where weights and
    optimizer alone are too much there is neither speed nor memory; the planner refuses the site.
    """
    assignment = smallest(site.assignment, config.planner.ranks)
    state = initial_state(assignment.layout, site.seed)
    batches = sorted(config.planner.batches)
    longest = max(examples, key=lambda example: len(example.input_ids))
    length = len(longest.input_ids)
    pad = site.pool.tokenizer.pad_token_id or 0

    with site.pool.model(state, trainable="A and B", assignment=assignment) as model:
        if fixed_bytes(model) > memory:
            return Passes((Speed(1, budget.tokens_s or LEAST_RATE),), (), 0.0, False)

        timer = StepTimer(model, site.train, pad)

        def measure(batch: int, most: int) -> tuple[Peak, Peak]:
            rows = [_labelled(longest, most)] * batch
            inputs = collate(rows, pad, _device(model))
            plain, recomputed = peak_bytes(model, inputs)
            return Peak(batch, most, False, plain), Peak(batch, most, True, recomputed)

        def speed_of(batch: int, most: int) -> Speed:
            rows = [_labelled(row, most) for row in spread_rows(examples, batch)]
            tokens = sum(len(row.input_ids) for row in rows)
            return Speed(batch, _rounded(budget.speed * tokens / timer.step_s(rows)))

        eighth = max(2, length // 8)
        short = [*measure(1, eighth), *measure(2, eighth)]
        room = tokens_within(short, memory, length)
        fitting = [batch for batch in _two(batches) if batch * length <= room]
        whole = [peak for batch in fitting for peak in measure(batch, length)]
        peaks = tuple(whole if len(fitting) == 2 else short)
        room = tokens_within(peaks, memory, length)
        most = room
        if config.planner.checkpointing != "never":
            most = max(room, tokens_within(peaks, memory, length, checkpointing=True))
        fits = length <= most

        if budget.tokens_s is not None:
            fitting = [batch for batch in batches if batch * length <= room] or [1]
            return Passes(
                tuple(Speed(batch, budget.tokens_s) for batch in fitting), peaks, 0.0, fits
            )

        speeds: list[Speed] = []
        for batch in batches:
            if batch * length > room:
                break  # without a pass, which could end the process
            speeds.append(speed_of(batch, length))

        if not speeds and room >= 2:
            speeds.append(speed_of(1, min(length, room)))

    speeds = speeds or [Speed(1, LEAST_RATE)]
    beside_s = fixed_s(site, initial_state(site.layout, site.seed), timer.longest_s)
    return Passes(tuple(speeds), peaks, _rounded(beside_s / budget.speed), fits)


def _labelled(example: Example, length: int) -> Example:
    """Return the first `length` tokens of a sequence, all of them with labels where the cut leaves
    none."""
    cut = example.cut(0, length)
    return cut if cut.learns else Example(cut.input_ids, cut.input_ids)


def tokens_within(
    peaks: Sequence[Peak], memory: int, length: int, *, checkpointing: bool = False
) -> int:
    """Return the tokens of a pass of sequences of `length` that `memory` has room for, by the line
    through two measured passes without or with checkpointing.

    Where these had shorter sequences, a fifth of the tokens is left out, since attention may hold
    more for each token of a longer one.
    """
    first, second = (peak for peak in peaks if peak.checkpointing == checkpointing)
    tokens = first.batch * first.length
    each = (second.bytes - first.bytes) / (second.batch * second.length - tokens)
    room = max(0, int(tokens + (memory - first.bytes) / max(each, 1.0)))
    return room if first.length >= length else room * 4 // 5


def _rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


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


def fixed_bytes(model: nn.Module) -> int:
    """Return the bytes of weights, gradients and optimizer, without a pass."""
    trained = sum(parameter.numel() for parameter in tuned_parameters(model).values())
    return sum(_weights(model).values()) + OPTIMIZER_BYTES * trained


def _weights(model: nn.Module) -> dict[int, int]:
    """Return the bytes of the parameters by the address of their memory."""
    memories = (parameter.untyped_storage() for parameter in model.parameters())
    return {memory.data_ptr(): memory.nbytes() for memory in memories}


def peak_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """Return the bytes of weights, optimizer and everything that one forward pass saves for its
    backward pass, each memory once: without and with gradient checkpointing.

    With checkpointing these are what is saved outside the layers, the input of each layer, and what
    the largest layer saves when it is computed again. Without layers to recompute both are equal.
    """
    weights = _weights(model)
    fixed = fixed_bytes(model)
    layers = _layers(model)
    saved: list[dict[int, int]] = [{} for _ in range(len(layers) + 1)]
    inside = [len(layers)]
    between = [0]

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            saved[inside[-1]][memory.data_ptr()] = memory.nbytes()
        return tensor.detach()  # the tensor itself would keep its graph, and so itself, for ever

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
