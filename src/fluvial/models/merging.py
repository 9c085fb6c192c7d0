"""Merge an adapter into its base, and check the written model against base and adapter.

All sums are made in fp32 and rounded once, to the type that is written. A quantised base is merged
as what it computes with: its dequantised weights.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.errors import ConfigError
from fluvial.models.adapters import SavedLora, adapt
from fluvial.models.base import Base
from fluvial.models.export import save_whole
from fluvial.models.loading import weights_folder
from fluvial.models.pretrained import ModelConfig, context_length, dtype_of
from fluvial.models.quantised import QuantisedLinear
from fluvial.models.tuning import write_weights
from fluvial.wire.tensors import Named

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest relative error of the merged model's logits, ||merged - adapted|| / ||adapted||, by the
type that is written. Rounding a weight costs 2^-9 of it in bfloat16 and 2^-12 in float16; through
some tens of layers that grows about tenfold."""
SHARE = 0.5
"""Largest error as a share of what the adapter changes, ||merged - adapted|| / ||adapted - base||:
beyond it, rounding has eaten the adapter."""
_PROBES, _LENGTH = 4, 32
"""Sequences of the probe, and their tokens."""


@dataclass(frozen=True)
class MergeCheck:
    """Logits of the written model beside those of base and adapter, on a probe, in fp32."""

    error: float
    """||merged - adapted|| / ||adapted||."""
    effect: float
    """||adapted - base|| / ||adapted||, what the adapter changes."""
    tolerance: float
    """The largest error that rounding explains, by the type that is written."""

    @property
    def most(self) -> float:
        """The largest error that is accepted."""
        return min(self.tolerance, SHARE * self.effect)

    @property
    def words(self) -> str:
        """The comparison for people, after "the logits of the merged model"."""
        error, most, rounding, effect = (
            f"{100 * share:.2g} %" for share in (self.error, self.most, self.tolerance, self.effect)
        )
        return (
            f"differ from those of base and adapter by {error} of their norm, on random tokens; at "
            f"most {most} is accepted, the smaller of {rounding} for rounding and half of the "
            f"{effect} by which the adapter changes the base's"
        )


def merge(
    config: ModelConfig, lora: SavedLora, state: Named, folder: Path, dtype: str
) -> MergeCheck:
    """Write the base with the adapter `state` merged into it, as a folder of transformers.

    `dtype` is "float32", "bfloat16", "float16", or "auto" for the type of the base. The model is
    read again from the folder and compared on a probe. Raises `ConfigError` where its logits are
    not those of base and adapter.
    """
    on_cpu = config.model_copy(update={"device": "cpu"})
    kind = dtype_of(config if dtype == "auto" else config.model_copy(update={"dtype": dtype}))
    base = _in_fp32(Base(on_cpu, quantisation=config.quantisation).held())
    probe = _probe(base)
    adapted: Any = adapt(base, lora)
    write_weights(adapted, state)
    expected = _logits(adapted, probe)
    with adapted.disable_adapter():
        untuned = _logits(adapted, probe)

    for name, module in list(adapted.named_modules()):
        if isinstance(module, QuantisedLinear):
            adapted.set_submodule(name, _dense(module))

    merged = adapted.merge_and_unload().to(kind)
    merged.config.dtype = kind
    save_whole(merged, folder, weights_folder(config))
    del base, adapted, merged
    gc.collect()

    check = MergeCheck(
        _distance(_logits(_read(folder), probe), expected, expected),
        _distance(expected, untuned, expected),
        TOLERANCE[kind],
    )
    _judge(check, kind)
    return check


def _judge(check: MergeCheck, kind: torch.dtype) -> None:
    if check.error <= check.most:
        return

    remedy = (
        "the adapter cannot be merged into this base; export it with --form peft"
        if kind == torch.float32
        else "rounding would change the model; write it with --dtype float32, or export the "
        "adapter with --form peft"
    )
    raise ConfigError(
        f"the merged model in {str(kind).removeprefix('torch.')} is not base and adapter: its "
        f"logits {check.words}; {remedy}"
    )


def _in_fp32(model: nn.Module) -> nn.Module:
    """Return `model` in fp32, in place; codes of quantised weights stay as they are."""
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            module.dtype = torch.float32

    return model.float().eval()


def _dense(linear: QuantisedLinear) -> nn.Linear:
    """Return a layer with the dequantised weight, and with its correction."""
    weight = linear.dense()
    if linear.correction_rank:
        weight = weight + linear.correction_B @ linear.correction_A

    made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = linear.bias
    return made


def _probe(model: nn.Module) -> Tensor:
    """Return random tokens (4, 32), or fewer where the context is shorter."""
    known: Any = model
    length = min(_LENGTH, context_length(known) or _LENGTH)
    draw = torch.Generator().manual_seed(0)
    return torch.randint(
        known.config.get_text_config().vocab_size, (_PROBES, length), generator=draw
    )


@torch.no_grad()
def _logits(model: Any, probe: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=probe, use_cache=False).logits
    return logits.double()


def _distance(left: Tensor, right: Tensor, unit: Tensor) -> float:
    return float((left - right).norm() / unit.norm())


def _read(folder: Path) -> nn.Module:
    """Return the written model in fp32, as transformers reads it."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()
