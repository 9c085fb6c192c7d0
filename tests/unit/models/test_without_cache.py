"""A model whose layers all are convolutions, for which transformers makes no cache."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.models.behaviour import makes_cache
from fluvial.models.generation import SHORT
from fluvial.models.streaming import Sampling, stream
from tests.conftest import saved_model
from tests.support.runs import run_table

PROMPT = "1 snow ice"


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    settings = Lfm2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "conv"],
    )
    return saved_model(Lfm2ForCausalLM, settings, tmp_path_factory.mktemp("convolutions"))


def test_it_writes_and_streams_what_it_computes_without_a_cache(convolutions: Path) -> None:
    from transformers import AutoTokenizer, Lfm2ForCausalLM

    from fluvial.models.pool import ModelPool
    from fluvial.models.pretrained import ModelConfig

    model = Lfm2ForCausalLM.from_pretrained(convolutions).eval()
    assert not makes_cache(model)
    tokenizer = AutoTokenizer.from_pretrained(convolutions)
    asked = tokenizer(PROMPT)["input_ids"]
    tokens = list(asked)
    with torch.no_grad():
        for _ in range(SHORT + 1):
            chosen = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()
            tokens.append(int(chosen))

    new = tokens[len(asked) :]
    if tokenizer.eos_token_id in new:
        new = new[: new.index(tokenizer.eos_token_id)]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    pool = ModelPool(ModelConfig(name_or_path=str(convolutions), device="cpu"), None)
    assert pool.generate({}, [PROMPT], max_new_tokens=SHORT + 1) == [expected]
    pieces = stream(model, tokenizer, asked, Sampling(max_new_tokens=SHORT + 1))
    assert "".join(pieces) == expected


def test_a_run_of_it_ends(convolutions: Path, run_config: dict[str, Any], tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": "all-linear"}
    table = run_config | {"rounds": 1, "lora": lora}
    result = run_table(table | {"model": {"name_or_path": str(convolutions)}}, tmp_path / "run")
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]
