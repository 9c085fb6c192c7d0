"""The implementation of attention, by transformers' names, and the reasons to refuse it."""

from collections.abc import Iterator
from importlib.util import find_spec

import torch

from fluvial.errors import ConfigError
from fluvial.models.building import building
from fluvial.models.hf import PretrainedConfig
from fluvial.models.pretrained import ModelConfig, dtype_of, from_settings, read_config

PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
"""Module of each kind of flash attention. Without it, transformers would download a compiled
kernel, which is code of others."""


def attending(config: ModelConfig, device: torch.device) -> PretrainedConfig:
    """Return the base's own configuration, with the attention of `config`, for models on `device`.

    Raises `ConfigError` where this machine or the architecture has no such attention.
    """
    base_config = read_config(config)
    if config.attn_implementation is not None:
        check_attention(config, device)
        base_config._attn_implementation = config.attn_implementation
    return base_config


def check_attention(config: ModelConfig, device: torch.device) -> None:
    """Raise `ConfigError` unless the base can have the attention of `config` on `device`."""
    from transformers import AutoModelForCausalLM

    wanted = config.attn_implementation
    if wanted is None:
        return

    where = f"model.attn_implementation={wanted!r}"
    for problem in _missing(wanted, config, device):
        raise ConfigError(f"{where}: {problem}; or set 'sdpa' or 'eager'")

    with building(), torch.device("meta"):
        from_settings(AutoModelForCausalLM.from_config, config)
        base_config = read_config(config)
        base_config._attn_implementation = wanted
        try:
            AutoModelForCausalLM.from_config(base_config, dtype=dtype_of(config))
        except Exception as error:
            raise ConfigError(
                f"{where}: transformers does not have it for {base_config.model_type!r}; set "
                "another, or remove it"
            ) from error


def _missing(wanted: str, config: ModelConfig, device: torch.device) -> Iterator[str]:
    """Yield what this machine lacks for an attention."""
    if wanted in ("eager", "sdpa"):
        return
    if device.type != "cuda":
        yield f"it trains on a GPU only, and the device is {device.type!r}; set another device"
    if wanted not in PACKAGES:
        return

    if find_spec(PACKAGES[wanted].partition(".")[0]) is None:
        yield f"the package {PACKAGES[wanted]!r} is not installed; install it"
    if dtype_of(config) == torch.float32:
        yield "it computes in half precision; set model.dtype to 'bfloat16' or 'float16'"
