"""The weights of a base model's folder, under the model's names and in the model's form.

A folder may name its tensors otherwise than the model does: without the base model's prefix, as an
older version did, or with the experts of a layer one by one where the model has them in one tensor.
transformers renames and converts them when it loads the folder; a source of this module gives what
transformers would load.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fluvial.errors import ConfigError
from fluvial.interrupt import temporary_folder
from fluvial.models.hf import PreTrainedModel
from fluvial.models.stored import stored_tensors
from fluvial.models.weight_sources import FolderSource, Source, mapped_tensors, tensor_files


def wanted(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of `model` by name, tied ones once.

    `model` may be on the meta device.
    """
    parameters = dict(model.named_parameters())
    return parameters | persistent_buffers(model)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are part of a model's state, by name."""
    state = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in state}


def open_weights(
    folder: Path,
    model: nn.Module,
    load: Callable[[], nn.Module],
    holds: Callable[[str], bool] = lambda _: True,
) -> Source:
    """Return a source of the parameters and persistent buffers of `model`, equal to
    `from_pretrained`.

    `model` may be on the meta device; names, shapes and types are its own. Where every tensor is
    stored as one of the same shape, under whatever name, it is read from `folder` when it is used.
    Else `load` makes the model once, and its weights lie in a temporary folder from then on. The
    source has those tensors alone that `holds` takes by name, and others are not read. Raises
    `ConfigError` where the folder cannot be read or stores two values of a tensor that the model
    has once.
    """
    tensors = {name: tensor for name, tensor in wanted(model).items() if holds(name)}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    places = _places(folder, model, tensors, holds)

    return (
        FolderSource(folder, places, dtypes) if places is not None else _Converted(load(), dtypes)
    )


def held_tensors(
    folder: Path, model: PreTrainedModel, holds: Callable[[str], bool]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the stored tensors by their stored names, and a device for each of the model's.

    Those of weights that `holds` takes are mapped, for the CPU; others are on the meta device. It
    is for transformers to convert. Raises `ConfigError` where the folder has no safetensors.
    """
    headers = stored_tensors(folder)
    targets = _targets(model, tensor_files(folder))
    held = [key for key in headers if holds(targets[key][0])]
    stored = headers | mapped_tensors(folder, held)
    devices = {name: "cpu" if holds(name) else "meta" for name in model.state_dict()}
    return stored, devices


def keep_types(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give fp32 to those weights of `model` that transformers never holds in `dtype`."""
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    if not plan:
        return
    held = re.compile("|".join(pattern.replace("*", ".*") for pattern in plan))
    for name, tensor in wanted(model).items():
        if held.search(name):
            tensor.data = tensor.data.float()


def compute_buffers(model: PreTrainedModel) -> None:
    """Compute anew the buffers that no folder stores, as `from_pretrained` does after it made a
    model.

    While a model in half precision is made, torch's default type is that one, and buffers computed
    then are coarser.
    """
    for tensor in wanted(model).values():
        # transformers leaves a tensor with this mark alone.
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        module._is_hf_initialized = False
    if hasattr(model, "initialize_weights"):
        model.initialize_weights()


def check_constant(model: PreTrainedModel) -> None:
    """Raise `ConfigError` if `model` changes weights or buffers of its own while it reads text."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise ConfigError(
                f"model.name_or_path: {path} ({type(module).__name__}) keeps running means of what "
                "it reads, which are in no update; choose another model"
            )

    if getattr(model.config, "rescale_every", 0) > 0:
        raise ConfigError(
            f"model.name_or_path: {type(model).__name__} divides its own weights when it is "
            "evaluated; set rescale_every to 0 in its config.json, which changes no result"
        )


class _Converted(FolderSource):
    """Weights that transformers has converted, in a folder that is removed with this object."""

    def __init__(self, model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
        path = temporary_folder(self)
        weights = wanted(model)
        tensors = {name: weights[name].detach().contiguous() for name in dtypes}
        save_file(tensors, path / "model.safetensors")
        super().__init__(path, list(dtypes), dtypes)


def _places(
    folder: Path,
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    holds: Callable[[str], bool],
) -> dict[str, str] | None:
    """Return the stored name of each of `tensors`, or None where some are not stored as they are in
    the model."""
    try:
        stored = tensor_files(folder)
    except ConfigError:
        if any(folder.glob("*.safetensors*")):
            raise
        return None  # of another format, which `load` reads or refuses

    renamed = _renamed(model, stored, holds)
    if renamed is None:
        return None

    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    places = {}
    for name, tensor in tensors.items():
        aliases = [alias for alias in shared.get(id(tensor), [name]) if alias in renamed]
        if not aliases:
            return None
        if len(aliases) > 1:
            _check_equal(folder, [renamed[alias] for alias in aliases])
        places[name] = renamed[aliases[0]]

    source = FolderSource(folder, places)
    same = all(source.shape(name) == tuple(tensor.shape) for name, tensor in tensors.items())
    return places if same else None


def _renamed(
    model: PreTrainedModel, stored: dict[str, Path], holds: Callable[[str], bool]
) -> dict[str, str] | None:
    """Return the stored name by the model's name, or None if some tensor is converted and not only
    renamed."""
    state = model.state_dict()
    names: dict[str, str] = {}

    for key, (name, converted) in _targets(model, stored).items():
        if not holds(name):
            continue
        if name in state and (converted or name in names):
            return None
        names[name] = key

    return names


def _targets(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return the model's name of each stored tensor, and true where transformers converts it."""
    state = model.state_dict()
    prefix = model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except (
        ImportError
    ):  # transformers 4 adds or takes the base model's prefix and does nothing else
        return {name: (name if name in state else f"{prefix}.{name}", False) for name in stored}

    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    targets = {}

    for key in sorted(stored, key=dot_natural_key):
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, converted = rename_source_key(key, [], [], prefix, state)
        targets[key] = (name, converted is not None)

    return targets


def _check_equal(folder: Path, names: list[str]) -> None:
    """Raise `ConfigError` unless the stored tensors `names`, which the model ties, are equal."""
    source = FolderSource(folder, names)
    first = source.get(names[0])

    if all(torch.equal(first, source.get(name)) for name in names[1:]):
        return

    raise ConfigError(
        f"{folder}: {names[0]!r} and {names[1]!r} differ, and config.json ties them; set "
        "tie_word_embeddings to false there"
    )
