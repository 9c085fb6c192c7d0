"""A cut model of every architecture is the whole model, or is refused: never wrong silently."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fluvial.errors import ConfigError
from fluvial.models.loading import load_base
from fluvial.models.pretrained import ModelConfig
from fluvial.models.split import Cut
from fluvial.models.split_generation import check_generation
from fluvial.training.train import summed_loss
from tests.oracle.test_split import LAYERS, gradients, parts_of, split_logits
from tests.oracle.test_split_generation import EQUAL as GENERATED
from tests.oracle.test_split_generation import split_answer
from tests.support.model_kinds import EXPERTS, save_kind

NEW = 24
LENGTHS = (9, 6, 0, 4)
CHANGES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 128},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "gemma4_text": {
        "sliding_window": 4,
        "layer_types": [
            *["sliding_attention", "full_attention"],
            *["sliding_attention", "full_attention"],
            "full_attention",
        ],
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 128},
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "starcoder2": {"sliding_window": 4},
}
EQUAL = [
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "deepseek_v3"),
    *("gemma", "gemma2", "gemma3_text", "gemma4_text", "gpt2", "gpt_neox", "gptj", "codegen"),
    *("gpt_oss", "gpt_bigcode", "opt", "falcon", "bloom", "mpt", "phi", "phi3", "olmo", "olmo2"),
    *("stablelm", "starcoder2", "cohere", "cohere2", "granite", "glm", "glm4", "smollm3"),
]
TRAINED_ONLY = ["mamba", "jamba", "openai-gpt"]
"""Architectures that are trained in parts, and have no cache of keys and values that is cut."""
NOT_CUT = ["bart", "blenderbot"]


def config_of(kind: str, tmp_path: Path) -> ModelConfig:
    settings: dict[str, Any] = {"num_hidden_layers": LAYERS, "initializer_range": 0.1}
    folder = save_kind(kind, tmp_path / kind, **settings, **CHANGES.get(kind, {}))
    return ModelConfig(name_or_path=str(folder), device="cpu")


def batch(left: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and labels of rows of `LENGTHS` tokens, one of which is padding alone."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 300, (len(LENGTHS), max(LENGTHS)), generator=draw)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return ids, mask, ids.masked_fill(mask == 0, -100)


@pytest.mark.parametrize("kind", [*EQUAL, *TRAINED_ONLY])
def test_logits_and_gradients_of_padded_rows_are_those_of_the_whole_model(
    kind: str, tmp_path: Path
) -> None:
    config = config_of(kind, tmp_path)
    site, server = parts_of(config, Cut(LAYERS, 2, 1))
    whole = load_base(config).requires_grad_(True)
    tuned = site.tuned() | server.tuned()
    plain = dict(whole.named_parameters())
    assert tuned.keys() == plain.keys()

    for left in (False, True):
        ids, mask, labels = batch(left)
        real = mask.bool()
        logits = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits
        expected = summed_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) / 12
        expected.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            got = split_logits(site, server, ids, mask)
        loss = gradients(site, server, ids, mask, labels)

        assert float((got[real] - logits[real]).detach().abs().max()) <= 1e-5
        assert float((loss - expected).detach().abs()) <= 1e-5
        for name, parameter in plain.items():
            ours, theirs = tuned[name].grad, parameter.grad
            assert (ours is None) == (theirs is None), name
            if ours is not None and theirs is not None:
                assert float((ours - theirs).abs().max()) <= 1e-5, name


@pytest.mark.parametrize("kind", sorted({*EQUAL} - {*GENERATED}))
def test_generated_tokens_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    config = config_of(kind, tmp_path)
    site, server = parts_of(config, Cut(LAYERS, 1, 2))
    whole: Any = load_base(config)
    whole.generation_config = GenerationConfig()
    prompt = batch(left=False)[0][:1, :7]

    output = whole.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )

    assert split_answer(site, server, prompt[0].tolist()) == output[0, 7:].tolist()


@pytest.mark.parametrize("kind", TRAINED_ONLY)
def test_generation_with_other_states_is_refused(kind: str, tmp_path: Path) -> None:
    _, server = parts_of(config_of(kind, tmp_path), Cut(LAYERS, 2, 1))

    with pytest.raises(
        ConfigError, match="so it cannot generate in parts|cannot generate in parts: "
    ):
        check_generation(server)


@pytest.mark.parametrize("kind", NOT_CUT)
def test_a_model_without_one_list_of_decoder_layers_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 lists of its 5 decoder layers"):
        parts_of(config_of(kind, tmp_path), Cut(LAYERS, 2, 1))
