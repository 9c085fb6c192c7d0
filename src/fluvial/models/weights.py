"""Checks that the weights of a base model are there, whole, and fit its architecture.

Headers tell names, shapes and lengths of files. transformers itself says which stored tensor
becomes which parameter, by loading tensors that have a shape and no values. Values are read where
they are asked for, once and a piece at a time.
"""

import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fluvial.errors import ConfigError, MissingWeightsError
from fluvial.models.building import building
from fluvial.models.pretrained import ModelConfig, dtype_of, local_folder, source_of
from fluvial.models.stored import FLOATS, all_finite, first_line, not_finite, some, stored_tensors
from fluvial.wire.tensors import Named

logger = logging.getLogger(__name__)


def check_weights(config: ModelConfig, base: nn.Module, *, values: bool = False) -> list[str]:
    """Return notes on the weights of `base`, which is without weights; nothing is downloaded.

    Raises `ConfigError` where a file is missing or damaged, where a tensor is missing, has another
    shape or is no float, where the folder has layers that its configuration does not count, and,
    with `values`, where a stored value is not finite.
    """
    folder = local_folder(config) or _cached(config)
    if folder is None:
        return [
            "model: the weights are not on this machine; a run downloads them first, and then "
            "looks at them"
        ]

    stored = stored_tensors(folder)
    if not stored and local_folder(config) is not None:
        raise MissingWeightsError(
            f"model.name_or_path={config.name_or_path!r}: the folder holds no weights; `fluvial "
            "check` tells sizes without them, a run needs them: copy them (model.safetensors, or "
            "its shards and their index)"
        )

    if not stored:
        return [
            "model: of the hub id only the configuration is on this machine; a run downloads the "
            "weights first"
        ]

    kinds = [
        name
        for name, tensor in stored.items()
        if name.endswith("weight") and tensor.dtype not in FLOATS
    ]
    if kinds:
        raise ConfigError(
            f"model.name_or_path={config.name_or_path!r}: {some(kinds)} is stored as "
            f"{stored[kinds[0]].dtype}; only float weights (float32, bfloat16, float16) are tuned "
            "and measured: name the model it was made from"
        )

    info = _compare(base, config, stored)
    check_info(info, base, config.name_or_path)
    unused = sorted(info["unexpected_keys"])
    if values:
        _check_values(config, folder, unused)

    return [f"model: {len(unused)} stored tensors are not used: {some(unused)}"] if unused else []


def check_info(info: dict[str, Any], model: nn.Module, name: str) -> None:
    """Raise `ConfigError` unless transformers filled `model` with stored weights alone.

    It makes up tensors that are missing or have another shape, and ignores layers beyond those that
    config.json counts.
    """
    where = f"model.name_or_path={name!r}"
    kind = type(model).__name__
    missing = sorted(info["missing_keys"])

    if missing:
        raise ConfigError(
            f"{where}: the stored weights lack {some(missing)}, which {kind} needs; they are not "
            "complete, or of another kind of model (a classifier or a headless one has no "
            "language-model head)"
        )

    shapes = sorted(str(key) for key, *_ in info["mismatched_keys"])
    if shapes:
        raise ConfigError(
            f"{where}: stores {some(shapes)} in another shape than config.json says; the weights "
            "are of another model"
        )

    if info.get("error_msgs"):
        raise ConfigError(f"{where}: {info['error_msgs'][0]:.300}")

    own_names = {_numbered(key) for key in model.state_dict()}
    beyond = sorted(
        key
        for key in info["unexpected_keys"]
        if re.search(r"\d", key) and _numbered(key) in own_names
    )
    if beyond:
        raise ConfigError(
            f"{where}: stores {some(beyond)}, more layers than config.json counts; copy both again"
        )


def _numbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def check_finite(weights: Named, name: str) -> None:
    """Raise `ConfigError` if a weight of the model `name` is not a finite number."""
    for weight_name, weight in weights.items():
        if not all_finite(weight):
            raise ConfigError(
                f"model.name_or_path={name!r}: {weight_name} holds values that are not finite "
                f"in {weight.dtype}; if the folder has another type, set model.dtype to it, "
                "else copy the folder again"
            )


def _check_values(config: ModelConfig, folder: Path, unused: list[str]) -> None:
    """Raise `ConfigError` for a stored value that is not finite in the type of the model, of a
    tensor that is used."""
    logger.info("reading the weights once")
    dtype = dtype_of(config)
    found = not_finite(folder, dtype)
    wrong = {name: file for name, file in found.items() if name not in unused}
    if wrong:
        raise ConfigError(
            f"model.name_or_path={config.name_or_path!r}: {some(sorted(wrong))} (in "
            f"{min(wrong.values())}) holds values that are not finite in {dtype}; set model.dtype "
            "to a wider type if it is set, copy the folder again, or name another model"
        )


def _compare(base: nn.Module, config: ModelConfig, stored: dict[str, Tensor]) -> dict[str, Any]:
    """Return transformers' report on loading: names that are missing, misshapen or unused."""
    from transformers.modeling_utils import PreTrainedModel

    assert isinstance(base, PreTrainedModel)

    with building():
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
                f"model.name_or_path={config.name_or_path!r}: the stored weights do not fit "
                f"{type(base).__name__}: {first_line(error)}"
            ) from error

    return dict(info)


def _cached(config: ModelConfig) -> Path | None:
    """Return the model's folder in the hub's cache, without a request to the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(source_of(config), revision=config.revision, local_files_only=True)
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
