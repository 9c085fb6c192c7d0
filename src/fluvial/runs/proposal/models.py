"""Facts about a base model, from its folder or hub id, without its weights."""

import os
from dataclasses import dataclass
from importlib.util import find_spec

from fluvial.models.cpu_types import is_slow
from fluvial.models.hf import PreTrainedModel, PreTrainedTokenizerBase
from fluvial.models.loading import meta_base
from fluvial.models.pretrained import EMBEDDED, ModelConfig, context_length, dtype_of, local_folder
from fluvial.models.targets import LoraSettings, adaptable_modules, features, target_names
from fluvial.models.tokenizers import check_tokenizer, load_tokenizer
from fluvial.models.weights import check_weights
from fluvial.storage import toml


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a base model that settings follow from."""

    name: str
    architecture: str
    """Type of the model, as transformers names it."""
    parameters: int
    layers: int
    dtype: str
    """Float type of the weights."""
    context: int | None
    """Tokens that the model reads at most; None without a limit."""
    tokenizer: PreTrainedTokenizerBase
    adapted: int
    """Values of an adapter of rank 1 on all linear modules, which LoRA adapts by default."""
    narrowest: int
    """Smallest dimension of a linear module, which bounds the rank."""
    slow: bool
    """True where this machine has no GPU and its CPU is slow in `dtype`."""

    @property
    def has_template(self) -> bool:
        """True where the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def wants_float32(self) -> bool:
        """True where float32 is quicker on this machine, and four bytes a value fit a quarter of
        its memory."""
        return self.slow and 16 * self.parameters <= _memory_bytes()

    @property
    def local(self) -> bool:
        """True for a local folder, whose path is relative to the file that names it."""
        return (
            self.name != EMBEDDED and local_folder(ModelConfig(name_or_path=self.name)) is not None
        )

    def words(self) -> str:
        """Return the facts in one line."""
        context = "no limit of context" if self.context is None else f"context {self.context:,}"
        template = "with" if self.has_template else "without"
        return (
            f"{self.architecture}, {self.parameters:,} parameters, {self.layers} layers, "
            f"{self.dtype}, {context}, {template} a chat template"
        )


def look_at_model(name: str) -> ModelFacts:
    """Return the facts about a model; raises `ConfigError` for what cannot be tuned.

    That is an encoder, a folder without weights or tokenizer, a hub id that cannot be reached.
    """
    config = toml.read(ModelConfig, {"name_or_path": name}, "--model")
    base: PreTrainedModel = meta_base(config)
    tokenizer = load_tokenizer(config)
    check_tokenizer(tokenizer, base, name)
    check_weights(config, base)
    target_names(base, LoraSettings(r=1))  # refuses a base that LoRA cannot adapt
    linear = adaptable_modules(base)
    text_config = base.config.get_text_config()

    return ModelFacts(
        name=name,
        architecture=base.config.model_type,
        parameters=sum(parameter.numel() for parameter in base.parameters()),
        layers=int(getattr(text_config, "num_hidden_layers", 0)),
        dtype=str(dtype_of(config)).removeprefix("torch."),
        context=context_length(base),
        tokenizer=tokenizer,
        adapted=sum(sum(features(module)) for module in linear.values()),
        narrowest=min((min(features(module)) for module in linear.values()), default=1),
        slow=is_slow(config),
    )


def _memory_bytes() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def can_quantise() -> bool:
    """Return whether the library that quantises a base is installed."""
    return find_spec("bitsandbytes") is not None
