"""The tensors that a folder of Hugging Face's form stores, by name, shape and type; only headers are read."""

import json
from pathlib import Path

import torch
from torch import Tensor

from fluvial.errors import ConfigError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return what a folder stores by name, as tensors without values; empty where it has no weights.

    Raises `ConfigError` for a missing shard, a damaged file, an index that does not fit its files, or a pickle that
    holds more than tensors.
    """
    for single in _SINGLE:
        if (folder / single).is_file():
            return _header(folder / single)
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _sharded(folder, index)
    if local := sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != "config.json"):
        others = [name for name in local if name.endswith((".safetensors", ".bin", ".h5", ".msgpack", ".gguf", ".pth"))]
        if others:
            raise ConfigError(
                f"{folder}: has neither {_SINGLE[0]} nor an index of its shards, only {some(others)}; save the model "
                "with save_pretrained of transformers"
            )
    return {}


def _sharded(folder: Path, index: Path) -> dict[str, Tensor]:
    try:
        places = {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{index}: has no 'weight_map' of tensors and files: {error!r:.200}; copy it again"
        ) from error
    found: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise ConfigError(f"{folder}: the shard {file!r} that {index.name} names is missing; copy it again")
        tensors = _header(folder / file)
        absent = sorted(name for name, place in places.items() if place == file and name not in tensors)
        if absent:
            raise ConfigError(
                f"{folder / file}: lacks {some(absent)}, which {index.name} places there; copy both again"
            )
        found |= tensors
    return found


def _header(file: Path) -> dict[str, Tensor]:
    from transformers.modeling_utils import load_state_dict

    try:
        return dict(load_state_dict(file, map_location="meta", weights_only=True))
    except Exception as error:
        why = first_line(error)
        if file.suffix == ".bin" and file.stat().st_size:
            raise ConfigError(
                f"{file}: is no plain file of tensors, and loading it could run foreign code; save the model as "
                f"safetensors ({why:.120})"
            ) from error
        raise ConfigError(f"{file}: is damaged or cut short; copy it again ({why:.120})") from error


def first_line(error: Exception) -> str:
    """Return an error's text in one line of at most 300 characters, with its kind where that says more."""
    text = " ".join(str(error).split())
    known = isinstance(error, OSError | ValueError | ImportError)
    return (text if text and known else f"{type(error).__name__}: {text}".rstrip(": "))[:300]


def some(names: list[str]) -> str:
    """Return the first three of `names`, quoted, and how many more there are."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
