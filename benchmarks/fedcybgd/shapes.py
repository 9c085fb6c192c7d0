"""Shapes of models, and random models of these shapes."""

import json
import shutil
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluvial.wire.tensors import Layout


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = True


SMALL = Shape(hidden=32, intermediate=64, layers=2, heads=2, key_value_heads=2, vocabulary=2048)
FULL = Shape(
    hidden=768, intermediate=2048, layers=12, heads=12, key_value_heads=12, vocabulary=8000
)
QUICK = replace(
    FULL, hidden=384, intermediate=1024, layers=6, heads=6, key_value_heads=6, vocabulary=2048
)


def llama(shape: Shape, **more: Any) -> Any:
    """Return the configuration of a model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=shape.tied,
        **more,
    )


def layout_of(shape: Shape) -> "Layout":
    """All parameters, by way of the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from fluvial.models.tuning import tuned_layout

    with torch.device("meta"):
        return tuned_layout(AutoModelForCausalLM.from_config(llama(shape)), None)


# -- a visit, in a process of its own ------------------------------------------------------------


def write_model(folder: Path, shape: Shape, dtype: str) -> None:
    """Write a random model, one file for a tensor, so that it is never held; with the embedded
    model's tokenizer."""
    import torch
    from safetensors.torch import save_file

    llama(shape, dtype=dtype).save_pretrained(folder)

    for name in ("tokenizer.json", "tokenizer_config.json"):
        with resources.as_file(resources.files("fluvial") / "assets" / "tiny" / name) as path:
            shutil.copy(path, folder / name)

    draw = torch.Generator().manual_seed(0)
    files = {}
    for name, size in layout_of(shape).shapes:
        files[name] = f"{name}.safetensors"
        values = 0.02 * torch.randn(size, generator=draw) if len(size) > 1 else torch.ones(size)
        save_file({name: values.to(getattr(torch, dtype))}, folder / files[name])

    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )
