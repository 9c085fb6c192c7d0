"""Fed-SB: R alone is trained and sent, its mean is exact, and the basis is that of a full step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fluvial.data import SiteTexts
from fluvial.errors import ConfigError, WireError
from fluvial.federation.sites import factor_layout
from fluvial.federation.store import StateStore
from fluvial.methods.fedsb import Basis, first_step, keep_basis
from fluvial.models.pool import ModelPool
from fluvial.models.square import (
    gradients_of_weights,
    left_name,
    multiplied,
    square_name,
    squares_trained,
)
from fluvial.models.states import initial_state
from fluvial.models.tuning import tuned_parameters
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import site_of
from fluvial.runs.plan import plan
from fluvial.runs.run import Run
from fluvial.training.train import collate, predictions, summed_loss
from tests.support.runs import adapter_of, run_table, run_with_stops

FEDSB = {"method": {"name": "fedsb", "samples": 8}}


def opened(table: dict[str, Any]) -> tuple[RunConfig, ModelPool, SiteTexts]:
    config = parse(table, "test")
    pool = ModelPool(config.model, config.lora)
    return config, pool, SiteTexts(config.data, pool.tokenizer, seed=config.seed)


def backward(model: Any, examples: Any) -> None:
    """Add the gradients of the summed loss of `examples`, one by one."""
    for example in examples:
        loss: Any = summed_loss(*predictions(model, collate([example], 0)))
        loss.backward()


def test_gradients_of_weights_are_those_of_torch(run_config: dict[str, Any]) -> None:
    """The base with all weights trained, by transformers alone."""
    config, pool, texts = opened(run_config)
    examples = texts.load("north").train[:3]
    with (
        pool.model(pool.base_state(), trainable="A and B") as model,
        gradients_of_weights(model) as gradients,
    ):
        backward(model, examples)

    base = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    backward(base.eval(), examples)

    assert gradients
    for name, gradient in gradients.items():
        weight = base.get_submodule(name.partition(".lora_A.")[0]).weight
        # fp32 sums over tokens in another order
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-5)


def test_at_full_rank_the_start_is_the_whole_first_step(run_config: dict[str, Any]) -> None:
    """The scaled product of B, R and A is -step times the sign of each gradient."""
    table = run_config | {"lora": {"r": 32, "lora_alpha": 64, "target_modules": ["q_proj"]}}
    _, pool, texts = opened(table)
    examples = texts.load("north").train[:3]
    fixed, start = first_step(pool, pool.layout, examples, 1e-3)
    adapter = multiplied(fixed, start)
    with (
        pool.model(pool.base_state(), trainable="A and B") as model,
        gradients_of_weights(model) as gradients,
    ):
        backward(model, examples)

    for name, gradient in gradients.items():
        change = 2.0 * adapter[left_name(name)] @ adapter[name]
        torch.testing.assert_close(change, -1e-3 * gradient.sign(), rtol=1e-4, atol=1e-7)


def test_r_is_trained_as_in_the_product(run_config: dict[str, Any]) -> None:
    """A model with R inside has the logits of the LoRA adapter B R, and gradients B' G A'."""
    _, pool, texts = opened(run_config)
    fixed, start = first_step(pool, pool.layout, texts.load("south").train[:4], 0.5)
    adapter = multiplied(fixed, start)
    examples = texts.load("north").train[:2]
    batch = collate(examples, 0)
    with pool.model(adapter, trainable="B") as model:
        whole = predictions(model, batch)[0]
        backward(model, examples)
        of_b = {
            name: tensor.grad.clone()
            for name, tensor in tuned_parameters(model).items()
            if tensor.grad is not None
        }

    with pool.model(adapter) as model:
        before = tuned_parameters(model)
        with squares_trained(model, fixed, start):
            inside = predictions(model, batch)[0]
            backward(model, examples)
            of_r = {name: tensor.grad for name, tensor in tuned_parameters(model).items()}
        assert tuned_parameters(model) == before
        after = predictions(model, batch)[0]

    torch.testing.assert_close(inside, whole)  # B (R x) and (B R) x round apart
    assert torch.equal(after, whole)
    assert of_r.keys() == start.keys()
    for name in fixed:
        if ".lora_A." in name:
            expected = fixed[left_name(name)].T @ of_b[left_name(name)]
            torch.testing.assert_close(of_r[square_name(name)], expected, rtol=1e-3, atol=1e-5)


def test_the_mean_of_r_is_the_mean_of_the_products(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The exported adapter has the fixed A, and B R for the weighted mean of what sites sent."""
    config, pool, texts = opened(run_config | {"rounds": 1} | FEDSB)
    sent: dict[str, Any] = {}
    with RunFolder(tmp_path / "run") as place:
        run = Run(config, place, pool, texts)
        server: Any = run.server
        exchange = server.exchange.updates

        def recorded(*args: Any, **named: Any) -> Any:
            for update in exchange(*args, **named):
                sent[update.site] = update
                yield update

        server.exchange.updates = recorded
        *_, last = run.events()

    fixed, start = server.basis.fixed, server.basis.start
    exported = adapter_of(last.values | {"folder": str(tmp_path / "run")})
    total = sum(update.weight for update in sent.values())
    assert len(sent) == 3
    for name in fixed:
        if ".lora_A." not in name:
            continue
        assert torch.equal(exported[name], fixed[name])
        square = square_name(name)
        products = [
            update.weight * (fixed[left_name(name)] @ (start[square] + update.tensors[square]))
            for update in sent.values()
        ]
        # sums of fp32 in another order
        torch.testing.assert_close(
            exported[left_name(name)], sum(products) / total, rtol=1e-4, atol=1e-6
        )


def test_it_learns_with_few_bytes(run_config: dict[str, Any], tmp_path: Path) -> None:
    table = run_config | {"train": run_config["train"] | {"learning_rate": 0.05}}
    whole = run_table(table, tmp_path / "fedavg")["bytes"]["by_kind"]
    result = run_table(table | FEDSB, tmp_path / "fedsb")
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"] - 0.01
    for way in ("up train", "down train"):
        assert result["bytes"]["by_kind"][way] < 0.25 * whole[way]
    assert result["bytes"]["by_kind"]["down basis"] > whole["down train"] / 3


def test_resume_is_a_straight_run(run_config: dict[str, Any], tmp_path: Path) -> None:
    table = run_config | FEDSB | {"rounds": 3}
    table |= {"codec": {"name": "int4", "error_feedback": True}, "downlink": {"name": "int8"}}
    straight = run_table(table, tmp_path / "straight")
    result = run_with_stops(table, tmp_path / "stopped", (1, 2, 2, 99))
    assert result["adapter_sha256"] == straight["adapter_sha256"]
    assert result["bytes"] == straight["bytes"]


def test_a_site_that_lost_the_basis_is_sent_it_again(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    config, pool, texts = opened(run_config | FEDSB)
    with RunFolder(tmp_path / "run") as place:
        run = Run(config, place, pool, texts)
        for event in run.events():
            if event.kind == "round" and event.values["round"] == 1:
                for path in (tmp_path / "run" / "sites" / "north").glob("basis-*"):
                    path.unlink()
    straight = run_table(run_config | FEDSB, tmp_path / "straight")
    assert event.values["adapter_sha256"] == straight["adapter_sha256"]
    assert event.values["bytes"]["down"] > straight["bytes"]["down"]


@pytest.mark.parametrize("wrong", ["A", "B", "R"])
def test_a_basis_of_another_shape_is_refused_and_not_kept(
    run_config: dict[str, Any], wrong: str
) -> None:
    """What a site reads from a server that is wrong or hostile."""
    config, pool, texts = opened(run_config | FEDSB)
    site = site_of(config, "north", pool, texts, StateStore(None))
    basis = Basis()
    basis.fixed = initial_state(pool.layout, 0)
    basis.start = initial_state(factor_layout(pool.layout, "R"), 0)
    assert keep_basis(site, basis.message()).tensors == {}
    site.kept.clear()

    for part in (basis.fixed, basis.start):
        for name, tensor in part.items():
            if f".lora_{wrong}." in name or (wrong == "R" and part is basis.start):
                part[name] = torch.cat([tensor, tensor[:1]])
    with pytest.raises(WireError):
        keep_basis(site, basis.message())
    assert not site.kept


def test_a_codec_that_learns_is_refused(run_config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="which method 'fedsb' does not collect"):
        plan(parse(run_config | FEDSB | {"codec": {"name": "klt"}}, "test"))
