"""The candidates of a base of every naming: shapes, layers, kinds, and parameters of each rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fluvial.methods.fedpipe.planner.candidates import Candidate, linear_candidates
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.targets import LoraSettings
from tests.support.model_kinds import save_kind


def registry(kind: str, folder: Path, **changes: Any) -> tuple[ModelPool, list[Candidate]]:
    path = save_kind(kind, folder / kind, **changes)
    lora = LoraSettings(r=4, target_modules="all-linear")
    pool = ModelPool(ModelConfig(name_or_path=str(path), device="cpu"), lora)
    modules = [name for name, _ in pool.assignment(1).ranks]
    return pool, linear_candidates(pool.outline.base, modules)


def shapes(
    candidates: list[Candidate], layer: int, behind: str = ""
) -> dict[str, tuple[int, int, str]]:
    """Return rows, columns and kind by type, or by what follows `behind` in the module's name."""
    return {
        each.module.partition(behind)[2] if behind else each.type: (
            each.rows,
            each.columns,
            each.kind,
        )
        for each in candidates
        if each.layer == layer
    }


def check_parameters(pool: ModelPool, candidates: list[Candidate]) -> None:
    """r (d_in + d_out) at every rank, as the layouts of adapters have them."""
    for rank in (1, 3, 4):
        layout = pool.assignment(1).with_ranks(rank).layout
        assert layout.numel == sum(rank * each.width for each in candidates)
        for each in candidates:
            sizes = dict(layout.shapes)
            assert sizes[f"{each.module}.lora_A.weight"] == (rank, each.columns)
            assert sizes[f"{each.module}.lora_B.weight"] == (each.rows, rank)


def test_grouped_queries_have_narrow_keys_and_values(tmp_path: Path) -> None:
    pool, candidates = registry("llama", tmp_path)
    assert shapes(candidates, 1) == {
        "q_proj": (32, 32, "attention"),
        "k_proj": (16, 32, "attention"),
        "v_proj": (16, 32, "attention"),
        "o_proj": (32, 32, "attention"),
        "gate_proj": (48, 32, "mlp"),
        "up_proj": (48, 32, "mlp"),
        "down_proj": (32, 48, "mlp"),
    }
    assert {each.layer for each in candidates} == {0, 1}
    check_parameters(pool, candidates)


def test_a_fused_conv1d_is_one_weight_of_out_by_in(tmp_path: Path) -> None:
    """GPT-2 stores (in, out); a module of the same name in attention and MLP keeps its kind."""
    pool, candidates = registry("gpt2", tmp_path, n_embd=32, n_layer=2, n_head=4, n_inner=48)
    assert shapes(candidates, 1, ".h.1.") == {
        "attn.c_attn": (96, 32, "attention"),
        "attn.c_proj": (32, 32, "attention"),
        "mlp.c_fc": (48, 32, "mlp"),
        "mlp.c_proj": (32, 48, "mlp"),
    }
    check_parameters(pool, candidates)


def test_names_of_bert_have_their_layer_and_kind() -> None:
    """Three modules of a layer are called `dense`; the path says which is attention."""
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        is_decoder=True,
    )
    with torch.device("meta"):
        base = BertLMHeadModel(config)
    names = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and ".layer." in name
    ]
    candidates = linear_candidates(base, names)
    assert shapes(candidates, 2, ".2.") == {
        "attention.self.query": (24, 24, "attention"),
        "attention.self.key": (24, 24, "attention"),
        "attention.self.value": (24, 24, "attention"),
        "attention.output.dense": (24, 24, "attention"),
        "intermediate.dense": (96, 24, "mlp"),
        "output.dense": (24, 96, "mlp"),
    }
    assert len(candidates) == 18


@pytest.mark.parametrize("kind", ["gpt_neox", "opt", "falcon"])
def test_other_namings_have_a_layer_and_both_kinds(kind: str, tmp_path: Path) -> None:
    pool, candidates = registry(kind, tmp_path)
    assert {each.kind for each in candidates} == {"attention", "mlp"}
    assert {each.layer for each in candidates} == {0, 1}
    check_parameters(pool, candidates)
