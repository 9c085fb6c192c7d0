"""Folders of tiny models that several files of tests share."""

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
