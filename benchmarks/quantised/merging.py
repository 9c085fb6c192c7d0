"""Held-out loss of adapters beside quantised bases, and merged into them."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.report import Claim, Report, Row, show
from fluvial.data import Example, SiteTexts
from fluvial.models.pool import ModelPool
from fluvial.models.quantised import QuantisedLinear
from fluvial.models.states import initial_state
from fluvial.runs.config import RunConfig, parse
from fluvial.seeds import generator
from fluvial.training.evaluate import heldout
from fluvial.training.train import train
from fluvial.wire.tensors import Named

BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
    "nf4-double": {"quantization": "nf4-double"},
    "nf4, layer 0 int8": {"quantization": "nf4", "layer_quantization": {"int8": [0]}},
    "nf4, correction of rank 8": {"quantization": "nf4", "quantization_correction": 8},
}
STEPS = 60


def merging(report: Report, *, quick: bool) -> None:
    """Train an adapter over each base on one site's text, and add its losses to the report."""
    rows: list[Row] = []
    whole = ModelPool(_config({}, quick=quick).model, _config({}, quick=quick).lora)

    for name, settings in BASES.items():
        config = _config(settings, quick=quick)
        pool = ModelPool(config.model, config.lora)
        texts = SiteTexts(config.data, pool.tokenizer, seed=0)
        site = texts.load(texts.names[0])
        adapter = _trained(config, pool, site.train)
        untrained = initial_state(pool.layout, 0)
        row: Row = {
            "part": "merging",
            "base": name,
            "base_loss": _loss(pool, untrained, site.heldout),
            "adapter_loss": _loss(pool, adapter, site.heldout),
            "float_loss": _loss(whole, adapter, site.heldout),
        }
        if config.model.quantisation:
            for key, again in (("merged_loss", False), ("requantised_loss", True)):
                with pool.model(adapter) as model:
                    row[key] = _measure(_merged(model, again=again), pool, site.heldout)
        rows.append(row)

    show(
        "Held-out loss (nats per token) of an adapter that was trained over each base",
        {
            "base": "base",
            "base_loss": "untuned",
            "adapter_loss": "adapter beside the base",
            "float_loss": "same adapter, float base",
            "merged_loss": "merged, in float",
            "requantised_loss": "merged, quantised again",
        },
        rows,
    )
    report.rows += rows
    by_base = {row["base"]: row for row in rows}
    nf4 = by_base["nf4"]
    corrected = by_base["nf4, correction of rank 8"]
    report.claims += [
        Claim(
            "share of nf4's gain that merging and quantising again loses",
            (nf4["requantised_loss"] - nf4["adapter_loss"])
            / (nf4["base_loss"] - nf4["adapter_loss"]),
            0.1,
            "at most",
        ),
        Claim(
            "loss of an adapter trained over nf4 on the float base, over that on nf4",
            nf4["float_loss"] / nf4["adapter_loss"] - 1,
            0.005,
            "at most",
        ),
        Claim(
            "the same with a correction of rank 8",
            corrected["float_loss"] / corrected["adapter_loss"] - 1,
            0.005,
            "at most",
        ),
    ]


def _config(model: dict[str, Any], *, quick: bool) -> RunConfig:
    table = {
        "model": {"dtype": "float32", "device": "cpu", **model},
        "data": {"max_length": 64, "max_heldout": 8 if quick else 96},
        "lora": {
            "r": 8,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "target_modules": "attention",
        },
        "train": {
            "learning_rate": 5e-3,
            "per_device_train_batch_size": 8,
            "max_steps": 2 if quick else STEPS,
        },
    }
    return parse(table, "benchmark")


def _trained(config: RunConfig, pool: ModelPool, examples: Sequence[Example]) -> Named:
    """Return the adapter after the configuration's steps."""
    state = initial_state(pool.layout, config.seed)
    with pool.model(state, trainable="A and B") as model:
        report = train(
            model,
            examples,
            config.train,
            pad_token_id=pool.tokenizer.pad_token_id,
            generator=generator(config.seed, "benchmark"),
            start=state,
        )

    return report.weights


def _loss(pool: ModelPool, state: Named, examples: Sequence[Example]) -> float:
    with pool.model(state) as model:
        return _measure(model, pool, examples)


def _measure(model: nn.Module, pool: ModelPool, examples: Sequence[Example]) -> float:
    return heldout(model, examples, pad_token_id=pool.tokenizer.pad_token_id).loss


@torch.no_grad()
def _merged(model: nn.Module, *, again: bool) -> nn.Module:
    """Return a copy with the adapter in the weights: in float, or quantised again."""
    merged = copy.deepcopy(model)
    for path, module in list(merged.named_modules()):
        base = getattr(module, "base_layer", module)
        if not isinstance(base, QuantisedLinear) or path.endswith(".base_layer"):
            continue

        weight = base.dense()
        if base is not module:
            weight = weight + module.get_delta_weight("default")
        merged.set_submodule(path, _layer(base, weight, again=again))

    return merged


def _layer(base: QuantisedLinear, weight: torch.Tensor, *, again: bool) -> nn.Module:
    """Return a layer of the merged weight with the correction that the base has."""
    layer = QuantisedLinear(weight, base.bias, base.kind)
    if not again:
        layer.dense = lambda: weight  # type: ignore[method-assign]
    layer.correction_rank = base.correction_rank
    if base.correction_rank:
        layer.correction_B = base.correction_B
        layer.correction_A = base.correction_A
    return layer
