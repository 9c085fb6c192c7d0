"""The modules of a base model that get a LoRA adapter, by the names that PEFT takes."""

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import nn

from fluvial.errors import ConfigError
from fluvial.models.hf import PreTrainedModel
from fluvial.settings import Settings

PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The four projections of attention, which CG-FedLLM (Shepherd) adapts."""


class LoraSettings(Settings):
    """The LoRA adapter: names as in PEFT's `LoraConfig`. By default all linear layers have one,
    because that learns most at equal bytes (docs/codecs.md); rank, alpha and dropout are those of
    CG-FedLLM (Shepherd), which adapts "attention"."""

    r: int = Field(8, ge=1, le=4096)
    """Rank of the adapter's factors."""
    lora_alpha: float | None = Field(None, ge=1e-6, le=1e6)
    """Numerator of the adapter's scale, alpha / r; 2 r by default."""
    lora_dropout: float = Field(0.05, ge=0, le=0.99)
    """Share of the adapter's inputs that training sets to zero."""
    target_modules: Literal["all-linear", "attention"] | tuple[str, ...] = "all-linear"
    """Names of linear modules, or "all-linear" for all without heads and routers, and without those
    of a few values that are smaller than the rank. "attention" is
    `q_proj`, `k_proj`, `v_proj`, `o_proj` where the model has all four, else PEFT's choice for its
    architecture, else "all-linear". In a multimodal model only text modules are adapted."""
    use_rslora: bool = False
    """Adapter scale alpha / sqrt(r) instead of alpha / r."""

    @property
    def alpha(self) -> float:
        """Return `lora_alpha`, or its default for this rank."""
        return 2 * self.r if self.lora_alpha is None else self.lora_alpha

    @field_validator("target_modules")
    @classmethod
    def _some(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if value == () or (isinstance(value, tuple) and not all(value)):
            raise ValueError("target_modules: names at least one module, or leave it out")
        return value


def target_names(
    base: PreTrainedModel, lora: LoraSettings, within: Callable[[str], bool] | None = None
) -> list[str]:
    """Return the modules of `base` that `lora` adapts, in PEFT's form, sorted.

    They are the last parts of the modules' names (`q_proj`) where these are exact, else whole
    names; only those `within` some part, by name, where it is given. `base` may be on the meta
    device. Raises `ConfigError` naming what would fit.
    """
    linear = linear_modules(base)
    fit = adaptable_modules(base)
    given = lora.target_modules

    if isinstance(given, tuple):
        chosen = _explicit(given, linear, fit)
    elif given == "all-linear":
        chosen = fit
    else:
        chosen = _attention(base, fit)
    if not isinstance(given, tuple):
        chosen = _without_tiny(chosen, lora.r, base.get_input_embeddings().weight.shape[1])

    if not chosen:
        raise ConfigError(
            "lora.target_modules: the model has no linear modules that LoRA can adapt; set tune = "
            "'full'"
        )

    _check_rank(lora.r, chosen)
    if within is not None:
        chosen = {name: module for name, module in chosen.items() if within(name)}
        assert chosen, "a part without an adapter is not adapted"

    # The list is kept as it was written, unless PEFT would also find a module of that name
    # elsewhere.
    short = sorted(set(given) if isinstance(given, tuple) else {_leaf(name) for name in chosen})
    everything = (name for name, _ in base.named_modules())

    return short if _matching(short, everything) == chosen.keys() else sorted(chosen)


def linear_modules(base: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers (and GPT-2's Conv1D) that read text, by name."""
    from transformers.pytorch_utils import Conv1D

    text = text_modules(base)

    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module.weight.dim() == 2
        and (text is None or id(module) in text)
    }


def adaptable_modules(base: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear modules that "all-linear" adapts, by name: all but heads, routers, and
    those that PEFT mistakes for others."""
    linear = linear_modules(base)
    return {name: module for name, module in linear.items() if not _is_special(name, module, base)}


def features(module: Any) -> tuple[int, int]:
    """Return the outputs and inputs of a linear layer, also of GPT-2's Conv1D, whose weight is (in,
    out), and of one whose weight is quantised."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    inputs, outputs = module.weight.shape
    return outputs, inputs


def text_modules(base: PreTrainedModel) -> set[int] | None:
    """Return the ids of the modules that read text in a multimodal `base`, None for a text
    model."""
    if base.config.get_text_config() is base.config:
        return None
    submodels = [base.get_decoder(), base.get_output_embeddings(), base.get_input_embeddings()]
    return {
        id(module)
        for submodel in submodels
        if submodel is not None
        for module in submodel.modules()
    }


_TINY = 16
"""Times that a module of a few values fits into the width of its model, at least; ours. Keys and
values of Llama 3 405B fit 16 times."""
_ROUTER = re.compile(r"(^|\.)(\w+_)?(router|routers|gate|gating|gate_weight|expert_gate)(\.|$)")
_EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"}


def _is_special(name: str, module: nn.Linear, base: PreTrainedModel) -> bool:
    """Return whether a linear module is adapted only where it is named.

    Such a module is a head, a router, or one that PEFT mistakes for another.
    """
    head = base.get_output_embeddings()
    if module is head or (head is not None and module.weight is getattr(head, "weight", None)):
        return True
    if _ROUTER.search(name):
        return True

    parent = base.get_submodule(name.rpartition(".")[0])
    # The fused kernels of state-space layers take the weights of these two and pass an adapter by.
    if _leaf(name) in ("out_proj", "dt_proj") and hasattr(parent, "A_log"):
        return True

    # PEFT takes these names for the experts where all experts of a layer are one tensor.
    return _leaf(name) in _EXPERTS and _has_fused_experts(base)


def _has_fused_experts(base: PreTrainedModel) -> bool:
    return any(p.dim() == 3 and ".experts." in name for name, p in base.named_parameters())


def _explicit(
    given: Iterable[str], linear: dict[str, nn.Linear], proposed: dict[str, nn.Linear]
) -> dict[str, nn.Linear]:
    chosen: dict[str, nn.Linear] = {}
    for target in given:
        names = _matching([target], linear)
        if not names:
            leaves = sorted({_leaf(name) for name in proposed})
            raise ConfigError(
                f"lora.target_modules: the model has no linear module {target!r}; it has "
                f"{', '.join(leaves) or 'none'}"
            )

        chosen |= {name: linear[name] for name in names}

    return chosen


def _attention(base: PreTrainedModel, fit: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Return the paper's four projections, else PEFT's choice for the architecture, else all."""
    leaves = {_leaf(name) for name in fit}
    if leaves.issuperset(PAPER_TARGETS):
        return {name: module for name, module in fit.items() if _leaf(name) in PAPER_TARGETS}

    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE

    usual = (
        TABLE.get(base.config.get_text_config().model_type)
        or TABLE.get(base.config.model_type)
        or []
    )
    names = (
        _matching(usual, fit)
        if isinstance(usual, list)
        else {name for name in fit if re.fullmatch(usual, name)}
    )

    return {name: fit[name] for name in names} or fit


def _without_tiny(chosen: dict[str, nn.Linear], rank: int, width: int) -> dict[str, nn.Linear]:
    """Return modules without those of a few values, such as Gemma 3n's coefficients, whose smaller
    dimension is below the rank and far below the `width` of the model: a rank that they could have
    would be too low for all others."""
    smaller = {name: min(features(module)) for name, module in chosen.items()}
    return {
        name: module
        for name, module in chosen.items()
        if smaller[name] >= rank or _TINY * smaller[name] >= width
    }


def _matching(targets: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return the names that PEFT matches with `targets`: equal, or with one at the end after a
    dot."""
    wanted = tuple(targets)
    return {
        name
        for name in names
        if name in wanted or name.endswith(tuple(f".{target}" for target in wanted))
    }


def _check_rank(rank: int, chosen: dict[str, nn.Linear]) -> None:
    for name, module in chosen.items():
        smallest = min(features(module))
        if rank > smallest:
            raise ConfigError(
                f"lora.r={rank} exceeds dimension {smallest} of {_leaf(name)!r}; choose at most "
                f"{smallest}"
            )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
