"""The lists of modules of a model that are as long as it has decoder layers."""

from typing import Any

from torch import nn


def text_config(model: nn.Module) -> Any:
    """Return the configuration of a model's decoder, which is its own unless it reads images too;
    None for a module without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def num_layers(model: nn.Module) -> int | None:
    """Return the decoder layers that a model's configuration names, None where it names none."""
    count: int | None = getattr(text_config(model), "num_hidden_layers", None)
    return count


def layer_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return the paths and lists of `num_layers` modules, outer ones first; works on the meta
    device.

    A model whose layers are one list has one, and more where another list, as of a layer's experts,
    is as long by chance. Layers of a tower of images or sounds are none of the decoder's.
    """
    count = num_layers(model)
    decoder = _decoder(model)
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in decoder
    ]


def _decoder(model: nn.Module) -> set[int]:
    """Return the identities of the modules that decode text: all, unless the model names others."""
    decoder: Any = model
    if hasattr(model, "get_decoder"):
        decoder = model.get_decoder()  # type: ignore[operator]

    return {id(module) for module in decoder.modules()}
