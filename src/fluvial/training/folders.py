"""The folders that `fluvial evaluate` reads: a PEFT adapter, or a model with tuned weights."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fluvial import caller
from fluvial.errors import ConfigError
from fluvial.models.adapters import PREFIX, SavedLora
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import EMBEDDED, HUB_ID, ModelConfig
from fluvial.storage import exported
from fluvial.storage.files import exists, expanded, read_object, refuse_endless
from fluvial.storage.run_files import (
    CONFIG,
    EXPORTS,
    RESULT,
    check_run_written,
    check_weights_written,
)
from fluvial.wire.tensors import Named, is_finite

_READ = {
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
    ),
    *(
        "peft_version",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    ),
    *(
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
    ),
    *(
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "layers_to_transform",
        "layers_pattern",
    ),
}
"""Settings of PEFT that describe two factors and their scale, or nothing about them. Any other
setting must have PEFT's default, because it may change the meaning of the factors."""
_INITS = (True, False, "gaussian")
"""Values of `init_lora_weights` that do not change the base."""

_LARGEST = 1e30
NEW_TOKENS = 64


@dataclass(frozen=True)
class AdapterFolder:
    """A LoRA adapter or a tuned model on disk, with its folder's notes on the base and the run."""

    path: Path
    base: str
    """The base model: hub id, folder, or "embedded"."""
    lora: SavedLora | None
    """The adapter's configuration; None for a model of which all weights were tuned."""
    tensors: Named
    """The factors, or all weights, fp32, by our names."""
    run: dict[str, Any] = field(default_factory=dict)
    """Settings of the run that wrote it (see `exported.read`); empty without a run."""

    def settings(self) -> dict[str, Any]:
        """Return what a configuration needs, as tables: the base, and how the run measured."""
        return measured_as(self.run, self.base, None)


def measured_as(run: dict[str, Any], name: str, records: Path | None) -> dict[str, Any]:
    """Return the tables of a configuration that measures the model `name` as its `run` did, which
    may be empty."""
    # The revision is the base's, and a model whose weights were tuned lies in a folder of its own.
    local = expanded(name).is_dir()
    keys = ("dtype", *exported.QUANTISATION, *([] if local else ["revision"]))
    kept = {key: value for key, value in run.get("model", {}).items() if key in keys}
    return {
        "model": {**kept, "name_or_path": name},
        "data": exported.for_file(run, records),
        "evaluate": {"max_new_tokens": run.get("evaluate", {}).get("max_new_tokens") or NEW_TOKENS},
    }


Kind = Literal["adapter", "tuned", "model"]


def kind_of(name: str) -> Kind:
    """Return the kind of `name`: a PEFT adapter, a tuned model beside its run, or another model.

    The last is "embedded", a folder of a causal language model, or the hub id of one. Raises
    `ConfigError` where it is none of them.
    """
    folder = expanded(name)
    if not exists(folder):
        if name == EMBEDDED or (HUB_ID.fullmatch(name) and folder.suffix != ".safetensors"):
            return "model"
        raise ConfigError(
            f"there is no folder {name!r}, and it is no hub id; give RUN/adapter or a model's "
            "folder"
        )

    if read_object(folder / "adapter_config.json") is not None:
        return "adapter"

    config = read_object(folder / "config.json") or {}
    if "model_type" in config or "architectures" in config:
        return "tuned" if exported.read(folder).get("model", {}).get("name_or_path") else "model"

    raise ConfigError(
        f"{folder} is neither a PEFT adapter (it has no adapter_config.json) nor a model of "
        f"transformers (it has no config.json that names a model_type); {_hint(folder)}"
    )


def weights_in(name: str) -> str:
    """Return RUN/adapter or RUN/model for the folder of a run, and any other `name` as it is."""
    folder = expanded(name)
    stored = read_object(folder / CONFIG)
    if stored is None or "fluvial" not in stored:
        return name

    inner = [folder / export for export in EXPORTS if (folder / export).is_dir()]
    return str(inner[0]) if inner else name


def _hint(folder: Path) -> str:
    """Return where the weights of a run's folder lie, or would lie."""
    made = [inner for inner in EXPORTS if (folder / inner).is_dir()]
    if made:
        return f"did you mean {folder / made[0]}?"
    if "fluvial" not in (read_object(folder / CONFIG) or {}):
        return "a run writes RUN/adapter or RUN/model"
    if not (folder / RESULT).exists():
        return f"the run in it has not finished; continue it with {caller.resume()}"
    return (
        "the method of the run in it leaves each site its own weights, and none for all; write "
        f"those of one with `fluvial export {folder} --site NAME`, and name the folder it makes"
    )


def read_adapter_folder(folder: Path) -> AdapterFolder:
    """Read the adapter in a PEFT folder, or the model that a run with tune = "full" wrote.

    Raises `ConfigError` where it is neither, or where `ModelPool` cannot hold it, and
    `CheckpointError` where its weights, or the files of a finished run around it, are not those
    that the run wrote.
    """
    check_weights_written(folder)
    check_run_written(folder.parent)
    config = read_object(folder / "adapter_config.json")
    if config is None and "architectures" in (read_object(folder / "config.json") or {}):
        return _model_folder(folder)
    if config is None:
        raise ConfigError(
            f"{folder} is no PEFT adapter: it has no adapter_config.json; {_hint(folder)}"
        )

    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA can be evaluated"
        )

    run = exported.read(folder)
    lora = _lora(folder / "adapter_config.json", config)
    return AdapterFolder(folder, _base_of(folder, config, run), lora, _factors(folder), run)


def _lora(path: Path, config: dict[str, Any]) -> SavedLora:
    """Return the settings for PEFT; raises `ConfigError` for more than two factors and a scale."""
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    unknown = [key for key in config if key not in usual and config[key]]

    for key in [*unknown, *(usual.keys() - _READ)]:
        value = config.get(key, usual.get(key))
        neutral = _INITS if key == "init_lora_weights" else (usual.get(key), None)
        if not (value in neutral or not value):
            raise ConfigError(
                f"{path}: {key} = {value!r:.80} is not supported here; merge the adapter into its "
                "base with PEFT, or evaluate it with another tool"
            )

    _check_numbers(path, config)
    _check_expressions(path, config)
    if not config.get("target_modules") and not config.get("target_parameters"):
        raise ConfigError(f"{path}: target_modules names no module; copy the file again")

    kept = {
        key: config[key]
        for key in _READ & config.keys() & usual.keys() - {"auto_mapping", "peft_type"}
    }
    return SavedLora(
        {**kept, "lora_dropout": 0.0, "inference_mode": False, "task_type": "CAUSAL_LM"}
    )


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    """Raise `ConfigError` unless ranks are whole numbers above 0 and alphas are finite."""
    for key, pattern, whole in (
        ("r", "rank_pattern", True),
        ("lora_alpha", "alpha_pattern", False),
    ):
        others = config.get(pattern) or {}
        if not isinstance(others, dict):
            raise ConfigError(f"{path}: {pattern} must be an object, found {others!r:.80}")

        expected = "a whole number above 0" if whole else "a finite number"
        for name, value in ((key, config.get(key)), *others.items()):
            place = key if name == key else f"{pattern}.{name}"
            number = isinstance(value, int if whole else int | float) and type(value) is not bool
            if not number or not -_LARGEST < value < _LARGEST or (whole and value < 1):
                raise ConfigError(
                    f"{path}: {place} is {value!r:.80}, expected {expected}; copy the file again"
                )


def _check_expressions(path: Path, config: dict[str, Any]) -> None:
    """Raise `ConfigError` for a text that PEFT reads as a regular expression and that is none."""
    texts = {key: config.get(key) for key in ("target_modules", "exclude_modules")}
    texts |= {
        f"{pattern}.{name}": name
        for pattern in ("rank_pattern", "alpha_pattern")
        for name in config.get(pattern) or {}
    }
    for place, text in texts.items():
        try:
            re.compile(text if isinstance(text, str) else "")
        except re.error as error:
            raise ConfigError(
                f"{path}: {place} is no regular expression: {text!r:.80}: {error}; copy the file "
                "again, or correct it"
            ) from error


def _model_folder(folder: Path) -> AdapterFolder:
    """Read a model whose base its run names."""
    run = exported.read(folder)
    base = run.get("model", {}).get("name_or_path")

    if not isinstance(base, str):
        raise ConfigError(
            f"{folder} is a whole model, and no run lies around it that names its base; compare it "
            "with another tool, or give RUN/model of a run"
        )

    tuned = ModelPool(
        ModelConfig(name_or_path=str(folder.resolve()), dtype="float32", device="cpu"), None
    )
    weights = {name: tuned.base.get(name) for name in tuned.layout.names}
    return AdapterFolder(folder, base, None, _finite(weights, folder), run)


def _factors(folder: Path) -> Named:
    """Return the tensors by our names, fp32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"

    if not path.exists():
        raise ConfigError(
            f"{folder} has no adapter_model.safetensors; save the adapter with "
            "safe_serialization=True"
        )

    refuse_endless(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: is damaged: {error}; copy it again") from error

    embeddings = sorted(name for name in tensors if ".lora_embedding_" in name)
    if embeddings:
        module = embeddings[0].removeprefix(PREFIX).partition(".lora_embedding_")[0]
        raise ConfigError(
            f"{folder / 'adapter_config.json'}: target_modules adapts the embedding {module!r}, "
            "which is not supported here; merge the adapter into its base with PEFT "
            "(merge_and_unload), or evaluate it with another tool"
        )

    # Some tools write the name that PEFT gives an adapter in memory, and PEFT reads both.
    named = {
        name.removeprefix(PREFIX).replace(".default.weight", ".weight"): tensor.float()
        for name, tensor in tensors.items()
    }
    if len(named) < len(tensors):
        raise ConfigError(f"{path}: holds factors of a module twice; save the adapter anew")
    return _finite(named, path)


def _finite(tensors: Named, path: Path) -> Named:
    if not is_finite(tensors):
        raise ConfigError(
            f"{path}: holds values that are not finite: its training diverged; train it again"
        )

    return tensors


def _base_of(folder: Path, config: dict[str, Any], run: dict[str, Any]) -> str:
    """Return the base that `adapter_config.json` names, or the one that the run names.

    The run's name counts where the other folder is gone, and where it is the package's own, whose
    path differs between machines.
    """
    base = config.get("base_model_name_or_path")
    ours = run.get("model", {}).get("name_or_path")
    local = isinstance(base, str) and base.startswith((".", "/", "~"))
    gone = local and not expanded(str(base)).is_dir()

    if ours == EMBEDDED or (isinstance(ours, str) and (not base or gone)):
        return str(ours)
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{folder / 'adapter_config.json'}: base_model_name_or_path is {base!r}; write the hub "
            "id or folder of the base model there ('embedded' for the one that comes with the "
            "package)"
        )

    return base
