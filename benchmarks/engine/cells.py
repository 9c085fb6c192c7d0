"""Cells of `benchmarks.engine`: engine, payload and number of sites, with their configuration."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fluvial.models.pretrained import ModelConfig
from fluvial.models.tokenizers import load_tokenizer

FLEETS = ("local", "ray", "warm", "stock", "nvflare")
NAMES = {
    "local": "in process",
    "ray": "Flower, Ray",
    "warm": "Flower deployed, warm",
    "stock": "Flower deployed, stock",
    "nvflare": "NVFlare 2.9 simulator",
}
SHAPES = ((4, 128), (4, 512), (8, 1024))
"""Layers and hidden size: the package's model, and two with random weights for adapters that it
cannot have."""


def bytes_of_a_rank(shape: tuple[int, int]) -> int:
    """fp32; q, k, v and o of all layers."""
    layers, hidden = shape
    return 4 * 4 * layers * (hidden + hidden)


@dataclass(frozen=True)
class Cell:
    """One measurement: an engine, a payload, and a number of sites."""

    fleet: str
    payload_mb: float
    sites: int
    rounds: int

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and hidden size of the smallest model that an adapter of this size fits."""
        return next(shape for shape in SHAPES if self._rank(shape) <= shape[1])

    @property
    def rank(self) -> int:
        """Rank of the adapter."""
        return self._rank(self.shape)

    @property
    def payload(self) -> int:
        """Bytes of the values that a site is sent, and answers with."""
        return self.rank * bytes_of_a_rank(self.shape)

    def _rank(self, shape: tuple[int, int]) -> int:
        return max(1, round(self.payload_mb * 1e6 / bytes_of_a_rank(shape)))

    def __str__(self) -> str:
        return f"{NAMES[self.fleet]}, {self.payload_mb:g} MB, {self.sites} sites"


def names_of(sites: int) -> list[str]:
    """Return the names of the sites, which are those of the files of their text."""
    return [f"site{number}" for number in range(1, sites + 1)]


def write_text(folder: Path, sites: int) -> Path:
    """Write a file of records for each site, each with its own, into `folder`; return where."""
    text = folder.resolve() / "text"
    text.mkdir(parents=True, exist_ok=True)

    for number, name in enumerate(names_of(sites)):
        stones = [
            f"Site {number} writes line {line}: water flows on, stone {line * 7 + number} stays."
            for line in range(12)
        ]
        lines = [json.dumps({"text": stone}) + "\n" for stone in stones]
        (text / f"{name}.jsonl").write_text("".join(lines))

    return text


def table_of(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return the configuration of a cell; writes the sites' text into `folder`."""
    model = {"dtype": "float32"}
    if cell.shape != SHAPES[0]:
        model["name_or_path"] = str(_model(cell.shape, folder))

    return {
        "model": model,
        "rounds": cell.rounds,
        "lora": {
            "r": cell.rank,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "target_modules": "attention",
        },
        "data": {
            "source": str(write_text(folder, cell.sites)),
            "form": "text",
            "partition": {"by": "file"},
            "max_length": 32,
            "max_heldout": 1,
        },
        "train": {"learning_rate": 5e-3, "per_device_train_batch_size": 1, "max_steps": 1},
        "codec": {"name": "identity"},
        "fleet": {"deadline_s": 600.0},
        "evaluate": {"sample_tokens": 1},
    }


def _model(shape: tuple[int, int], folder: Path) -> Path:
    """Return a Llama with random weights and the package's tokenizer, made once for a folder."""
    layers, hidden = shape
    path = folder.resolve() / f"model-{hidden}"

    if not path.exists():
        tokenizer = load_tokenizer(ModelConfig())
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                intermediate_size=64,
                num_hidden_layers=layers,
                num_attention_heads=8,
                num_key_value_heads=8,
                max_position_embeddings=64,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    return path
