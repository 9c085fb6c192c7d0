"""Write a tuned model: an adapter as a folder of PEFT, all weights as a folder of transformers."""

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluvial.models.hf import PreTrainedModel
from fluvial.wire.tensors import Named, factor

_GENERATION = "generation_config.json"


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter of `model`: adapter_config.json and adapter_model.safetensors."""
    # PEFT would add the whole matrix of a head or embedding that is adapted.
    model.save_pretrained(str(folder), save_embedding_layers=False)


def save_whole(model: PreTrainedModel, folder: Path, base: Path) -> None:
    """Write all weights of `model`, with the generation settings of the `base` folder, if any."""
    model.save_pretrained(str(folder))
    (folder / _GENERATION).unlink(missing_ok=True)

    if (base / _GENERATION).is_file():
        shutil.copyfile(base / _GENERATION, folder / _GENERATION)


def with_equal_ranks(config: dict[str, Any], factors: Named) -> tuple[dict[str, Any], Named]:
    """Return an adapter of PEFT whose modules all have the largest rank, with the same product.

    Smaller factors get rows and columns of zeros. Servers such as vLLM and llama.cpp read one rank
    and one scale, so `rank_pattern` goes; an adapter whose modules have several scales stays as it
    is. `config` is the content of adapter_config.json, `factors` has PEFT's names.
    """
    ranks = config.get("rank_pattern") or {}
    alphas = config.get("alpha_pattern") or {}
    scale = partial(_scale, rooted=bool(config.get("use_rslora")))
    own = scale(config["lora_alpha"], config["r"])
    scales = [scale(alphas.get(name, config["lora_alpha"]), rank) for name, rank in ranks.items()]
    even = all(math.isclose(each, own) for each in scales) and alphas.keys() <= ranks.keys()
    if not ranks or not even:
        return config, factors

    rank = max([config["r"], *ranks.values()])
    ratio = rank / config["r"]
    alpha = config["lora_alpha"] * (math.sqrt(ratio) if config.get("use_rslora") else ratio)
    padded = {name: _padded(name, tensor, rank) for name, tensor in factors.items()}
    return config | {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
    }, padded


def _scale(alpha: float, rank: int, rooted: bool) -> float:
    return alpha / (math.sqrt(rank) if rooted else rank)


def _padded(name: str, tensor: Tensor, rank: int) -> Tensor:
    """Return A (r, in) as (rank, in), or B (out, r) as (out, rank), with zeros."""
    if factor(name) == "A":
        return torch.cat([tensor, tensor.new_zeros(rank - tensor.shape[0], tensor.shape[1])])
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], rank - tensor.shape[1])], dim=1)
