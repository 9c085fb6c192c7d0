"""The lists of modules of a model that are as long as it has decoder layers."""

from typing import Any

from torch import nn


def num_layers(model: nn.Module) -> int | None:
    """Return the decoder layers that a model's configuration names, None where it names none."""
    config: Any = getattr(model, "config", None)
    count: int | None = getattr(config, "num_hidden_layers", None)
    return count


def layer_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return the paths and lists of `num_layers` modules, outer ones first; works on the meta
    device.

    A model whose layers are one list has one, and more where another list, as of a layer's experts,
    is as long by chance.
    """
    count = num_layers(model)
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
