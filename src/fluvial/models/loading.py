"""Load a base model: whole, as shapes on the meta device, or as a skeleton to be filled.

transformers is imported where a model is loaded, so that other commands answer at once.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fluvial.errors import ConfigError
from fluvial.models.attention import attending
from fluvial.models.base_weights import compute_buffers, held_tensors, keep_types
from fluvial.models.building import building
from fluvial.models.hf import PretrainedConfig, PreTrainedModel
from fluvial.models.pretrained import (
    ModelConfig,
    dtype_of,
    from_hub,
    from_settings,
    local_folder,
    read_config,
)
from fluvial.models.weights import check_finite, check_info, check_weights
from fluvial.storage.files import read_object

if TYPE_CHECKING:
    from transformers import GenerationConfig


def resolve_device(name: str) -> torch.device:
    """Return the device that `model.device` names; raises `ConfigError` where it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")

    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"model.device={name!r}: choose 'auto', 'cpu', 'cuda' or 'cuda:N'")

    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(
            f"model.device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "use 'auto'"
        )

    return device


def load_base(config: ModelConfig) -> nn.Module:
    """Return the base model on its device, frozen, and in evaluation mode for good.

    Thus nothing but `lora_dropout` is random: the base's own dropout, jitter and layer drop are
    off. Raises `ConfigError` if a weight is missing, has another shape or is not finite.
    """
    from transformers import AutoModelForCausalLM

    check_weights(config, meta_base(config))
    device = resolve_device(config.device)

    with building():
        model, info = from_hub(
            AutoModelForCausalLM.from_pretrained,
            config,
            config=attending(config, device),
            dtype=dtype_of(config),
            trust_remote_code=False,
            weights_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )

    check_info(info, model, config.name_or_path)
    check_finite(dict(model.named_parameters()), config.name_or_path)
    base: nn.Module = model.requires_grad_(False).eval()

    return base.to(device)


def load_held(config: ModelConfig, holds: Callable[[str], bool]) -> nn.Module:
    """Return the base model on the CPU with the weights that `holds` takes by name; other weights
    are not read, and are on the meta device.

    Raises `ConfigError` where the folder has no safetensors, or a weight is not finite.
    """
    base = meta_base(config)
    check_weights(config, base)
    stored, devices = held_tensors(weights_folder(config), base, holds)

    # accelerate says that names of single weights are no modules.
    with building(), warnings.catch_warnings(action="ignore"):
        model: nn.Module = type(base).from_pretrained(  # type: ignore[attr-defined]
            None,
            config=read_config(config),
            state_dict=stored,
            device_map=devices,
            dtype=dtype_of(config),
        )

    held = {name: p.detach() for name, p in model.named_parameters() if holds(name)}
    check_finite(held, config.name_or_path)
    return model


def meta_base(config: ModelConfig) -> nn.Module:
    """Return the base model on the meta device: names and shapes, without weights."""
    from transformers import AutoModelForCausalLM

    with building(), torch.device("meta"):
        model: nn.Module = from_settings(AutoModelForCausalLM.from_config, config)
    return model.requires_grad_(False).eval()


def skeleton(config: ModelConfig, settings: PretrainedConfig | None = None) -> nn.Module:
    """Return the base model with parameters on the meta device and real buffers, for `fill`.

    `settings` are those of a model that is to run (see `attending`).
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    kind = dtype_of(config)

    with building():
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = from_settings(
                AutoModelForCausalLM.from_config, config, settings
            )
        model.tie_weights()  # moving parameters to the meta device untied them

    keep_types(model, kind)
    compute_buffers(model)
    model.generation_config = GenerationConfig()  # see `generation_settings`
    whole: nn.Module = model.requires_grad_(False).eval()

    return whole


def generation_settings(config: ModelConfig) -> "GenerationConfig":
    """Return the settings that `generate` takes where a call leaves them open: those of
    transformers, with the end tokens of the base's folder.

    Other settings of a folder would sample, forbid or force tokens.
    """
    from transformers import GenerationConfig

    path = weights_folder(config) / "generation_config.json"
    ends = (read_object(path) or {}).get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    ids = [token for token in listed if isinstance(token, int) and token >= 0]
    return GenerationConfig(eos_token_id=ids or None)


def weights_folder(config: ModelConfig) -> Path:
    """Return the folder with the base's safetensors; a hub id is downloaded or read from the
    cache."""
    folder = local_folder(config)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    return Path(from_hub(snapshot_download, config, allow_patterns=["*.json", "*.safetensors"]))


def fill(model: nn.Module, weight: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Give a `skeleton` its parameters, cast to their types and shared where they are tied.

    `weight` returns the value for a name; one that has the parameter's type already is not copied.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made = {}

    for name, parameter in model.named_parameters():
        value = weight(name, parameter).to(parameter.dtype)
        made[name] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )

    for module in model.modules():
        for leaf, empty in module._parameters.items():
            if empty is not None:
                module._parameters[leaf] = made[names[id(empty)]]


def absent(parameter: nn.Parameter, device: torch.device) -> Tensor:
    """Return what stands for a weight that is held elsewhere: NaN, one value of memory."""
    nan = torch.full((1,), torch.nan, dtype=parameter.dtype, device=device)
    return nan.expand(parameter.shape)
