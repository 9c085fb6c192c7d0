"""Bits by layer: a site trains against the formats of its plan, in the bytes that it predicts."""

import json
import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fluvial.errors import WireError
from fluvial.federation.adapters import AggregationSettings
from fluvial.methods.fedpipe.format_errors import layer_errors
from fluvial.methods.fedpipe.planner.formats import FORMATS, layered
from fluvial.methods.fedpipe.planner.memory import MemoryModel, base_bytes
from fluvial.methods.fedpipe.planner.mixing import mixtures, with_error
from fluvial.methods.fedpipe.planner.plan import Prediction, Setting, SitePlan
from fluvial.methods.fedpipe.planner.profile import Profile
from fluvial.methods.fedpipe.planner.settings import PlannerSettings
from fluvial.methods.fedpipe.planner.sizes import sizes_of
from fluvial.methods.fedpipe.profiles import read_profile
from fluvial.methods.fedpipe.site_configuration import SiteConfiguration
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.quantised import QuantisedLinear
from fluvial.models.targets import LoraSettings
from fluvial.report.site_plans import plan_lines
from fluvial.training import processes
from fluvial.training.train import TrainReport, train
from fluvial.wire.payload import Payload
from tests.support.planner import models, sizes
from tests.support.runs import run_table, run_with_stops

Table = dict[str, Any]

MIXED: Table = {
    "lora": {"r": 4, "target_modules": "all-linear"},
    "method": {
        "name": "fedpipe",
        "probe_steps": 2,
        "probe_rank": 2,
        "planner": {
            "ranks": [2, 4],
            "batches": [2],
            "objective": "value",
            "formats": ["float32", "nf4"],
            "layer_groups": 2,
            "weight_of_error": 100.0,
        },
        "budgets": [
            {"site": "north", "memory_mb": 0.34, "tokens_s": 4000.0},
            {"site": "south", "memory_mb": 0.9, "tokens_s": 2000.0},
            {"site": "west", "memory_mb": 0.9, "tokens_s": 1000.0},
        ],
    },
}
"""The first site has memory for one of its two layers in float32, the others for both."""


def test_a_site_trains_against_the_formats_of_its_plan(
    run_config: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The format of every layer's weights, and the bytes of all weights, as planned."""
    seen: list[tuple[dict[int, str], int]] = []

    def watched(model: nn.Module, examples: Any, config: Any, **options: Any) -> TrainReport:
        layers = {
            int(name.split(".layers.")[1].split(".")[0]): kind_of(module)
            for name, module in model.named_modules()
            if name.endswith("q_proj") and ".layers." in name
        }
        base = [p for name, p in model.named_parameters() if ".lora_" not in name]
        seen.append((layers, sum(parameter.nbytes for parameter in base)))
        return train(model, examples, config, **options)

    monkeypatch.setattr(processes, "train", watched)
    run_table(run_config | MIXED | {"rounds": 1, "compare": []}, tmp_path / "run")
    setup = json.loads((tmp_path / "run" / "result.json").read_text())["setup"]
    plans = setup["plans"]
    assert {name for _, name in plans["north"]["layer_formats"]} == {"float32", "nf4"}
    assert plans["south"]["layer_formats"] == []

    again = SitePlan.from_json(json.loads(json.dumps(plans["north"])))
    assert json.loads(json.dumps(again.to_json())) == plans["north"]
    format = layered(again.setting.format, again.setting.layer_formats)
    memory = MemoryModel.from_json(setup["models"]["north"]["memory"])
    decoded = 4 * max(memory.sizes.largest)
    assert (dict(again.setting.layer_formats), memory.base(format) - decoded) in seen
    assert ({0: "float32", 1: "float32"}, memory.base(FORMATS["float32"])) in seen
    words = "\n".join(plan_lines({"plans": plans}))
    assert "plan of north: nf4 x 1, float32 x 1, batch" in words


def test_a_stopped_run_goes_on_with_the_formats_of_its_plans(
    run_config: Table, tmp_path: Path
) -> None:
    """Nothing but the folder is left after the set-up, and again after round 1."""
    table = run_config | MIXED | {"rounds": 2, "compare": []}
    straight = run_table(table, tmp_path / "straight")
    assert straight["setup"]["plans"]["north"]["layer_formats"]
    resumed = run_with_stops(table, tmp_path / "stopped", [1, 1, 9])
    assert resumed["setup"] == straight["setup"]
    assert resumed["adapter_sha256"] == straight["adapter_sha256"]


def kind_of(module: Any) -> str:
    base = getattr(module, "base_layer", module)
    return str(base.kind) if isinstance(base, QuantisedLinear) else "float32"


@pytest.mark.parametrize("correction", [0, 2])
def test_bytes_and_errors_of_a_base_are_those_of_its_tensors(
    correction: int, tiny_model: Path
) -> None:
    """int8 in the first layer and nf4 in the second; errors by the dense weights."""
    config = ModelConfig(
        name_or_path=str(tiny_model),
        quantization="int8",
        layer_quantization={"nf4": (1,)},
        quantization_correction=correction,
    )
    pool = ModelPool(config, LoraSettings(r=2))
    layers = ((0, "int8"), (1, "nf4"))
    sizes = sizes_of(pool.outline.base, 4, correction)
    with pool.model({}) as model:
        base = [p.nbytes for name, p in model.named_parameters() if ".lora_" not in name]
        coded = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if isinstance(module, QuantisedLinear)
        }

    expected = base_bytes(sizes, layered("int8", layers)) - 4 * max(sizes.largest)
    assert sum(base) == expected

    errors = layer_errors(pool, ("int8", "nf4"))
    for layer, kind in layers:
        weights, rest = [], []
        for name, module in coded.items():
            if f"layers.{layer}." in name:
                weight = pool.base.get(f"{name.removesuffix('.base_layer')}.weight").float()
                dense = module.dense()
                if correction:
                    dense = dense + module.correction_B @ module.correction_A
                weights.append(weight.flatten())
                rest.append((weight - dense).flatten())
        error = float(torch.cat(rest).norm() / torch.cat(weights).norm())
        assert errors[kind][layer] == pytest.approx(error, rel=1e-3)
        assert 0 < error < FORMATS[kind].error * 1.5


@pytest.mark.parametrize("seed", range(5))
def test_no_other_layers_of_that_number_have_a_smaller_error(seed: int) -> None:
    """Brute force over all choices of as many layers of equal bytes."""
    draw = random.Random(seed)
    base = sizes(6)
    errors = {"nf4": tuple(draw.uniform(0.01, 0.5) for _ in range(6))}
    shares = [draw.random() for _ in range(6)]
    shares = [share / sum(shares) for share in shares]
    formats = (FORMATS["bfloat16"], FORMATS["nf4"])
    found = mixtures(formats, base, errors, shares, 6)
    assert [len([1 for _, kind in each.layers if kind == "nf4"]) for each in found] == [
        *range(1, 6)
    ]

    for count, mixture in enumerate(found, start=1):
        least = min(
            sum(
                shares[layer] * (errors["nf4"][layer] if layer in chosen else 0.00166)
                for layer in range(6)
            )
            for chosen in combinations(range(6), count)
        )
        assert with_error(mixture, errors, shares).error == pytest.approx(least, rel=1e-12)


def test_a_profile_has_errors_of_every_layer_and_format_that_plans_mix() -> None:
    def reply(errors: Mapping[str, Any]) -> Payload:
        profile = models(errors=errors).profile
        return Payload.from_bytes(Payload(values=profile.to_values()).to_bytes())

    def read(reply: Payload, formats: Sequence[str], held: str = "bfloat16") -> Profile:
        return read_profile("a", reply, held=(held,), formats=formats, layers=2)

    good = {"nf4": (0.1, 0.2), "int8": (0.01, 0.02)}
    assert read(reply(good), ("nf4", "int8")).errors == good
    for wrong in ({}, {"nf4": (0.1, 0.2)}, {**good, "nf4": (0.1,)}):
        with pytest.raises(WireError, match="expected 2 layers in each of the formats nf4, int8"):
            read(reply(wrong), ("nf4", "int8"))
    for broken in ({"float32": (0.1, 0.2)}, {"nf4": (-0.1, 0.2)}, {"nf4": (2e3, 0.2)}):
        with pytest.raises(WireError, match="errors"):
            read(reply(broken), ("nf4",))
    with pytest.raises(WireError, match="one of the formats float32, found bfloat16"):
        read(reply(good), ("nf4", "int8"), held="float32")


def test_a_site_refuses_layers_in_a_format_that_the_settings_do_not_mix(tiny_model: Path) -> None:
    run = ModelPool(ModelConfig(name_or_path=str(tiny_model)), LoraSettings(r=2)).assignment(2)
    planner = PlannerSettings(formats=("float32", "int8", "nf4"), batches=(2,))

    def check(layers: tuple[tuple[int, str], ...], settings: PlannerSettings = planner) -> None:
        setting = Setting("float32", 2, 32, False, 1, 5, layers)
        plan = SitePlan(setting, run.ranks[:1], 0, 0.0, 0.0, Prediction(0, 0, 0, 0.0, 0.0))
        sent = Payload(values=SiteConfiguration.of(plan, run, ()).to_values(run))
        got = SiteConfiguration.from_payload(Payload.from_bytes(sent.to_bytes()), run)
        got.check_allowed(settings, AggregationSettings(), run, 10)

    check(((0, "float32"), (1, "nf4")))
    whole = planner.model_copy(update={"layer_groups": 1})
    fewer = planner.model_copy(update={"formats": ("float32", "int8")})
    both = ((0, "int8"), (1, "nf4"))
    for layers, settings in ((both, planner), (both[1:], whole), (both[1:], fewer)):
        with pytest.raises(WireError, match="layers of the base have another format"):
            check(layers, settings)


def test_groups_of_layers_need_two_formats() -> None:
    with pytest.raises(ValidationError, match="layer_groups: without effect"):
        PlannerSettings(formats=("nf4",), layer_groups=2)
    assert PlannerSettings(formats=("bfloat16", "nf4")).measured_formats == ("nf4",)
    assert PlannerSettings(formats=("nf4", "int8"), layer_groups=1).measured_formats == ()
