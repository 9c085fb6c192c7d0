"""Whether the weights of a base model are there, whole, and those that its architecture needs.

Only headers are read: names, shapes and lengths of files. transformers itself says which stored tensor becomes which
parameter, by loading tensors that have a shape and no values.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fluvial.errors import ConfigError
from fluvial.pretrained import ModelConfig, dtype_of, first_line, local_folder, source_of

_SINGLE = ("model.safetensors", "pytorch_model.bin")


def check_weights(config: ModelConfig, base: nn.Module) -> list[str]:
    """Return notes on the weights of `base`, which is without weights; nothing is downloaded.

    Raises `ConfigError` where a file is missing or damaged, or where a tensor is missing or has another
    shape: transformers would go on with random values in its place.
    """
    folder = local_folder(config) or _cached(config)
    if folder is None:
        return ["model: the weights are not on this machine; a run downloads them first and then looks at them"]
    stored = stored_tensors(folder)
    if not stored:
        return ["model: of the hub id only the configuration is on this machine; a run downloads the weights first"]
    missing, shapes, unused = _compare(base, config, stored)
    where = f"model.name_or_path={config.name_or_path!r}"
    if missing:
        raise ConfigError(
            f"{where}: the stored weights lack {_some(missing)}, which {type(base).__name__} needs; they are not "
            "complete, or of another kind of model (a classifier or a headless one has no language-model head)"
        )
    if shapes:
        raise ConfigError(
            f"{where}: {_some(shapes)} is stored in another shape than config.json says; the weights are of another "
            "model"
        )
    return [f"model: {len(unused)} stored tensors are not used: {_some(unused)}"] if unused else []


def check_loaded(info: dict[str, Any], model: nn.Module, name: str) -> None:
    """Raise `ConfigError` if transformers made up a weight while loading, or if one is not a finite number."""
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if missing:
        raise ConfigError(
            f"model.name_or_path={name!r}: the stored weights lack {_some(missing)}, which {type(model).__name__} needs"
        )
    for parameter_name, parameter in model.named_parameters():
        if parameter.numel() and not all(bool(extreme.isfinite()) for extreme in parameter.detach().aminmax()):
            raise ConfigError(
                f"model.name_or_path={name!r}: {parameter_name} holds values that are not finite in {parameter.dtype}; "
                "if the folder has another type, set model.dtype to it, else copy the folder again"
            )


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
                f"{folder}: has neither {_SINGLE[0]} nor an index of its shards, only {_some(others)}; save the model "
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
                f"{folder / file}: lacks {_some(absent)}, which {index.name} places there; copy both again"
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


def _compare(base: Any, config: ModelConfig, stored: dict[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Return the names that transformers would find missing, in another shape, or of no use."""
    from transformers.modeling_utils import PreTrainedModel

    assert isinstance(base, PreTrainedModel)
    with quiet():
        try:
            _, info = type(base).from_pretrained(
                None,
                config=base.config,
                state_dict=stored,
                device_map={"": "meta"},
                dtype=dtype_of(config),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise ConfigError(
                f"model.name_or_path={config.name_or_path!r}: the stored weights do not fit {type(base).__name__}: "
                f"{first_line(error)}"
            ) from error
    if info["error_msgs"]:
        raise ConfigError(f"model.name_or_path={config.name_or_path!r}: {info['error_msgs'][0]:.300}")
    return (
        sorted(info["missing_keys"]),
        sorted(str(key) for key, *_ in info["mismatched_keys"]),
        sorted(info["unexpected_keys"]),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and reports off the screen: ours are shown instead."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _cached(config: ModelConfig) -> Path | None:
    """Return where the hub's cache holds the model, without asking the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source_of(config), revision=config.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
