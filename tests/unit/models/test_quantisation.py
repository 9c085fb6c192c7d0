"""Settings and messages about a quantised base, its size, and every way to refuse it."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import ConfigError, WireError
from fluvial.methods import METHODS
from fluvial.models import quantised
from fluvial.models.assignment import KEY, Assignment
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.quantisation import FLOAT, Quantisation, stored_bytes
from fluvial.models.quantised import formats, quantised_bytes, quantised_words
from fluvial.models.targets import LoraSettings
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.runs.plan import plan as check
from fluvial.wire.payload import Value
from tests.support.models import with_fitting_model
from tests.support.runs import run_table

LORA = LoraSettings(r=4)
MIXED = Quantisation("nf4", ((0, "int8"), (3, None)))


def needs_library() -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")


@pytest.fixture
def run(tiny_model: Path) -> Assignment:
    config = ModelConfig(name_or_path=str(tiny_model), device="cpu")
    return ModelPool(config, LORA).assignment(2)


def test_formats_by_layer() -> None:
    config = ModelConfig(quantization="nf4", layer_quantization={"int8": (0,), "none": (3,)})
    assert config.quantisation == MIXED
    assert [MIXED.format(layer) for layer in range(4)] == ["int8", "nf4", "nf4", None]
    assert MIXED.by_format() == {"int8": (0,), "none": (3,)}
    assert not FLOAT
    assert Quantisation(None, ((2, "int8"),))
    assert ModelConfig().quantisation == FLOAT


@pytest.mark.parametrize(
    "quantisation", [FLOAT, Quantisation("nf4"), MIXED, Quantisation(None, ((1, "nf4-double"),))]
)
def test_an_assignment_carries_its_formats(run: Assignment, quantisation: Quantisation) -> None:
    assignment = replace(run, quantisation=quantisation)
    values = assignment.to_values(run)
    assert (values == {}) == (quantisation == FLOAT)
    assert Assignment.from_values(json.loads(json.dumps(values)), run) == assignment

    back = run.to_values(assignment)
    assert Assignment.from_values(back, assignment) == run


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ("int4", "'int4' is none of nf4, nf4-double, int8, none"),
        (4, "expected a format"),
        (None, "expected a format"),
        ({"usual": "nf4"}, "expected a format"),
        ({"usual": "fp4", "layers": {"int8": [0]}}, "usual: 'fp4' is none of"),
        ({"usual": "nf4", "layers": {}}, "layers: expected layers by format"),
        ({"usual": "nf4", "layers": {"fp4": [0]}}, "layers: 'fp4' is none of"),
        ({"usual": "nf4", "layers": {"int8": []}}, "layers: expected numbers"),
        ({"usual": "nf4", "layers": {"int8": [-1]}}, "layers: -1 is no number of a layer"),
        ({"usual": "nf4", "layers": {"int8": [True]}}, "layers: True is no number of a layer"),
        ({"usual": "nf4", "layers": {"int8": [1], "none": [1]}}, "a layer is named twice"),
    ],
)
def test_a_message_with_other_formats_is_refused(run: Assignment, value: Value, where: str) -> None:
    with pytest.raises(WireError, match=f"{KEY}.quantization.*{where}"):
        Assignment.from_values({KEY: {"quantization": value}}, run)


def test_all_weights_are_not_quantised(tiny_model: Path) -> None:
    run = ModelPool(ModelConfig(name_or_path=str(tiny_model), device="cpu"), None).assignment(2)
    with pytest.raises(WireError, match="all weights are tuned"):
        Assignment.from_values({KEY: {"quantization": "nf4"}}, run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "fp4"}, 'must be "nf4", "nf4-double" or "int8"'),
        (
            {"quantization": "nf4", "layer_quantization": {"nf4": [1]}},
            "layer_quantization.nf4: without effect",
        ),
        ({"layer_quantization": {"none": [1]}}, "layer_quantization.none: without effect"),
        (
            {"layer_quantization": {"int8": [1], "nf4": [1]}},
            "layer_quantization: layer 1 is listed twice",
        ),
        ({"layer_quantization": {"int8": []}}, "layer_quantization: lists layers"),
        ({"layer_quantization": {"int8": [-1]}}, "layer_quantization: lists layers"),
        ({"quantization_correction": 4}, "quantization_correction: without effect"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse({"model": settings}, "test")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"tune": "full"}, "weights of the base are tuned"),
        ({"method": {"name": "fedcybgd"}}, "'fedcybgd' trains, sends or cuts"),
        ({"method": {"name": "flglm"}, "tune": "full"}, "weights of the base are tuned"),
    ],
)
def test_methods_of_float_weights_refuse_it(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.quantization: .*{message}"):
        parse({"model": {"quantization": "nf4"}} | table, "test")


def test_a_missing_library_is_named_with_its_extra(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantised._functional.cache_clear()
    config = ModelConfig(name_or_path=str(tiny_model), device="cpu", quantization="nf4")
    with pytest.raises(ConfigError, match=r"bitsandbytes.*pip install 'fluvial\[quantization\]'"):
        ModelPool(config, LORA).load()


def test_check_names_the_library_that_a_plan_may_need(
    run_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantised._functional.cache_clear()
    method = {"name": "fedpipe", "planner": {"formats": ["float32", "nf4"]}}
    with pytest.raises(ConfigError, match=r"method.planner.formats: needs bitsandbytes"):
        check(parse(run_config | {"method": method}, "test"))


def test_a_quantisation_of_no_layer_is_refused(run_config: dict[str, Any]) -> None:
    model = run_config["model"] | {
        "quantization": "nf4",
        "layer_quantization": {"none": [0, 1]},
    }
    with pytest.raises(ConfigError, match="model.quantization: without effect, because no linear"):
        check(parse(run_config | {"model": model}, "test"))


def test_a_layer_that_the_model_does_not_have_is_refused(tiny_model: Path) -> None:
    base = ModelPool(ModelConfig(name_or_path=str(tiny_model)), LORA).outline.base
    with pytest.raises(ConfigError, match=r"layer_quantization: layer 2: the model has 2 layers"):
        formats(base, Quantisation(None, ((2, "int8"),)))


def test_bytes_of_a_base() -> None:
    """Equal to the sum by hand for the embedded model, whose head is tied."""
    config = ModelConfig(dtype="float32")
    base = ModelPool(config, LORA).outline.base
    whole = sum(parameter.nbytes for parameter in base.parameters())
    weights = dict(base.named_parameters())
    linear = [weights[f"{name}.weight"] for name in formats(base, Quantisation("nf4"))]
    saved = sum(w.nbytes - stored_bytes("nf4", w.shape[0], w.shape[1]) for w in linear)
    assert quantised_bytes(base, FLOAT) == whole
    assert quantised_bytes(base, Quantisation("nf4")) == whole - saved
    assert stored_bytes("nf4", 64, 64) == 4096 // 2 + 4 * 64
    assert stored_bytes("nf4-double", 64, 64) == 4096 // 2 + 64 + 4 + 4
    assert stored_bytes("int8", 64, 32) == 2048 + 4 * 64


def test_the_check_shows_the_memory(run_config: dict[str, Any]) -> None:
    needs_library()
    table = run_config | {"model": run_config["model"] | {"quantization": "nf4-double"}}
    config = parse(table, "test")
    rows = {row["what"]: row["value"] for row in plan(config)["rows"]}
    plain = {row["what"]: row["value"] for row in plan(parse(run_config, "test"))["rows"]}
    base = ModelPool(config.model, config.adapter).outline.base
    size = quantised_bytes(base, Quantisation("nf4-double"))
    assert rows["base in memory"] == f"{size:,} B; {plain['base in memory']} not quantised"


def test_the_card_says_how_to_load_the_base() -> None:
    words = {
        name: quantised_words(ModelConfig.model_validate(settings))
        for name, settings in {
            "float": {},
            "nf4": {"quantization": "nf4"},
            "double": {"quantization": "nf4-double"},
            "int8": {"quantization": "int8"},
            "mixed": {"quantization": "nf4", "layer_quantization": {"int8": [0]}},
            "corrected": {"quantization": "nf4", "quantization_correction": 4},
        }.items()
    }
    assert words["float"] == ""
    assert "bnb_4bit_use_double_quant=False" in words["nf4"]
    assert "bnb_4bit_use_double_quant=True" in words["double"]
    assert "load_in_8bit=True" in words["int8"]
    assert "several formats" in words["mixed"]
    assert "a correction" in words["corrected"]


QUANTISED = sorted(name for name, method in METHODS.items() if method.traits.quantised)
SETTINGS: dict[str, dict[str, Any]] = {
    "cgfedllm": {
        "method": {"name": "cgfedllm", "tgap": {"rounds": 2}},
        "codec": {"name": "klt", "rate": 8},
    },
    "local": {"method": {"name": "local"}, "evaluate": {}},
    "fedsa": {"method": {"name": "fedsa"}, "evaluate": {}},
}


@pytest.mark.parametrize("name", QUANTISED)
def test_every_method_of_adapters_trains_over_it(
    name: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    needs_library()
    table = with_fitting_model(
        run_config | {"rounds": 1, "method": {"name": name}} | SETTINGS.get(name, {})
    )
    table["model"] = table["model"] | {"quantization": "nf4"}
    result = run_table(table, tmp_path / "run")
    assert result["quantization"] == {"quantization": "nf4"}
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]

    adapter = tmp_path / "run" / "adapter"
    assert adapter.exists() == METHODS[name].traits.exports
    if adapter.exists():
        assert 'bnb_4bit_quant_type="nf4"' in (adapter / "README.md").read_text()
        kept = json.loads((adapter / "fluvial.json").read_text())
        assert kept["model"]["quantization"] == "nf4"
