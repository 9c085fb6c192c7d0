"""Tiny models of several architectures whose layers and units can be dropped."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluvial.data import Example
from fluvial.methods.fedcybgd.proxy import (
    Anatomy,
    Layer,
    Manifest,
    ProxySettings,
    Prunable,
    Prune,
    Scores,
    cut,
    measure,
    plan_proxy,
    slim,
)
from fluvial.methods.fedcybgd.proxy.manifest import heads_of
from fluvial.models.loading import load_base, skeleton
from fluvial.models.pretrained import ModelConfig
from fluvial.wire.tensors import Named
from tests.conftest import saved_model

LAYERS = 6

BOTH: Prune = "neurons and heads"

WHOLE = ProxySettings(kept=1, drop=0)

TOKENS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(5))

_COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_OF_KIND: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "gqa": {"num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True},
    "qwen2": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 3,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "glm": {"num_key_value_heads": 2, "head_dim": 8},
    "glm4": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {},
}


@dataclass
class Tiny:
    """A random model of a kind, whole, with the scores of a few random sequences."""

    folder: Path
    model: nn.Module
    weights: Named

    def measured(self, prune: Prune) -> tuple[Anatomy, Scores]:
        anatomy = Anatomy.of(self.model, prune)
        return anatomy, measure(self.model, anatomy, EXAMPLES, pad_token_id=0, moments=True)

    def plan(
        self, settings: ProxySettings, *trained: int, seed: int = 0, visit: int = 0
    ) -> Manifest:
        anatomy, scores = self.measured(settings.prune)
        return plan_proxy(
            scores, anatomy, trained=trained, settings=settings, seed=seed, visit=visit
        )

    def empty(self) -> nn.Module:
        return skeleton(ModelConfig(name_or_path=str(self.folder), device="cpu"))

    def slim(self, manifest: Manifest) -> nn.Module:
        return filled(slim(self.empty(), manifest), cut(self.weights, manifest))


EXAMPLES = [
    Example(tokens, tokens) for length in (5, 12, 9) for tokens in [TOKENS[0, :length].tolist()]
]


def model_class(kind: str) -> tuple[Any, Any]:
    import transformers

    name = {"gqa": "Llama", "gpt2": "GPT2"}.get(kind, kind.capitalize())
    head = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    return getattr(transformers, f"{name}Config"), getattr(transformers, name + head)


def make(kind: str, folder: Path, layers: int = LAYERS, **changes: Any) -> Tiny:
    config, model = model_class(kind)
    settings = _COMMON | {"num_hidden_layers": layers} | _OF_KIND[kind] | changes
    if kind == "gpt2":
        settings["n_inner"] = settings.pop("intermediate_size")

    saved_model(model, config(**settings), folder)
    base = load_base(ModelConfig(name_or_path=str(folder), device="cpu")).eval()
    with torch.no_grad():  # weights of a random start are so small that layers hardly matter
        for parameter in base.parameters():
            parameter.mul_(3)

    return Tiny(
        folder, base, {name: parameter.detach() for name, parameter in base.named_parameters()}
    )


def filled(model: nn.Module, weights: Named) -> nn.Module:
    """`model` with `weights` for its parameters, exactly those; a tied head follows."""
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: t.shape for name, t in weights.items()
    }
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    assert not any(parameter.is_meta for parameter in model.parameters())

    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Models by kind, each made once."""
    made: dict[str, Tiny] = {}

    def get(kind: str) -> Tiny:
        if kind not in made:
            made[kind] = make(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(
            input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=False
        ).logits

    return found


def stack(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    return [model.get_submodule(f"{anatomy.path}.{index}") for index in range(len(anatomy.layers))]


def made_up(
    layers: int, *, groups: int = 4, neurons: int = 96, prune: Prune = BOTH
) -> tuple[Anatomy, Scores]:
    """Layers of a shape, without a model, and random scores."""
    draw = torch.Generator().manual_seed(layers)
    mlp = Prunable(neurons, 96, (), "")
    attention = Prunable(groups, 1024, (), "")
    size = 64 + neurons * 96 + groups * 1024
    anatomy = Anatomy(
        "model.layers", (Layer(size, mlp, attention if prune == BOTH else None),) * layers
    )
    rows = [torch.rand(neurons, generator=draw) for _ in range(layers)]
    heads = [torch.rand(groups, generator=draw) for _ in range(layers)]

    return anatomy, Scores(
        tuple(torch.rand(layers, generator=draw).tolist()), tuple(rows), tuple(heads)
    )


def kept_fraction(manifest: Manifest) -> float:
    """Return the share of the parameters of the layers that are not trained that the manifest
    keeps; 1 if all are trained."""
    anatomy = manifest.anatomy
    total = manifest.anatomy.size(manifest.trained)
    removed = sum(anatomy.layers[index].size for index in manifest.dropped)

    for index, stay in manifest.neurons.items():
        prunable = anatomy.layers[index].mlp
        removed += (prunable.units - len(stay)) * prunable.cost

    for index, stay in manifest.groups.items():
        prunable = heads_of(anatomy.layers[index])
        removed += (prunable.units - len(stay)) * prunable.cost

    return 1 - removed / total if total else 1.0
