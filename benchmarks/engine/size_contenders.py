"""Models and contenders of part `size` of `benchmarks.engine`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.codecs.contenders import CONTENDERS as ALL
from benchmarks.codecs.contenders import Contender
from fluvial.codecs import must_learn
from fluvial.models.cpu_types import SLOW, times_slower
from fluvial.models.pretrained import ModelConfig
from fluvial.models.tokenizers import load_tokenizer
from fluvial.runs.config import parse

Table = dict[str, Any]
NAMES = (
    "uncompressed",
    "int8, both ways",
    "nf4, both ways",
    "trellis 1/64 + EF",
    "trellis 1/64 + EF, down trellis 1/32",
    "hadamard 1/64 + EF, down hadamard 1/32",
    "powersgd 1/64 + EF, both ways",
    "top_k 1/64 + EF",
)
"""Contenders of `bytes_to_target` that are measured, in the order of their importance."""
_TRELLIS = {"name": "trellis", "rate": 142, "error_feedback": True}
_SMALL = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
_BUDGET_SCALE = _SMALL | {"lora_alpha": 16}
"""The bed of `benchmarks.budget` has alpha 16 at every rank."""
BUDGET = "budget: r 2, trellis 1/142"
"""Choice of `benchmarks.budget`, with the scale of rank 8."""
CONTENDERS = (
    *(contender for name in NAMES for contender in ALL if contender.name == name),
    Contender(BUDGET, "ours", _TRELLIS, lora=_SMALL),
    Contender(
        f"{BUDGET}, down trellis 1/32",
        "ours",
        _TRELLIS,
        {"name": "trellis", "rate": 32},
        lora=_SMALL,
    ),
    Contender("uncompressed, r 2", "reference", {"name": "identity"}, lora=_SMALL),
    Contender("nf4, both ways, r 2", "published", {"name": "nf4"}, {"name": "nf4"}, lora=_SMALL),
    Contender(
        "budget of time: r 2, alpha 16, int4, down nf4",
        "ours",
        {"name": "int4", "error_feedback": True},
        {"name": "nf4"},
        lora=_BUDGET_SCALE,
    ),
    Contender(
        "nf4, both ways, r 2, alpha 16",
        "published",
        {"name": "nf4"},
        {"name": "nf4"},
        lora=_BUDGET_SCALE,
    ),
    Contender(
        "powersgd 1/64 + EF, both ways, r 2, alpha 16",
        "published",
        {"name": "powersgd", "rate": 64, "error_feedback": True},
        {"name": "powersgd", "rate": 64},
        lora=_BUDGET_SCALE,
    ),
    Contender("auto at 20 Mbit/s", "ours", {"name": "auto", "uplink_mbps": 20}),
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 model."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int | None
    """Rows of the embedding; None for those of the tokenizer."""


QWEN = Shape("Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151936)
TINY = Shape("two small layers", 64, 2, 4, 2, 128, None)


def make_model(shape: Shape, folder: Path) -> Path:
    """Return a model of that shape with random weights in bfloat16 and the embedded model's
    tokenizer."""
    path = folder.resolve() / "model"
    tokenizer = load_tokenizer(ModelConfig())
    config = Qwen2Config(
        vocab_size=shape.vocabulary or len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        Qwen2ForCausalLM(config).save_pretrained(path)
    finally:
        torch.set_default_dtype(before)
    tokenizer.save_pretrained(path)

    return path


def float_type() -> str:
    """Return the float type in which sites compute: that of the weights, or float32 on a CPU that
    is slow in it, where a step would hide everything else."""
    return "float32" if times_slower(torch.bfloat16) >= SLOW else "bfloat16"


def table_of(contender: Contender, model: Path, text: Path, *, rounds: int, steps: int) -> Table:
    """Return the configuration of a contender's run; a codec that learns has a short
    pre-training on public text, which only its set-up shows."""
    table: Table = {
        "model": {"name_or_path": str(model), "dtype": float_type()},
        "rounds": rounds,
        "lora": {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.0} | contender.lora,
        "data": {
            "source": str(text),
            "public_source": str(text),
            "form": "text",
            "partition": {"by": "file"},
            "max_length": 32,
            "max_heldout": 1,
        },
        "train": {"learning_rate": 5e-4, "per_device_train_batch_size": 1, "max_steps": steps},
        "method": contender.method,
        "codec": contender.codec,
        "fleet": {"deadline_s": 600.0},
        "evaluate": {"sample_tokens": 1},
    }
    table |= {} if contender.downlink is None else {"downlink": contender.downlink}
    if must_learn(parse(table, contender.name).coding):
        tgap = {"source": "public", "rounds": 2, "simulated_sites": 2}
        table["method"] = {**contender.method, "tgap": tgap}
    else:
        del table["data"]["public_source"]

    return table
