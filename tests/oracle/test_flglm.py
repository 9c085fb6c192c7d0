"""Split learning is the training of the whole model: equalities with FedAvg and with one place."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fluvial.data import SiteTexts
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.runs.config import parse
from fluvial.seeds import generator
from fluvial.training.train import train
from fluvial.wire.tensors import Named, norm, subtract
from tests.support.models import UNMEASURED, four_layers
from tests.support.runs import adapter_of, run_table, run_with_stops
from tests.support.weights import read_weights

CLOSE = 1e-4
"""Of the update's norm, for fp32 sums in another order (of padded positions, of a batch): 20 steps
of AdamW carry a difference of 1e-7 on."""
HARD = {"weight_decay": 0.1, "max_grad_norm": 0.05, "gradient_accumulation_steps": 2}
"""Settings that show a wrong norm, since every step is clipped, and a wrong batch."""


@pytest.fixture
def table(run_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run of two rounds over three sites of unequal size, on a model of four layers."""
    return run_config | {
        "model": {"name_or_path": str(four_layers(tmp_path / "model"))},
        "train": run_config["train"] | HARD,
    }


def flglm(table: dict[str, Any], folder: Path, **settings: Any) -> dict[str, Any]:
    return run_table(table | {"method": UNMEASURED | settings}, folder)


def start_of(table: dict[str, Any]) -> Named:
    config = parse(table, "test")
    return initial_state(ModelPool(config.model, config.adapter).layout, config.seed)


def assert_same(one: Named, other: Named, start: Named) -> None:
    """Assert that both are one update from `start`."""
    step = norm(subtract(other, start))
    assert step > 0
    assert norm(subtract(one, other)) < CLOSE * step


@pytest.mark.parametrize(("front", "back"), [(1, 1), (2, 1), (1, 2), (0, 1), (0, 0)])
def test_hierarchical_is_fedavg(
    table: dict[str, Any], tmp_path: Path, front: int, back: int
) -> None:
    """Replicas of B, averaged with A and C at the end of a round: FedAvg of the whole model, with
    the same dropout."""
    table = table | {"evaluate": {"sample_prompt": "the", "sample_tokens": 8}}
    split = flglm(table, tmp_path / "split", mode="hierarchical", front=front, back=back)
    whole = run_table(table, tmp_path / "whole")
    assert_same(adapter_of(split), adapter_of(whole), start_of(table))
    assert split["heldout"]["final"]["loss"] == pytest.approx(
        whole["heldout"]["final"]["loss"], abs=1e-5
    )
    assert split["samples"] == whole["samples"]
    assert split["heldout"]["base"]["loss"] == pytest.approx(
        whole["heldout"]["base"]["loss"], abs=1e-5
    )


@pytest.mark.parametrize("mode", ["sequential", "hierarchical", "client-batch"])
def test_one_site_is_plain_local_training(
    one_site: dict[str, Any], table: dict[str, Any], tmp_path: Path, mode: str
) -> None:
    """With one site, every mode is the training loop on the whole model."""
    lora = {"r": 4, "lora_dropout": 0.0}  # in a client batch B has masks of its own
    alone = table | {"data": one_site["data"], "lora": lora}
    split = flglm(alone, tmp_path / "split", mode=mode)
    whole = run_table(alone, tmp_path / "whole")
    assert_same(adapter_of(split), adapter_of(whole), start_of(alone))


def test_sequential_is_one_training_after_another(table: dict[str, Any], tmp_path: Path) -> None:
    """Site after site, each from what the one before it left."""
    once = table | {"rounds": 1}
    split = flglm(once, tmp_path / "split", mode="sequential")
    config = parse(once, "test")
    pool = ModelPool(config.model, config.lora)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    state = start = start_of(once)

    for name in texts.names:
        with pool.model(state, trainable="A and B") as model:
            train(
                model,
                texts.load(name).train,
                config.train,
                pad_token_id=pool.tokenizer.pad_token_id,
                generator=generator(config.seed, "train", 1, name),
            )
            state = read_weights(model)

    assert_same(adapter_of(split), state, start)


def full_batches(table: dict[str, Any], **train: Any) -> dict[str, Any]:
    """The same run in steps on all data, so that the union of the sites' batches is one batch."""
    return table | {
        "rounds": 1,
        "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": "attention"},
        "train": HARD
        | {"gradient_accumulation_steps": 1, "learning_rate": 1e-2}
        | {"per_device_train_batch_size": 512, "num_train_epochs": 6}
        | train,
    }


@pytest.mark.parametrize(("front", "back"), [(1, 1), (0, 0)])
def test_a_client_batch_is_one_batch(
    table: dict[str, Any], tmp_path: Path, front: int, back: int
) -> None:
    """Sites of unequal size with unequal texts, six steps of AdamW under one norm of the whole
    gradient: the same as steps on the union of their data."""
    together = full_batches(table)
    split = flglm(together, tmp_path / "split", front=front, back=back)
    whole = run_table(together | {"method": {"name": "central"}}, tmp_path / "whole")
    assert_same(adapter_of(split), adapter_of(whole), start_of(together))


def test_averages_after_every_step_of_sgd_are_a_client_batch(
    table: dict[str, Any], tmp_path: Path
) -> None:
    """With tau = 1, the mean of the sites' steps is the step of their mean gradient."""
    sgd = full_batches(table, optim="sgd", max_grad_norm=0.0, learning_rate=0.5)
    batch = flglm(sgd, tmp_path / "batch")
    averaged = flglm(sgd, tmp_path / "averaged", mode="hierarchical", sync_steps=1)
    assert_same(adapter_of(averaged), adapter_of(batch), start_of(sgd))


def test_all_weights_are_split_too(table: dict[str, Any], tmp_path: Path) -> None:
    """The whole model's own weights, embedding and head among them, as under FedAvg."""
    full = {name: value for name, value in table.items() if name != "lora"} | {"tune": "full"}
    split = flglm(full, tmp_path / "split", mode="hierarchical")
    whole = run_table(full, tmp_path / "whole")
    one, other, base = (
        load_file(folder / "model.safetensors")
        for folder in (
            tmp_path / "split/model",
            tmp_path / "whole/model",
            Path(table["model"]["name_or_path"]),
        )
    )
    assert split["model_sha256"]
    assert whole["model_sha256"]
    assert_same(one, other, base)


@pytest.mark.parametrize("mode", ["sequential", "hierarchical", "client-batch"])
@pytest.mark.parametrize("ends", ["shared", "own"])
def test_resume_is_a_straight_run(
    table: dict[str, Any], tmp_path: Path, mode: str, ends: str
) -> None:
    """Stop after every event in turn, throw all objects away, and go on: the same bits."""
    table = table | {"method": UNMEASURED | {"mode": mode, "ends": ends}}
    straight = run_table(table, tmp_path / "straight")
    result = run_with_stops(table, tmp_path / "stopped", (1, 2, 99))
    for key in ("adapter_sha256", "heldout", "bytes"):
        assert result[key] == straight[key]
    assert (straight["adapter_sha256"] is None) == (ends == "own")
