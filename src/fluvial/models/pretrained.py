"""A base model's configuration and float type, and the reasons to refuse it.

transformers is imported where something is loaded, so that other commands answer at once.
"""

import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from fluvial import caller
from fluvial.errors import ConfigError
from fluvial.models.architectures import refuse_architecture
from fluvial.models.config_values import check_generation, check_numbers
from fluvial.models.hf import PretrainedConfig, PreTrainedModel
from fluvial.models.network import reachable_hub
from fluvial.models.quantisation import Format, LayerFormat, Quantisation
from fluvial.models.stored import FLOATS, first_line, stored_tensors
from fluvial.models.untied import stores_another_head
from fluvial.settings import Settings
from fluvial.storage.files import exists, expanded, read_object

EMBEDDED = "embedded"
Attention = Literal[
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""Form of the id of a model on the hub."""


class ModelConfig(Settings):
    """The base model, its float type and its device."""

    name_or_path: str = EMBEDDED
    """A hub id, a local folder, or "embedded": the small Llama that comes with the package."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. Pin it, so that all sites hold the same base. Refused for
    "embedded" and for a local folder, which have none."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base's weights, and of a model that is written; "auto" is the type of the folder.
    Adapters are always fp32."""
    device: str = "auto"
    """Device of the models: "auto" (cuda if there is one, else cpu), "cpu", "cuda" or "cuda:N"."""
    attn_implementation: Attention | None = None
    """Implementation of attention, as transformers names it; unset, transformers' choice: "sdpa"
    where the architecture has it, else "eager". Flash attention needs its package, a GPU, and a
    `dtype` of half precision."""
    quantization: Format | None = None
    """Format of the frozen linear weights of the decoder layers under a LoRA adapter: "nf4" (4.5
    bits for each value), "nf4-double" (4.13) or "int8" (8); unset, they have `dtype`, which
    embeddings, norms and head always have. Needs `pip install 'fluvial[quantization]'`."""
    layer_quantization: dict[LayerFormat, tuple[int, ...]] = Field(default_factory=dict)
    """Decoder layers, counted from 0, that have another format than `quantization`, by format:
    `{int8 = [0, 1], none = [21]}`; "none" is `dtype`."""
    quantization_correction: int = Field(0, ge=0, le=4096)
    """Rank of a frozen correction of each quantised weight, the best approximation of what its
    quantisation lost (LoftQ, Li et al., ICLR 2024, in one step). It stays at the site, and what is
    federated is trained beside it; 0 for none."""

    def __hash__(self) -> int:
        """Return the hash of all settings; formats by layer are a dictionary, which has none."""
        return hash(json.dumps(self.model_dump(mode="json"), sort_keys=True))

    @property
    def quantisation(self) -> Quantisation:
        """The format of every decoder layer."""
        return Quantisation.of(self.quantization, self.layer_quantization)

    @property
    def quantisation_settings(self) -> dict[str, Any]:
        """The settings about a quantised base that are set, by name."""
        settings = {
            "quantization": self.quantization,
            "layer_quantization": self.layer_quantization,
            "quantization_correction": self.quantization_correction,
        }
        return {name: value for name, value in settings.items() if value}

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        yield from self._quantisation_conflicts()
        if self.name_or_path == EMBEDDED and self.revision is not None:
            yield "revision: without effect, because the embedded model has none; remove it"

    def _quantisation_conflicts(self) -> Iterator[str]:
        usual = self.quantization or "none"
        layers = [layer for numbers in self.layer_quantization.values() for layer in numbers]

        if usual in self.layer_quantization:
            yield (
                f"layer_quantization.{usual}: without effect, because it is the format of all "
                "other layers; remove it"
            )

        if not all(self.layer_quantization.values()) or min(layers, default=0) < 0:
            yield "layer_quantization: lists layers by format, counted from 0"

        if len(set(layers)) < len(layers):
            twice = next(layer for layer in layers if layers.count(layer) > 1)
            yield f"layer_quantization: layer {twice} is listed twice; remove one"

        if self.quantization_correction and not self.quantisation:
            yield (
                "quantization_correction: without effect, because nothing is quantised; remove it, "
                "or set quantization"
            )


def source_of(config: ModelConfig) -> str:
    """Return what transformers loads from: a folder, or a hub id."""
    if config.name_or_path == EMBEDDED:
        return str(resources.files("fluvial") / "assets" / "tiny")
    source = config.name_or_path
    return str(expanded(source)) if "~" in source else source


def local_folder(config: ModelConfig) -> Path | None:
    """Return the folder that `model.name_or_path` names, None for a hub id."""
    folder = Path(source_of(config))
    return folder if exists(folder) and folder.is_dir() else None


def from_hub(load: Any, wanted: ModelConfig, /, **options: Any) -> Any:
    """Call `load`, a `from_pretrained`, without remote code.

    Raises `ConfigError` that names the setting, whatever a library raises: a folder made by others
    can fail in any of its checks.
    """
    source = source_of(wanted)
    if source.startswith((".", "/", "~")) and local_folder(wanted) is None:
        raise ConfigError(
            f"model.name_or_path: there is no folder {source!r}; {caller.another_base()}"
        )
    if local_folder(wanted) is None:
        return _from_network(load, wanted, **options)

    try:
        return load(source, revision=wanted.revision, **options)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model.name_or_path={wanted.name_or_path!r} cannot be loaded: {first_line(error)}; "
            "copy its files again"
        ) from error


def _from_network(load: Any, wanted: ModelConfig, /, **options: Any) -> Any:
    """Call `load` for a hub id.

    A hub that does not answer is noticed in one attempt, and its cache is read instead.
    """
    with reachable_hub() as reached:
        try:
            return load(source_of(wanted), revision=wanted.revision, **options)
        except Exception as error:
            why = f"cannot be loaded from the Hugging Face hub: {first_line(error)}"
            if not reached:
                why = (
                    "is no folder here and not in this machine's cache, and the Hugging Face hub "
                    "cannot be reached; name a local folder, or load the model once with a network"
                )

            raise ConfigError(f"model.name_or_path={wanted.name_or_path!r} {why}") from error


def from_settings(make: Any, config: ModelConfig, settings: PretrainedConfig | None = None) -> Any:
    """Call `make`, a `from_config`, with `settings`, by default the base's own, and its float type.

    Raises `ConfigError` where transformers cannot make the model.
    """
    settings = settings or read_config(config)
    dtype = dtype_of(config)

    try:
        return make(settings, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        key = _key_of(error.args[0], settings.to_dict()) if isinstance(error, KeyError) else None
        why = (
            f"{key} = {error.args[0]!r} is unknown; correct it there" if key else first_line(error)
        )
        raise ConfigError(
            f"model.name_or_path={config.name_or_path!r}: transformers cannot make a model of its "
            f"config.json: {why}"
        ) from error


def _key_of(value: object, settings: Mapping[str, Any]) -> str | None:
    """Return the key of a value in a configuration, also in its tables; None where it is in none
    of them."""
    for key, own in settings.items():
        if own == value:
            return key
        if isinstance(own, Mapping) and (inner := _key_of(value, own)) is not None:
            return f"{key}.{inner}"
    return None


def read_config(config: ModelConfig) -> PretrainedConfig:
    """Return the base's own configuration, from its folder.

    Raises `ConfigError` unless it is a causal language model with float weights that transformers
    has: for an adapter, remote code, an encoder, a quantised model, or numbers that no model has. A
    folder that stores a head of its own has an untied one, whatever config.json says, as in
    transformers.
    """
    from transformers import AutoConfig

    _refuse_folder(config)
    base_config = from_hub(AutoConfig.from_pretrained, config, trust_remote_code=False)
    refuse_architecture(base_config, f"model.name_or_path={config.name_or_path!r}")
    folder = local_folder(config)
    untied = folder is not None and stores_another_head(folder, base_config)

    for settings in (base_config, base_config.get_text_config()):
        # What a forward pass returns beside logits is no part of a model.
        settings.return_dict = True
        settings.output_attentions = False
        settings.output_hidden_states = False
        if untied:
            settings.tie_word_embeddings = False

    return base_config


def _refuse_folder(config: ModelConfig) -> None:
    """Refuse a local folder whose files say that transformers would load something else."""
    from transformers import CONFIG_MAPPING

    folder = local_folder(config)

    if folder is None:
        return

    if config.revision is not None:
        raise ConfigError(
            f"model.revision: without effect, because {config.name_or_path!r} is a local folder; "
            "remove it, or name a hub id"
        )

    where = f"model.name_or_path={config.name_or_path!r}"
    adapter = read_object(folder / "adapter_config.json")
    if adapter is not None:
        base = adapter.get("base_model_name_or_path")
        raise ConfigError(
            f"{where} is a PEFT adapter of {base!r}; name that base instead, or merge the adapter "
            "into it with PEFT (merge_and_unload) and save the result"
        )

    if not (folder / "config.json").is_file():
        other = [
            path.name
            for path in sorted(folder.iterdir())
            if path.suffix in (".gguf", ".pth", ".pt", ".ckpt")
        ]
        held = f", only {other[0]!r}; convert it to transformers' form" if other else ""
        raise ConfigError(f"{where}: the folder has no config.json{held}")

    stored = read_object(folder / "config.json") or {}
    if "auto_map" in stored and stored.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(
            f"{where}: its model is Python code in the folder (auto_map in config.json), which is "
            "never run; only architectures of transformers itself are tuned"
        )

    if "model_type" not in stored and "auto_map" not in stored:
        raise ConfigError(
            f"{where}: config.json names no 'model_type', so it is not of transformers' form"
        )

    check_numbers(stored, folder / "config.json")
    check_generation(folder)


_PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_of(config: ModelConfig) -> torch.dtype:
    """Return the float type of the base: the one that is set, else the folder's own.

    A folder that names none has the type of its first stored weight, as in transformers; a hub id
    that names none has float32.
    """
    if config.dtype != "auto":
        return _PRECISIONS[config.dtype]

    base_config = read_config(config)
    named = getattr(base_config, "dtype", None) or getattr(
        base_config.get_text_config(), "dtype", None
    )
    if named is None:
        folder = local_folder(config)
        stored = stored_tensors(folder) if folder is not None else {}
        named = next(
            (tensor.dtype for tensor in stored.values() if tensor.dtype in FLOATS), torch.float32
        )

    kind = getattr(torch, named) if isinstance(named, str) else named
    if kind not in _PRECISIONS.values():
        raise ConfigError(
            f"model.dtype: the folder's own type is {kind}; set 'float32', 'bfloat16' or 'float16'"
        )

    return kind


def num_embeddings(model: PreTrainedModel) -> int:
    """Return the rows of the input embedding of `model`, which may be without weights."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows


def hidden_width(model: PreTrainedModel) -> int:
    """Return the width of the hidden states of `model`, which may be without weights."""
    width: int = model.config.get_text_config().hidden_size
    return width


_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
_ORIGINAL = "original_max_position_embeddings"


def context_length(model: PreTrainedModel) -> int | None:
    """Return the tokens that `model` reads at most, None without a limit; it may be without
    weights.

    With longrope, it is `original_max_position_embeddings`: above it, a long text changes the
    rotary frequencies, and so the values, of all texts of its batch.
    """
    config = model.config.get_text_config()
    ropes = _rope_tables(getattr(config, "rope_parameters", None))
    lengths = [getattr(config, name, None) for name in _LENGTHS]
    lengths += [rope.get(_ORIGINAL) for rope in ropes if rope.get("rope_type") == "longrope"]
    limits = [length for length in lengths if isinstance(length, int) and length > 0]

    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the row after the padding's.
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            limits.append(module.num_embeddings - module.padding_idx - 1)

    return min(limits, default=None)


def _rope_tables(parameters: Any) -> list[Mapping[str, Any]]:
    """Return the tables of rotary embeddings in a configuration, with those of layer types."""
    if not isinstance(parameters, Mapping):
        return []
    return [parameters, *(each for each in parameters.values() if isinstance(each, Mapping))]


def check_length(longest: int | None, max_length: int) -> None:
    """Raise `ConfigError` if sequences of `max_length` tokens are longer than the `longest` that a
    model reads."""
    if longest is not None and max_length > longest:
        raise ConfigError(
            f"data.max_length={max_length}: the model reads at most {longest} tokens, by its "
            f"config.json (max_position_embeddings, or {_ORIGINAL} of a longrope, above which a "
            "long text changes the values of those beside it in a batch); set data.max_length to "
            f"{longest} or less"
        )
