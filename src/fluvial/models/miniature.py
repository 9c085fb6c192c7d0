"""A small random model of a base's architecture, by which its behaviour is checked without weights.

It has the base's own settings but for its numbers of layers, heads, experts and tokens, and its
widths. The size of a head is kept, since settings of rotary embeddings depend on it.
"""

from typing import Any

import torch

from fluvial.errors import ConfigError
from fluvial.models.attention import attending
from fluvial.models.behaviour import check_packing
from fluvial.models.building import building
from fluvial.models.hf import PretrainedConfig, PreTrainedModel
from fluvial.models.pretrained import ModelConfig

HEADS = 2
VALUES = 2 * 10**7
"""Parameters of a miniature at most; a base that stays larger has parts that are not known here."""
SPREAD = 0.1
"""Standard deviation of the weights, with which attention changes what is predicted."""
SMALL = {
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Largest values of a miniature's settings, where a configuration has them."""


def miniature(config: ModelConfig) -> PreTrainedModel | None:
    """Return a random model on the CPU in evaluation mode, None where none can be made.

    It is the same each time, and leaves the random numbers of the process as they are.
    """
    from transformers import AutoModelForCausalLM

    if config.attn_implementation not in (None, "eager", "sdpa"):
        return None
    try:
        settings = attending(config, torch.device("cpu"))
        _shrink(settings.get_text_config())
        with building(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
            if sum(parameter.numel() for parameter in empty.parameters()) > VALUES:
                return None
            model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
            _randomise(model)
    except Exception:  # an architecture whose sizes depend on each other in another way
        return None

    return model.requires_grad_(False).eval()


def check_packing_of_miniature(config: ModelConfig) -> bool:
    """Return whether a miniature could be checked; raises `ConfigError` where its packed records
    read each other."""
    model = miniature(config)
    if model is None:
        return False
    try:
        check_packing(model, config.name_or_path)
    except ConfigError:
        raise
    except Exception:  # one that cannot read a few tokens, as the base may
        return False

    return True


def _shrink(settings: PretrainedConfig) -> None:
    """Make a configuration that of a miniature, with a layer of each kind and two at least."""
    heads = settings.num_attention_heads
    head_width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    shared = getattr(settings, "num_key_value_heads", None) not in (None, heads)
    settings.hidden_size = HEADS * head_width
    settings.num_attention_heads = HEADS
    _set(settings, "num_key_value_heads", 1 if shared else HEADS)
    _set(settings, "word_embed_proj_dim", settings.hidden_size)

    kinds = getattr(settings, "layer_types", None)
    layers = list(dict.fromkeys(kinds or []))
    layers += layers[-1:] if len(layers) == 1 else []
    settings.num_hidden_layers = len(layers) or 2
    if kinds:
        settings.layer_types = layers
    for name, most in SMALL.items():
        value = getattr(settings, name, None)
        if isinstance(value, list) or (isinstance(value, int) and value > most):
            setattr(settings, name, most)


def _set(settings: Any, name: str, value: int) -> None:
    """Set a value that a configuration has."""
    if getattr(settings, name, None) is not None:
        setattr(settings, name, value)


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Add noise to all weights, so that what they do by default is no exception."""
    for parameter in model.parameters():
        parameter.add_(SPREAD * torch.randn_like(parameter))
