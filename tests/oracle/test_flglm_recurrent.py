"""Split learning of models whose layers keep other states than keys and values."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.model_kinds import save_kind
from tests.support.models import four_layers
from tests.support.runs import run_table

KINDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "mamba": (["in_proj", "x_proj"], {}),
    "recurrent_gemma": (
        ["q_proj", "up_proj"],
        {"head_dim": 8, "attention_window_size": 16, "lru_width": 32, "num_key_value_heads": 1},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_attacks_are_those_of_the_whole_model(
    kind: str, one_site: dict[str, Any], tmp_path: Path
) -> None:
    targets, changes = KINDS[kind]
    folder = save_kind(kind, tmp_path / kind, num_hidden_layers=4, initializer_range=0.1, **changes)
    for file in four_layers(tmp_path / "llama").glob("tokenizer*"):
        shutil.copy(file, folder)
    table = one_site | {
        "model": {"name_or_path": str(folder)},
        "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": targets},
        "evaluate": {"sample_prompt": "the", "sample_tokens": 8},
    }
    small = {"texts": 2, "tokens": 8}

    split = run_table(table | {"method": {"name": "flglm", "leakage": small}}, tmp_path / "split")
    whole = run_table(table, tmp_path / "whole")

    assert split["samples"] == whole["samples"]
    assert split["heldout"]["final"]["loss"] == pytest.approx(
        whole["heldout"]["final"]["loss"], abs=1e-5
    )
    read = {row["attack"]: row["accuracy"] for row in split["leakage"]["attacks"]}
    assert read["exact causal search"] == 1.0
