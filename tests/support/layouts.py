"""Layouts of models by architecture, without weights."""

from typing import Any

import torch

from fluvial.methods.fedcybgd.blocks import Partition
from fluvial.models.tuning import tuned_layout
from fluvial.wire.tensors import Layout

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GLM = TINY | {"head_dim": 8}

GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 12,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
}

LLAMA_2_7B = TINY | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}

LLAMA_3_8B = LLAMA_2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", TINY),
    "llama tied": ("LlamaConfig", TINY | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", TINY),
    "mistral": ("MistralConfig", TINY),
    "gpt2": ("GPT2Config", GPT2 | {"eos_token_id": 2}),
    "glm": ("GlmConfig", GLM),
    "glm4": ("Glm4Config", GLM),
}

TIED = {"llama tied", "gpt2"}


def meta(kind: str, settings: dict[str, Any]) -> Any:
    """A model without weights."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, kind)(**settings)
        )

    return model.requires_grad_(False)


def layout_of(family: str) -> Layout:
    return tuned_layout(meta(*MODELS[family]), None)


def named(**shapes: tuple[int, ...]) -> Layout:
    return Layout(tuple(sorted((name.replace("__", "."), shape) for name, shape in shapes.items())))


def stack(prefix: str, layers: int) -> Layout:
    """Hand-made names: `layers` layers of six values, and one vector beside them."""
    names = [
        (f"{prefix}{layer}.{leaf}", (3,))
        for layer in range(layers)
        for leaf in ("mlp.weight", "norm.weight")
    ]
    return Layout(tuple(sorted([*names, ("beside.weight", (5,))])))


def block_of(parts: Partition) -> dict[str, int]:
    """Return the block of every parameter that has one."""
    return {name: index for index, block in enumerate(parts.blocks) for name in block.layout.names}


def assert_parts(parts: Partition, layout: Layout) -> None:
    """Disjoint, covering, in the layout's order, and `block_of` says the same."""
    found = [entry for block in parts.blocks for entry in block.layout.shapes] + list(
        parts.fixed.shapes
    )
    assert sorted(found) == list(layout.shapes)

    for block in parts.blocks:
        assert block.numel == block.layout.numel > 0
        assert list(block.layout.names) == sorted(block.layout.names)

    assert {name: parts.blocks[index].name for name, index in block_of(parts).items()} == {
        name: block.name for block in parts.blocks for name in block.layout.names
    }
    assert sum(block.numel for block in parts.blocks) + parts.fixed.numel == layout.numel
