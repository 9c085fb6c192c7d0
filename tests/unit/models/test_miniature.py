"""Small random models of a base's architecture: what a base refuses is told without its weights."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.errors import ConfigError
from fluvial.models import miniature as module
from fluvial.models.behaviour import check_packing
from fluvial.models.miniature import check_packing_of_miniature, miniature
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.targets import LoraSettings
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from tests.conftest import saved_model
from tests.support.model_kinds import save_kind


def folder_of(kind: str, tmp_path: Path) -> ModelConfig:
    """Return the settings of a model in its usual size, as far as its config.json tells it."""
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    return ModelConfig(name_or_path=str(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "deepseek_v3", "gemma3_text", "gpt2"])
def test_a_miniature_has_a_layer_of_each_kind_and_leaves_the_random_numbers(
    kind: str, tmp_path: Path
) -> None:
    config = folder_of(kind, tmp_path)
    state = torch.get_rng_state()
    model = miniature(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert model is not None
    assert sum(parameter.numel() for parameter in model.parameters()) < module.VALUES
    settings: Any = model.config
    assert settings.num_hidden_layers == 2
    if kind in ("gpt_oss", "gemma3_text"):
        assert set(settings.layer_types) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize("kind", ["gpt_oss", "opt"])
def test_packing_that_a_base_cannot_have_is_refused_without_its_weights(
    kind: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="lets a packed record read the one before it"):
        check_packing_of_miniature(folder_of(kind, tmp_path))


def test_a_run_refuses_what_check_refuses(tmp_path: Path) -> None:
    """Convolutions read the record before, also where weights are so small that nothing shows."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    settings = Lfm2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
    )
    folder = str(saved_model(Lfm2ForCausalLM, settings, tmp_path / "lfm2"))
    config = ModelConfig(name_or_path=folder, device="cpu")
    pool = ModelPool(config, LoraSettings(r=2, target_modules="attention"))
    with pool.model(pool.base_state()) as model:
        check_packing(model, folder)  # the weights alone do not tell
    for check in (partial(check_packing_of_miniature, config), pool.check_packing):
        with pytest.raises(ConfigError, match="lets a packed record read the one before it"):
            check()


def test_a_base_without_a_miniature_is_not_judged(tmp_path: Path) -> None:
    """Sizes of another kind, and an attention that a CPU does not have."""
    config = folder_of("jamba", tmp_path / "jamba")
    assert not check_packing_of_miniature(config)
    llama = folder_of("llama", tmp_path / "llama")
    assert check_packing_of_miniature(llama)
    flash = llama.model_copy(update={"attn_implementation": "flash_attention_2"})
    assert not check_packing_of_miniature(flash)


def test_check_refuses_packing_or_says_when_it_is_measured(
    run_config: dict[str, Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = run_config | {"data": run_config["data"] | {"packing": True}}
    words = "data.packing: a run measures at its start"
    assert not any(note.startswith(words) for note in plan(parse(table, "test"))["notes"])
    with monkeypatch.context() as changed:
        changed.setattr(module, "VALUES", 1)
        assert any(note.startswith(words) for note in plan(parse(table, "test"))["notes"])
        assert not any(words in note for note in plan(parse(run_config, "test"))["notes"])

    folder = save_kind("gpt_oss", tmp_path / "gpt_oss")
    tokenizer.save_pretrained(folder)
    wrong = table | {"model": {"name_or_path": str(folder), "device": "cpu"}}
    with pytest.raises(ConfigError, match="GptOssForCausalLM .* lets a packed record read"):
        plan(parse(wrong, "test"))
