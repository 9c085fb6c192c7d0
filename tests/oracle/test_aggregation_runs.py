"""Runs of federated LoRA under each mode of `method.aggregation`."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fluvial.errors import ConfigError
from fluvial.federation.adapters.whole import modules_of, read_factors
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.runs.run import execute
from fluvial.wire.tensors import Named
from tests.support.runs import adapter_of, run_table

pytestmark = pytest.mark.oracle

MODES: list[dict[str, Any]] = [
    {"mode": "ab-mean", "measure": "always"},
    {"mode": "pad"},
    {"mode": "svd"},
    {"mode": "stack"},
    {"mode": "residual"},
]
EXACT = 1e-5


def table_of(run_config: dict[str, Any], aggregation: dict[str, Any]) -> dict[str, Any]:
    return run_config | {"method": {"name": "fedavg", "aggregation": aggregation}}


def products(adapter: Named) -> dict[str, Tensor]:
    """The change of each weight, dense."""
    factors = {module: read_factors(adapter, module) for module in modules_of(adapter)}
    return {module: product.left @ product.right for module, product in factors.items()}


def distance(one: Named, other: Named) -> float:
    """Relative distance of all products."""
    left, right = products(one), products(other)
    assert left.keys() == right.keys()
    apart = math.fsum(float((left[name] - right[name]).square().sum()) for name in left)
    return math.sqrt(apart / math.fsum(float(each.square().sum()) for each in left.values()))


@pytest.mark.parametrize("aggregation", MODES, ids=lambda each: each["mode"])
def test_a_run_learns_and_says_what_the_aggregate_lost(
    aggregation: dict[str, Any], run_config: dict[str, Any], tmp_path: Path
) -> None:
    result = run_table(table_of(run_config, aggregation) | {"rounds": 3}, tmp_path / "run")
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]

    for record in RunFolder(tmp_path / "run").metrics():
        by_module = record["aggregation_error_by_module"]
        assert record["aggregation_error"] == pytest.approx(
            sum(by_module.values()) / len(by_module)
        )
        assert record["retained_energy"] <= 1
        if aggregation["mode"] in ("stack", "residual"):  # 3 sites of rank 4 fit into 32
            assert record["aggregation_error"] < EXACT
        else:
            assert 0 < record["aggregation_error"] < 1


def test_modes_that_lose_nothing_have_one_product(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """After one round from one start, stack and residual are the exact mean; svd is its best
    approximation; the mean of the factors is farther from it."""
    ends = {
        each["mode"]: adapter_of(
            run_table(table_of(run_config, each) | {"rounds": 1}, tmp_path / each["mode"])
        )
        for each in MODES
    }
    assert distance(ends["stack"], ends["residual"]) < EXACT
    assert distance(ends["stack"], ends["svd"]) < distance(ends["stack"], ends["ab-mean"])


def test_one_site_is_itself_in_every_mode(one_site: dict[str, Any], tmp_path: Path) -> None:
    ends = [
        adapter_of(run_table(table_of(one_site, each) | {"rounds": 1}, tmp_path / each["mode"]))
        for each in MODES
    ]
    for other in ends[1:]:
        assert distance(ends[0], other) < EXACT


def test_a_measure_changes_no_weight(run_config: dict[str, Any], tmp_path: Path) -> None:
    plain = run_table(run_config, tmp_path / "plain")
    measured = run_table(table_of(run_config, MODES[0]), tmp_path / "measured")
    assert measured["adapter_sha256"] == plain["adapter_sha256"]
    assert "aggregation_error" not in RunFolder(tmp_path / "plain").metrics()[0]


@pytest.mark.parametrize("mode", ["svd", "stack"])
def test_a_resumed_run_is_a_straight_one(
    mode: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = table_of(run_config, {"mode": mode}) | {
        "rounds": 3,
        "codec": {"name": "int8", "error_feedback": True},
    }
    straight = run_table(table, tmp_path / "straight")
    config = parse(table, "test")
    resume = False
    for _ in range(config.rounds + 2):
        event = next(execute(config, tmp_path / "stopped", resume=resume))
        resume = True

    assert event.kind == "result"
    assert event.values["adapter_sha256"] == straight["adapter_sha256"]
    assert event.values["heldout"] == straight["heldout"]


def test_ffa_is_fedavg_of_b(run_config: dict[str, Any], tmp_path: Path) -> None:
    method = {"name": "fedavg", "factors": "B"}
    plain = adapter_of(run_table(run_config | {"method": method}, tmp_path / "plain"))
    ffa = run_table(
        run_config | {"method": method | {"aggregation": {"mode": "ffa"}}}, tmp_path / "ffa"
    )
    assert distance(plain, adapter_of(ffa)) < EXACT
    assert all(
        record["aggregation_error"] < EXACT for record in RunFolder(tmp_path / "ffa").metrics()
    )


def test_a_written_adapter_has_the_whole_change(
    run_config: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    """PEFT reads the folder, with its larger ranks and its scale, as the run measured it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from fluvial.models.pool import ModelPool

    table = table_of(run_config, {"mode": "stack"})
    result = run_table(table, tmp_path / "run")
    state = adapter_of(result)
    config = parse(table, "test")
    assert config.lora is not None
    assert min(state[name].shape[0] for name in state if ".lora_A." in name) > config.lora.r

    base = AutoModelForCausalLM.from_pretrained(config.model.name_or_path).eval()
    model = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    pool = ModelPool(config.model, config.lora)
    with torch.no_grad(), pool.model(state) as own:
        assert torch.allclose(model(input_ids=ids).logits, own(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"method": {"name": "fedavg", "aggregation": {"mode": "ffa"}}}, "set factors='B'"),
        (
            {"method": {"name": "fedavg", "factors": "B", "aggregation": {"mode": "svd"}}},
            "changes A",
        ),
        (
            {
                "method": {
                    "name": "fedavg",
                    "server_learning_rate": 1.5,
                    "aggregation": {"mode": "svd"},
                }
            },
            "server_learning_rate: without effect",
        ),
        (
            {"method": {"name": "fedavg", "aggregation": {"absent": "count"}}},
            "aggregation.absent: without effect",
        ),
        (
            {"method": {"name": "fedavg", "aggregation": {"mode": "svd"}}, "tune": "full"},
            "all weights are tuned",
        ),
        (
            {
                "method": {"name": "fedavg", "aggregation": {"mode": "stack"}},
                "codec": {"name": "klt", "rate": 8},
            },
            "learns from updates of one layout",
        ),
    ],
)
def test_an_aggregation_that_cannot_be_is_refused(
    change: dict[str, Any], place: str, run_config: dict[str, Any]
) -> None:
    table = run_config | change
    if "tune" in table:
        table = {key: value for key, value in table.items() if key != "lora"}
    with pytest.raises(ConfigError, match=place):
        plan(parse(table, "test"))
