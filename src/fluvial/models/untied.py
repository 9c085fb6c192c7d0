"""A head that a folder stores beside the embedding, although its config.json ties the two.

transformers (from version 5 on) ties them only where the stored values are equal. So the values
decide here too.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fluvial.errors import ConfigError
from fluvial.models.hf import PretrainedConfig
from fluvial.models.stored import stored_files
from fluvial.models.weight_sources import FolderSource


def stores_another_head(folder: Path, base_config: PretrainedConfig) -> bool:
    """Return whether `folder` stores a head with other values than the embedding that
    `base_config` ties it to."""
    from transformers import AutoModelForCausalLM

    text = base_config.get_text_config()
    if not (getattr(base_config, "tie_word_embeddings", False) or text.tie_word_embeddings):
        return False

    kind = AutoModelForCausalLM._model_mapping[type(base_config)]
    tied = getattr(kind, "_tied_weights_keys", None)
    if not isinstance(tied, dict):  # transformers 4 names no pairs, and ties whatever is stored
        return False

    files = _files(folder)
    prefix = f"{kind.base_model_prefix}."
    for pair in tied.items():
        stored = [
            (files[key], key, files[key].stat().st_mtime_ns)
            for name in pair
            for key in dict.fromkeys((name, name.removeprefix(prefix)))
            if key in files
        ]
        if len(stored) == len(pair) and _differ(*stored):
            return True

    return False


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each stored tensor; none where `check_weights` will refuse the files."""
    try:
        return stored_files(folder)
    except (ConfigError, OSError):
        return {}


@lru_cache(maxsize=64)
def _differ(left: tuple[Path, str, int], right: tuple[Path, str, int]) -> bool:
    """Return whether two stored tensors, each by its file, its name and the file's time, have other
    values; false where `check_weights` will refuse the files."""
    try:
        first, second = (_value(path, name) for path, name, _ in (left, right))
    except Exception:  # a damaged file can fail in any way
        return False
    kind = torch.promote_types(first.dtype, second.dtype)
    return not torch.equal(first.to(kind), second.to(kind))


def _value(path: Path, name: str) -> Tensor:
    """Return one stored tensor, mapped from its file where that can be."""
    from transformers.modeling_utils import load_state_dict

    if path.suffix == ".safetensors":
        return FolderSource(path.parent, {name: name}).get(name)
    tensor: Tensor = load_state_dict(str(path), map_location="cpu", weights_only=True)[name]
    return tensor
