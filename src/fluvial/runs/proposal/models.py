"""Facts about a base model, from its folder or hub id, without its weights."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fluvial.data.templates import inlined_template, with_template
from fluvial.errors import ConfigError
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
    template: str | None
    """Chat template that is asked for, in the place of the tokenizer's."""
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
        template = f"{'with' if self.has_template else 'without'} a chat template"
        if self.template is not None:
            template = "another chat template asked for"
        return (
            f"{self.architecture}, {self.parameters:,} parameters, {self.layers} layers, "
            f"{self.dtype}, {context}, {template}"
        )


def look_at_model(name: str, template: str | None = None) -> ModelFacts:
    """Return the facts about a model, with another chat `template` where one is named; raises
    `ConfigError` for what cannot be tuned.

    That is an encoder, a folder without weights or tokenizer, a hub id that cannot be reached.
    """
    config = toml.read(ModelConfig, {"name_or_path": name}, "--model")
    base: PreTrainedModel = meta_base(config)
    tokenizer = load_tokenizer(config)
    if template is not None:
        tokenizer = _with_template(tokenizer, template)
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
        template=template,
        slow=is_slow(config),
    )


def _with_template(tokenizer: PreTrainedTokenizerBase, chosen: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a chat template that an option names."""
    try:
        return with_template(tokenizer, inlined_template(chosen, Path()))
    except ConfigError as error:
        words = str(error).replace("data.chat_template", "--chat-template")
        raise ConfigError(words) from None


def _memory_bytes() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def can_quantise() -> bool:
    """Return whether the library that quantises a base is installed."""
    return find_spec("bitsandbytes") is not None
