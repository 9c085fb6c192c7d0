"""The tuned parameters of a model (LoRA factors, or all weights), and its training switches."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fluvial.errors import ConfigError
from fluvial.models.adapters import PREFIX, SavedLora, SeededDropout, adapt, is_side
from fluvial.models.targets import LoraSettings
from fluvial.wire.tensors import Layout, Named, factor

Trainable = Literal["none", "A and B", "B"] | Collection[str]
"""The tuned parameters that require gradients: factors, or names; "A and B" is all of them."""


@dataclass(frozen=True)
class _Tuned:
    """The modules and parameters of one model that every message and every step needs."""

    parameters: dict[str, nn.Parameter]
    """LoRA factors by name, or all parameters of a model that has none."""
    dropouts: list[SeededDropout]


_cache: WeakKeyDictionary[nn.Module, _Tuned] = WeakKeyDictionary()


def _tuned(model: nn.Module) -> _Tuned:
    """Return the tuned parts of `model`, from one traversal: a model keeps its structure after
    `adapt`."""
    tuned = _cache.get(model)
    if tuned is None:
        adapter = {
            name.removeprefix(PREFIX).replace(".default.", "."): parameter
            for name, parameter in model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }
        dropouts = [module for module in model.modules() if isinstance(module, SeededDropout)]
        tuned = _cache[model] = _Tuned(adapter or dict(model.named_parameters()), dropouts)

    return tuned


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the LoRA factors by name, as `model.layers.0.self_attn.q_proj.lora_A.weight`.

    A model without an adapter gives all parameters, tied ones once.
    """
    return dict(_tuned(model).parameters)


def name_tuned(model: nn.Module, names: Collection[str]) -> None:
    """Let the tuned parameters of `model` be those named, LoRA factors and weights of the base."""
    tuned = _tuned(model)
    parameters = dict(model.named_parameters()) | tuned.parameters
    _cache[model] = replace(tuned, parameters={name: parameters[name] for name in names})


@contextmanager
def tuning_only(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let the tuned parameters of `model` be `parameters`, by name, inside; all of them require
    gradients, and no other does."""
    before = _tuned(model)
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    _cache[model] = replace(before, parameters=dict(parameters))
    try:
        yield
    finally:
        _cache[model] = before


def tuned_layout(base: nn.Module, lora: LoraSettings | SavedLora | None) -> Layout:
    """Return the layout of the adapter after its injection into `base`, or of all parameters.

    `base` may be on the meta device.
    """
    return read_shapes(base if lora is None else adapt(base, lora))


def read_shapes(model: nn.Module) -> Layout:
    """Return the layout of the tuned parameters; `model` may be on the meta device."""
    return Layout.of(
        {name: parameter.detach() for name, parameter in tuned_parameters(model).items()}
    )


@torch.no_grad()
def write_weights(model: nn.Module, weights: Named) -> None:
    """Copy `weights`, all or some of the tuned parameters, into the model, in its own types."""
    parameters = tuned_parameters(model)
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)


def set_trainable(model: nn.Module, trainable: Trainable) -> None:
    """Let the `trainable` ones of the tuned parameters require gradients, and no others."""
    for name, parameter in tuned_parameters(model).items():
        parameter.requires_grad_(_requires_grad(name, trainable))


def _requires_grad(name: str, trainable: Trainable) -> bool:
    if is_side(name):
        return False
    if isinstance(trainable, str):
        return trainable == "A and B" or (trainable == "B" and factor(name) == "B")
    return name in trainable


def switch_dropout(model: nn.Module, active: bool) -> None:
    """Switch every `SeededDropout` on, for training, or off; the base stays in evaluation mode."""
    for module in _tuned(model).dropouts:
        module.training = active


def reseed_dropout(model: nn.Module, seed: int) -> None:
    """Give every `SeededDropout` of `model` a new mask."""
    for module in _tuned(model).dropouts:
        module.seed = seed


def with_same_dropout(layer: nn.Module, inside: Callable[..., Any]) -> Callable[..., Any]:
    """Return `inside` with the dropout that `layer` has now, whatever it is in the backward pass.

    By then dropout is off again, or has the seed of a later batch.
    """
    dropouts = [module for module in layer.modules() if isinstance(module, SeededDropout)]
    now = [(dropout.training, dropout.seed) for dropout in dropouts]

    def run(*args: Any, **options: Any) -> Any:
        then = [(dropout.training, dropout.seed) for dropout in dropouts]
        try:
            _set_dropout(dropouts, now)
            return inside(*args, **options)
        finally:
            _set_dropout(dropouts, then)

    return run


def _set_dropout(dropouts: Sequence[SeededDropout], states: Sequence[tuple[bool, int]]) -> None:
    for dropout, (training, seed) in zip(dropouts, states, strict=True):
        dropout.training = training
        dropout.seed = seed


RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
"""Options of torch's `checkpoint`: nothing but seeded dropout is random in a forward pass."""


def checkpoint_layers(model: nn.Module) -> None:
    """Switch gradient checkpointing on; below the trained parameters still no graph is built.

    transformers' own works in training mode only, in which a base may draw random numbers. Raises
    `ConfigError` where the architecture has no layers for it.
    """
    from torch.utils.checkpoint import checkpoint

    for layer in checkpointed_layers(model):
        # An attribute of this one layer, which hides its class's `forward` until `whole_layers`
        # removes it.
        layer.forward = partial(checkpoint, layer.forward, **RECOMPUTED)


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that gradient checkpointing recomputes; raises `ConfigError` without
    one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]

    if not layers:
        raise ConfigError(
            "train.gradient_checkpointing: transformers has none for this architecture; remove it"
        )

    return layers


def whole_layers(model: nn.Module) -> None:
    """Switch gradient checkpointing off."""
    for module in model.modules():
        module.__dict__.pop("forward", None)
