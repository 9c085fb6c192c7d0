"""LoRA adapters, injected into a base model by PEFT, with dropout that follows the run's seed."""

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import mode
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.errors import ConfigError
from fluvial.models.building import building
from fluvial.models.stored import first_line
from fluvial.models.targets import LoraSettings, target_names
from fluvial.seeds import derive

PREFIX = "base_model.model."
"""PEFT's prefix of the base's names in an adapted model."""
SIDE = "side"
"""PEFT's name of the second adapter, a frozen side path."""


@dataclass(frozen=True)
class SavedLora:
    """An adapter on disk, as its `adapter_config.json` describes it to PEFT."""

    config: Mapping[str, Any] = field(repr=False)
    """The keywords for PEFT's `LoraConfig`."""


class SeededDropout(nn.Module):
    """Dropout whose mask depends only on its seed and its place in the model.

    `nn.Dropout` draws from one generator for the whole process, so two sites that train side by
    side would disturb each other's masks; it would also draw a second mask when gradient
    checkpointing repeats a forward pass.
    """

    def __init__(self, p: float, place: int) -> None:
        super().__init__()
        self.p = p
        self.place = place
        self.seed = 0

    def forward(self, hidden: Tensor) -> Tensor:
        """Zero a share `p` of `hidden` (any shape) and scale the rest, in training only."""
        if not self.training or self.p == 0:
            return hidden
        generator = None
        if not hidden.is_meta:  # shapes alone are drawn without a generator
            generator = torch.Generator(hidden.device).manual_seed(derive(self.seed, self.place))
        mask = torch.rand(hidden.shape, generator=generator, device=hidden.device) >= self.p
        return hidden * mask / (1 - self.p)


def is_side(name: str) -> bool:
    """Return whether a tensor is a factor of a frozen side path."""
    return f".lora_A.{SIDE}." in name or f".lora_B.{SIDE}." in name


def module_of(name: str) -> str:
    """Return the module of a LoRA factor: `q_proj` of `q_proj.lora_A.weight`."""
    return name.rpartition(".lora_")[0]


def adapt(
    base: nn.Module,
    lora: LoraSettings | SavedLora,
    ranks: Mapping[str, int] | None = None,
    side: Mapping[str, int] | None = None,
    *,
    within: Callable[[str], bool] | None = None,
) -> nn.Module:
    """Return `base` with LoRA modules injected (in place) by PEFT.

    `base` may be on the meta device. `ranks` by name of module take the place of the settings' own;
    a module of rank 0 gets no adapter. The scale is that of the settings at every rank. `side` has
    the ranks of a second adapter, without dropout. Only modules `within` some part, by name, are
    adapted; by default all. Raises `ConfigError` naming what would fit.
    """
    from peft import LoraConfig

    if isinstance(lora, SavedLora):
        assert ranks is None, "a saved adapter has its own ranks"
        config = LoraConfig(**lora.config)
    elif ranks is None:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=target_names(base, lora, within),
            use_rslora=lora.use_rslora,
        )
    else:
        config = _of_ranks(lora, ranks, lora.lora_dropout)

    model = _injected(base, config)
    for place, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, nn.Dropout) and ".lora_dropout." in name:
            parent, leaf = name.rsplit(".", 1)
            model.get_submodule(parent)._modules[leaf] = SeededDropout(module.p, place)

    if side:  # after the places, so that it changes no mask
        assert isinstance(lora, LoraSettings), "a saved adapter has no side path"
        _add_side(model, _of_ranks(lora, side, 0.0))

    return model


def _injected(base: nn.Module, config: Any) -> nn.Module:
    """Return `base` with the adapter that PEFT makes of `config`; raises `ConfigError`."""
    from peft import get_peft_model

    with building(), warnings.catch_warnings():
        # PEFT reports what it corrects by itself (GPT-2's Conv1D), and that merging would change
        # tied weights.
        warnings.simplefilter("ignore")
        try:
            model: nn.Module = get_peft_model(base, config)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, re.error) as error:
            raise ConfigError(
                f"lora: PEFT cannot put the adapter on this model: {_reason(error)}"
            ) from error

    return model


def _of_ranks(lora: LoraSettings, ranks: Mapping[str, int], dropout: float) -> Any:
    """Return PEFT's configuration of an adapter with `ranks` by name of module.

    PEFT divides alpha by the rank (by its root under `use_rslora`). So alpha grows with the rank,
    and the scale of the product B A is that of `lora` in every module and at every site. Only then
    do products of different sites have one unit.
    """
    from peft import LoraConfig

    present = {name: rank for name, rank in ranks.items() if rank}
    usual = mode(present.values())
    others = {_whole_name(name): rank for name, rank in present.items() if rank != usual}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=usual,
        lora_alpha=_alpha(lora, usual),
        lora_dropout=dropout,
        target_modules=sorted(present),
        use_rslora=lora.use_rslora,
        rank_pattern=others,
        alpha_pattern={name: _alpha(lora, rank) for name, rank in others.items()},
    )


def _alpha(lora: LoraSettings, rank: int) -> float:
    """Return the alpha that gives an adapter of `rank` the scale of `lora`."""
    ratio = rank / lora.r
    return lora.alpha * (math.sqrt(ratio) if lora.use_rslora else ratio)


def _whole_name(module: str) -> str:
    """Return the regular expression that PEFT's patterns need for one module.

    PEFT reads a key as an expression for the end of a name; `^` makes it the whole name.
    """
    return f"^{re.escape(module)}"


def _add_side(model: Any, config: Any) -> None:
    """Add the side path `config` to an adapted model, active beside its adapter."""
    with building(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as for the first adapter
        model.add_adapter(SIDE, config)
    model.base_model.set_adapter(["default", SIDE])


def module_ranks(model: nn.Module) -> dict[str, int]:
    """Return the rank of each adapted module of `model` by name, in order of the names."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(PREFIX): module.r["default"]
        for name, module in sorted(model.named_modules())
        if isinstance(module, LoraLayer)
    }


def _reason(error: Exception) -> str:
    text = first_line(error)
    if "ParamWrapper" in text and "lora_dropout" in text:
        return (
            "the experts of a layer are one tensor, which it adapts without dropout only; set "
            "lora.lora_dropout = 0"
        )
    return text.removeprefix("[PEFT:LORA] ")
