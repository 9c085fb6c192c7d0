"""`model.attn_implementation`: it reaches the models that train, and is refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.data import Example
from fluvial.errors import ConfigError
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.seeds import generator
from fluvial.training.config import TrainConfig
from fluvial.training.train import train
from fluvial.wire.tensors import relative_error, subtract

EXAMPLES = [Example([5, 6, 7, 8, 9], [5, 6, 7, 8, 9]), Example([9, 5, 12], [9, 5, 12])]


def models(folder: Path, kind: Any, tuning: LoraSettings | None) -> ModelPool:
    config = ModelConfig(name_or_path=str(folder), device="cpu", attn_implementation=kind)
    return ModelPool(config, tuning)


@pytest.mark.parametrize("tuning", [LoraSettings(r=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_the_setting_reaches_the_model(tiny_model: Path, tuning: Any, kind: str) -> None:
    pool = models(tiny_model, kind, tuning)
    with pool.model(initial_state(pool.layout, 0)) as model:
        inner: Any = model
        assert inner.config._attn_implementation == kind


def test_eager_and_sdpa_train_to_the_same_weights(tiny_gqa_model: Path) -> None:
    trained = []
    for kind in ("eager", "sdpa"):
        pool = models(tiny_gqa_model, kind, LoraSettings(r=4, lora_dropout=0.0))
        start = initial_state(pool.layout, 0)
        with pool.model(start, trainable="A and B") as model:
            # SGD, since AdamW makes steps of the learning rate of gradients that are rounding alone
            report = train(
                model,
                EXAMPLES,
                TrainConfig(learning_rate=0.1, max_steps=3, optim="sgd"),
                pad_token_id=0,
                generator=generator(0),
            )
        trained.append(subtract(report.weights, start))

    # Squared: softmax and products in another order of fp32 sums.
    assert relative_error(*trained) < 1e-9


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("flash_attention_2", "trains on a GPU only, and the device is 'cpu'"),
        ("flash_attention_3", "trains on a GPU only, and the device is 'cpu'"),
        ("flex_attention", "trains on a GPU only, and the device is 'cpu'"),
    ],
)
def test_an_attention_that_this_machine_lacks_is_refused(
    run_config: dict[str, Any], kind: str, why: str
) -> None:
    table = run_config | {
        "model": run_config["model"] | {"attn_implementation": kind, "device": "cpu"}
    }
    with pytest.raises(ConfigError, match=why) as refusal:
        plan(parse(table, "test"))
    assert str(refusal.value).startswith(f"model.attn_implementation={kind!r}: ")
    assert "\n" not in str(refusal.value)


def test_flash_attention_needs_its_package_and_half_precision(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluvial.models import attention

    config = ModelConfig(name_or_path=str(tiny_model), attn_implementation="flash_attention_2")
    device = torch.device("cuda")
    with pytest.raises(ConfigError, match="the package 'flash_attn' is not installed"):
        attention.check_attention(config, device)

    monkeypatch.setattr(attention, "find_spec", lambda _: object())
    with pytest.raises(ConfigError, match="set model.dtype to 'bfloat16' or 'float16'"):
        attention.check_attention(config, device)


def test_an_architecture_without_the_attention_is_refused(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from tests.conftest import saved_model

    settings = BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)
    folder = saved_model(BloomForCausalLM, settings, tmp_path)
    config = ModelConfig(name_or_path=str(folder), device="cpu", attn_implementation="sdpa")
    with pytest.raises(ConfigError, match="does not have it for .bloom.; set another"):
        ModelPool(config, LoraSettings(r=4)).load()


def test_a_kernel_of_the_hub_is_no_attention(run_config: dict[str, Any]) -> None:
    kind = "kernels-community/flash-attn2"
    table = run_config | {"model": run_config["model"] | {"attn_implementation": kind}}
    with pytest.raises(ConfigError, match="attn_implementation"):
        parse(table, "test")
