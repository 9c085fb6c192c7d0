"""Which modules LoRA adapts: by architecture, by "all-linear", by name; text modules only."""

from typing import Any

import pytest
import torch
from torch import nn

from fluvial.errors import ConfigError
from fluvial.methods.fedpipe.planner.sizes import sizes_of
from fluvial.models.adapters import adapt
from fluvial.models.layer_lists import layer_lists
from fluvial.models.quantisation import Quantisation
from fluvial.models.quantised import formats
from fluvial.models.split import decoder_layers
from fluvial.models.targets import LoraSettings, adaptable_modules, target_names
from fluvial.models.tuning import tuned_parameters

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA3 = {
    "text_config": {**SMALL, "head_dim": 8, "sliding_window": 8},
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    **SMALL,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}


def meta(kind: str, **settings: Any) -> Any:
    """A model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()


def adapted(base: nn.Module, **settings: Any) -> set[str]:
    """The modules that have factors, as PEFT has made them."""
    model = adapt(base, LoraSettings(r=2, lora_dropout=0.0, **settings))
    return {name.partition(".lora_")[0] for name in tuned_parameters(model)}


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("llama", SMALL, ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("qwen3_moe", SMALL | MOE, ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, ["c_attn"]),
        ("opt", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}, ["q_proj", "v_proj"]),
        ("gpt_neox", SMALL, ["query_key_value"]),
        ("phi", SMALL, ["fc1", "fc2", "q_proj", "v_proj"]),
        ("phi3", SMALL | {"pad_token_id": 0}, ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
        (
            "mamba",
            {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64},
            ["in_proj", "x_proj"],
        ),
        ("deepseek_v2", DEEPSEEK, ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_proj"]),
    ],
)
def test_attention_follows_the_architecture(
    kind: str, settings: dict[str, Any], expected: list[str]
) -> None:
    assert (
        target_names(meta(kind, **settings), LoraSettings(target_modules="attention")) == expected
    )


def test_the_defaults_of_peft_are_peft_s_own() -> None:
    """PEFT, left to choose, adapts the same modules of GPT-2."""
    from peft import LoraConfig, get_peft_model

    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    theirs = get_peft_model(meta("gpt2", **settings), LoraConfig(r=2, fan_in_fan_out=True))
    names = {name.partition(".lora_")[0] for name in tuned_parameters(theirs)}
    assert adapted(meta("gpt2", **settings), target_modules="attention") == names


@pytest.mark.parametrize(
    ("kind", "settings", "left_out"),
    [
        ("llama", SMALL, {"lm_head"}),
        ("llama", SMALL | {"tie_word_embeddings": True}, {"lm_head"}),
        (
            "jamba",
            SMALL | {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2},
            {"lm_head", "router"},
        ),
        ("granitemoe", SMALL | {"num_local_experts": 4}, {"lm_head", "layer"}),
        ("qwen2_moe", SMALL | MOE, {"lm_head", "shared_expert_gate", "gate"}),
        (
            "mamba2",
            {**SMALL, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
            {"lm_head", "out_proj"},
        ),
    ],
)
def test_all_linear_leaves_out_heads_and_routers(
    kind: str, settings: dict[str, Any], left_out: set[str]
) -> None:
    base = meta(kind, **settings)
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    found = adapted(base, target_modules="all-linear")
    assert found < linear
    assert not {name.rpartition(".")[2] for name in found} & left_out
    # PEFT takes the projections of an MLP for the experts where all experts of a layer are one
    # tensor.
    experts = {"gate_proj", "up_proj", "down_proj"} if kind in ("qwen2_moe", "jamba") else set()
    rest = {name.rpartition(".")[2] for name in linear - found} - left_out
    assert rest <= {"dt_proj", "out_proj"} | experts


@pytest.mark.parametrize("targets", ["attention", "all-linear", ("q_proj", "v_proj")])
def test_of_a_multimodal_model_only_text_is_adapted(targets: Any) -> None:
    base = meta("gemma3", **GEMMA3)
    assert any("vision" in name and name.endswith("q_proj") for name, _ in base.named_modules())
    found = adapted(base, target_modules=targets)
    assert found
    assert all("language_model" in name for name in found)


def test_the_layers_of_a_multimodal_model_are_those_that_read_text() -> None:
    """Its vision tower has as many, and comes first."""
    base = meta("gemma3", **GEMMA3)
    text = "model.language_model.layers"
    towers = [name for name, module in base.named_modules() if name.endswith("layers")]
    assert towers[0] != text
    assert [path for path, _ in layer_lists(base)] == [text]
    assert decoder_layers(base)[0] == text

    sizes = sizes_of(base, 4)
    linear = [module.weight.numel() for module in adaptable_modules(base).values()]
    assert sum(sizes.linear) == sum(linear)
    assert set(formats(base, Quantisation("nf4"))) == set(adaptable_modules(base))


def test_a_name_that_is_a_number_is_the_linear_one() -> None:
    """Layers of a list are numbered too: `h.0` is a layer, `h.0.ffn.0` is linear."""
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "vocab_size": 64}
    found = adapted(meta("ctrl", **settings), target_modules=("0",))
    assert found == {"transformer.h.0.ffn.0", "transformer.h.1.ffn.0"}


def test_a_list_is_honoured_or_refused() -> None:
    assert adapted(meta("llama", **SMALL), target_modules=("lm_head", "q_proj")) == {
        "lm_head",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }
    with pytest.raises(
        ConfigError, match=r"no linear module 'query'; it has down_proj, .*, v_proj$"
    ) as error:
        adapted(meta("llama", **SMALL), target_modules=("query",))

    assert "lm_head" not in str(error.value)
    with pytest.raises(
        ConfigError, match=r"no linear module 'nothing'; it has k_proj, o_proj, q_proj, v_proj$"
    ):
        adapted(meta("granitemoe", **SMALL, num_local_experts=4), target_modules=("nothing",))


@pytest.mark.parametrize(
    ("kind", "settings", "targets", "message"),
    [
        (
            "mamba",
            {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64},
            ("out_proj",),
            "incompatible",
        ),
        ("deepseek_v2", DEEPSEEK, ("gate_proj", "up_proj"), "lora.lora_dropout = 0"),
        ("deepseek_v2", DEEPSEEK, ("gate_proj",), "without also targeting up_proj"),
    ],
)
def test_what_peft_refuses_is_one_line(
    kind: str, settings: Any, targets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        adapt(meta(kind, **settings), LoraSettings(r=2, target_modules=targets))
    assert "\n" not in str(error.value)


def test_modules_of_a_few_values_are_adapted_where_they_hold_the_rank() -> None:
    doge = meta("doge", **SMALL | {"hidden_size": 64})
    narrow = "dt_proj"  # 2 values, one for each head of the keys
    assert narrow not in target_names(doge, LoraSettings(r=8))
    assert narrow in target_names(doge, LoraSettings(r=2))
    with pytest.raises(ConfigError, match="lora.r=8 exceeds dimension 2 of 'dt_proj'"):
        target_names(doge, LoraSettings(r=8, target_modules=(narrow,)))
