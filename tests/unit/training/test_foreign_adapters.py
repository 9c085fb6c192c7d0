"""Adapters that PEFT or other tools wrote: measured as PEFT measures them, or refused with the true
cause and the name of the file."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fluvial.errors import ConfigError
from fluvial.models.adapters import adapt
from fluvial.models.loading import meta_base
from fluvial.models.pretrained import ModelConfig
from fluvial.models.targets import LoraSettings
from fluvial.training.folders import read_adapter_folder
from fluvial.training.opened import open_weights

Write = Callable[..., Path]


@pytest.fixture
def write(tiny_model: Path, tmp_path: Path) -> Write:
    """A function that writes an adapter with changed settings, as PEFT does."""

    def written(changes: dict[str, Any] | None = None, **settings: Any) -> Path:
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        usual = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        model = get_peft_model(base, LoraConfig(**(usual | settings)))
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)

        model.save_pretrained(tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (changes or {})))
        return path.parent

    return written


def renamed(folder: Path, *, twice: bool = False) -> None:
    """Write the factors under the names that they have in PEFT's memory."""
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    names = {re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", name): name for name in stored}
    save_file(
        {new: stored[old].clone() for new, old in names.items()} | (stored if twice else {}), path
    )


def test_factors_with_the_name_of_the_adapter_are_measured_as_peft_does(
    write: Write, tiny_model: Path
) -> None:
    folder = write()
    renamed(folder)
    tokens = torch.arange(8)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    pool, state = open_weights(
        read_adapter_folder(folder), ModelConfig(name_or_path=str(tiny_model), device="cpu")
    )
    with torch.no_grad(), pool.model(state) as model:
        before = base(tokens).logits
        expected = PeftModel.from_pretrained(base, folder).eval()(tokens).logits
        assert torch.equal(model(tokens).logits, expected)

    assert not torch.allclose(before, expected)


def test_factors_that_are_stored_twice_are_refused(write: Write) -> None:
    folder = write()
    renamed(folder, twice=True)
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors: holds factors .* twice"):
        read_adapter_folder(folder)


@pytest.mark.filterwarnings(
    "ignore:Model has .tie_word_embeddings=True", "ignore:Setting .save_emb"
)
def test_an_adapted_embedding_is_refused_by_its_name(write: Write) -> None:
    folder = write(target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(
        ConfigError,
        match=r"adapter_config\.json: target_modules adapts the embedding 'model\.embed_tokens'",
    ):
        read_adapter_folder(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target_modules": "*("}, "target_modules is no regular expression: '*('"),
        ({"exclude_modules": "["}, "exclude_modules is no regular expression: '['"),
        ({"rank_pattern": {"+": 2}}, "rank_pattern.+ is no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0, expected a whole number"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object, found [1]"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern.q_proj is '8', expected a finite"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"r": 2.0}, "r is 2.0, expected a whole number above 0"),
        ({"r": -1}, "r is -1, expected a whole number above 0"),
        ({"r": True}, "r is True"),
    ],
)
def test_settings_that_no_adapter_has_are_refused(
    changes: dict[str, Any], told: str, write: Write
) -> None:
    folder = write(changes)
    with pytest.raises(ConfigError, match=re.escape(f"adapter_config.json: {told}")):
        read_adapter_folder(folder)


def test_targets_of_a_run_that_are_no_expression_are_refused(tiny_model: Path) -> None:
    base = meta_base(ModelConfig(name_or_path=str(tiny_model)))
    with pytest.raises(ConfigError, match="lora"):
        adapt(base, LoraSettings(r=2, target_modules=("*(",)))
