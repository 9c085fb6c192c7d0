"""Models of many architectures: nothing in them is random, and what is written is what plain PEFT
measures."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fluvial.data import DataConfig
from fluvial.errors import ConfigError
from fluvial.models.behaviour import check_behaviour
from fluvial.models.encoding import Encoder
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.targets import LoraSettings
from fluvial.models.tokenizers import load_tokenizer
from fluvial.training.assess import evaluate_adapter, whole_file
from fluvial.training.folders import read_adapter_folder
from tests.conftest import _tokenizer
from tests.support.model_kinds import EXPERTS, save_kind
from tests.support.runs import adapter_of, run_table

ENCODER = {"num_key_value_heads": 4, "is_decoder": True}
RANDOM: dict[str, dict[str, Any]] = {
    "biogpt": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "layerdrop": 0.2},
    "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2} | ENCODER,
    "phimoe": EXPERTS | {"input_jitter_noise": 0.2, "router_jitter_noise": 0.2},
    "opt": {"dropout": 0.3, "layerdrop": 0.3, "ffn_dim": 48, "word_embed_proj_dim": 32},
}


def folder_of(kind: str, tmp_path: Path, **changes: Any) -> Path:
    folder = save_kind(kind, tmp_path / kind, **changes)
    _tokenizer().save_pretrained(folder)
    return folder


def table(run_config: dict[str, Any], folder: Path, **changes: Any) -> dict[str, Any]:
    return run_config | {"model": {"name_or_path": str(folder), "device": "cpu"}} | changes


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("phimoe", "opt") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in RANDOM
    ],
)
def test_same_seed_same_weights_whatever_a_model_would_draw(
    kind: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Serial or parallel, with or without gradient checkpointing, with LoRA dropout on."""
    folder = folder_of(kind, tmp_path, **RANDOM[kind])
    adapters = []

    for workers, checkpointing in ((1, False), (2, False), (1, True)):
        train = run_config["train"] | {"max_steps": 2, "gradient_checkpointing": checkpointing}
        changes = {"rounds": 1, "fleet": {"workers": workers}, "train": train}
        torch.rand(workers)  # the process-wide generator stands somewhere else each time
        where = tmp_path / f"run-{workers}-{checkpointing}"
        adapters.append(adapter_of(run_table(table(run_config, folder, **changes), where)))

    first = adapters[0]
    assert any(bool(tensor.count_nonzero()) for name, tensor in first.items() if "lora_B" in name)
    for other in adapters[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def plain_peft(folder: Path) -> Any:
    """An adapter as PEFT loads it by itself."""
    from peft import AutoPeftModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says of tied heads and of fused experts
        return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def by_hand(model: nn.Module, folder: Path, records: Path) -> float:
    """Mean loss of a plain model, one sequence at a time and without padding."""
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder), device="cpu"))
    encoder = Encoder.of(tokenizer)
    total = 0.0
    count = 0

    for line in records.read_text().splitlines():
        ids = torch.tensor([encoder.ended(encoder.prompt(line))])
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1

    return total / count


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"target_modules": "all-linear"}),
        ("deepseek_v3", {"target_modules": ["gate_proj", "up_proj", "down_proj", "o_proj"]}),
        ("llama", {"target_modules": ["lm_head", "q_proj"]}),
        ("gemma", {"target_modules": ["lm_head", "v_proj"]}),
        ("mamba", {}),
    ],
)
def test_an_adapter_is_measured_as_plain_peft_measures_it(
    kind: str, lora: dict[str, Any], run_config: dict[str, Any], tmp_path: Path
) -> None:
    folder = folder_of(kind, tmp_path)
    settings = table(run_config, folder, rounds=1, lora={"r": 4, "lora_dropout": 0.0, **lora})
    result = run_table(settings, tmp_path / "run")
    saved = tmp_path / "run" / "adapter"
    records = tmp_path / "some.txt"
    records.write_text("snow ice wind\nsun sand heat palm\nrain sea\n")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        "".join(f'{{"text": "{line}"}}\n' for line in records.read_text().splitlines())
    )
    found = evaluate_adapter(
        read_adapter_folder(saved),
        ModelConfig(name_or_path=str(folder), device="cpu"),
        data=DataConfig.model_validate({**whole_file(lines), "max_length": 32, "form": "text"}),
    )
    plain = plain_peft(saved)
    # Rows of other lengths and padding: sums are made in another order.
    assert found["data"]["adapter"]["loss"] == pytest.approx(
        by_hand(plain, folder, records), abs=2e-5
    )

    with plain.disable_adapter():
        assert found["data"]["base"]["loss"] == pytest.approx(
            by_hand(plain, folder, records), abs=2e-5
        )

    assert result["folder"]


def test_rank_and_alpha_patterns_of_a_foreign_adapter_are_honoured(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = folder_of("llama", tmp_path)
    config = LoraConfig(
        r=4,
        target_modules=r".*(q_proj|down_proj)",
        rank_pattern={"down_proj": 2},
        alpha_pattern={"q_proj": 3},
        use_rslora=True,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(
        tmp_path / "adapter"
    )
    found = read_adapter_folder(tmp_path / "adapter")
    pool = ModelPool(ModelConfig(name_or_path=str(folder), device="cpu"), found.lora)
    tokens = torch.arange(3, 13)[None]
    plain = plain_peft(tmp_path / "adapter")

    with pool.model(found.tensors) as model, torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)


class _Odd(nn.Module):
    """A language model that draws, looks ahead, or sees padding."""

    def __init__(self, inner: Any, *, odd: str) -> None:
        super().__init__()
        self.inner = inner
        self.odd = odd
        self.config = inner.config

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.inner.get_input_embeddings()
        return embeddings

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        found = self.inner(input_ids=input_ids, **options)
        noise = {
            "draws random numbers": torch.rand(int(self.odd.startswith("draws"))).sum(),
            "attends to later tokens": 0.1
            * input_ids[0, -1]
            * bool(options["attention_mask"].all()),
            "gives other values for a text that padding follows": 0.01 * input_ids.shape[1],
        }
        found.logits = found.logits + noise[self.odd]

        return found


ODD = (
    "draws random numbers",
    "attends to later tokens",
    "gives other values for a text that padding follows",
)


@pytest.mark.parametrize("odd", ODD)
def test_a_base_that_draws_looks_ahead_or_sees_padding_is_refused(
    odd: str, tiny_model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    inner = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    check_behaviour(inner, "x")

    with pytest.raises(ConfigError, match=odd):
        check_behaviour(_Odd(inner, odd=odd), "x")


@pytest.mark.parametrize("lora", [LoraSettings(r=2), None], ids=["lora", "full"])
def test_a_stored_base_that_looks_ahead_is_refused_whatever_is_tuned(
    lora: LoraSettings | None, tmp_path: Path
) -> None:
    """The decays of MiniMax are stored buffers, and with other values its attention looks ahead."""
    folder = folder_of(
        "minimax",
        tmp_path,
        head_dim=8,
        layer_types=["full_attention", "linear_attention"],
        **EXPERTS,
    )
    with pytest.raises(ConfigError, match="attends to later tokens"):
        ModelPool(ModelConfig(name_or_path=str(folder), device="cpu"), lora).check_behaviour()


def test_a_base_with_values_that_are_not_finite_is_refused_where_all_is_tuned(
    tmp_path: Path,
) -> None:
    folder = folder_of("llama", tmp_path)
    stored = load_file(folder / "model.safetensors")
    stored["model.norm.weight"][0] = float("nan")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ConfigError, match="holds values that are not finite in torch.float32"):
        ModelPool(ModelConfig(name_or_path=str(folder), device="cpu"), None).check_behaviour()


def test_a_base_whose_cache_changes_its_values_is_refused(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    class Cached(_Odd):
        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            found = self.inner(input_ids=input_ids, **options)
            found.logits = found.logits * (1.0 if options.get("use_cache") is False else 1.01)
            return found

    inner = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with pytest.raises(ConfigError, match="gives other values with its cache than without"):
        check_behaviour(Cached(inner, odd=""), "x")


def test_a_bench_of_another_type_still_tunes_in_fp32(tiny_model: Path) -> None:
    pool = ModelPool(
        ModelConfig(name_or_path=str(tiny_model), device="cpu", dtype="bfloat16"), LoraSettings(r=2)
    )
    assert {tensor.dtype for tensor in pool.base_state().values()} == {torch.float32}
