"""Folders of tiny models that several files of tests share."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.conftest import saved_model


def four_layers(folder: Path, **changes: Any) -> Path:
    """Folder of a random Llama with four layers, whose weights are large enough for all of them to
    matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    return saved_model(LlamaForCausalLM, LlamaConfig(**(settings | changes)), folder)


@cache
def _shared_folder() -> tempfile.TemporaryDirectory[str]:
    """Folder of models that all tests of a process share, removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="fluvial-models-")


@cache
def shared_four_layers(**changes: Any) -> Path:
    """Folder of the model of `four_layers` for all tests of a process, which may not change it."""
    name = "_".join(["four_layers", *(f"{key}_{value}" for key, value in changes.items())])
    return four_layers(Path(_shared_folder().name) / name, **changes)


UNMEASURED: dict[str, Any] = {"name": "flglm", "leakage": {"sites": "none"}}
"""FL-GLM without the meter of its leakage, which takes as long as the rest of a small run."""


def unmeasured(table: dict[str, Any]) -> dict[str, Any]:
    """Return `table` without FL-GLM's meter of leakage, unless the table says something of it."""
    method = table.get("method", {})
    return table | {"method": UNMEASURED | method} if method.get("name") == "flglm" else table


def with_fitting_model(table: dict[str, Any]) -> dict[str, Any]:
    """Return `table` with a model that its method can train: one of four layers where it is cut in
    three, else that of the table."""
    if table.get("method", {}).get("name") != "flglm":
        return table
    return table | {"model": {"name_or_path": str(shared_four_layers())}}
