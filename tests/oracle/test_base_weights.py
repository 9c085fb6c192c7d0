"""What is read of a base folder is what transformers loads from it, under whatever names it is
stored."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fluvial.errors import ConfigError
from fluvial.models.base_weights import check_constant, open_weights, wanted
from fluvial.models.frozen import stream
from fluvial.models.loading import load_base, skeleton
from fluvial.models.pretrained import ModelConfig
from tests.support.model_kinds import KINDS, save_kind

TOKENS = torch.arange(3, 27).view(2, 12)
RENAMED_OR_FUSED = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_neox", "gemma4_text", "llama")


def settings(folder: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig.model_validate(
        {"name_or_path": str(folder), "device": "cpu", "dtype": dtype}
    )


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers makes of the folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)


def loss(model: nn.Module) -> torch.Tensor:
    logits = model(input_ids=TOKENS, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten())


@pytest.mark.parametrize("kind", RENAMED_OR_FUSED)
def test_every_weight_and_persistent_buffer_is_the_one_that_transformers_loads(
    kind: str, tmp_path: Path
) -> None:
    folder = save_kind(kind, tmp_path)
    source = open_weights(folder, skeleton(settings(folder)), lambda: load_base(settings(folder)))
    expected = wanted(plain(folder))
    assert source.names == expected.keys()

    for name, tensor in expected.items():
        assert source.get(name).dtype == tensor.dtype, name
        assert torch.equal(source.get(name), tensor), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gpt_oss", "gptj", "llama"])
def test_a_skeleton_has_the_types_and_computed_buffers_of_a_loaded_model(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}
        if kind == "gptj"
        else {}
    )
    folder = save_kind(kind, tmp_path, **sizes)
    empty = skeleton(settings(folder, dtype))
    whole = plain(folder, getattr(torch, dtype))
    expected = {name: parameter.dtype for name, parameter in whole.named_parameters()}
    assert {name: parameter.dtype for name, parameter in empty.named_parameters()} == expected
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()

    for name, buffer in whole.named_buffers():
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_any_architecture_trains_from_disk_as_in_memory(kind: str, tmp_path: Path) -> None:
    folder = save_kind(kind, tmp_path)
    empty = skeleton(settings(folder))
    source = open_weights(folder, empty, lambda: load_base(settings(folder)))

    for name, buffer in wanted(empty).items():
        if not isinstance(buffer, nn.Parameter):
            buffer.copy_(source.get(name))

    layer = next(name.partition(".1.")[0] + ".0." for name in source.names if ".1." in name)
    block = {name: source.get(name).clone() for name in source.names if name.startswith(layer)}
    block = {
        name: tensor
        for name, tensor in block.items()
        if isinstance(wanted(empty)[name], nn.Parameter)
    }
    model = stream(empty, source, block)
    whole = plain(folder)

    for name in block:
        whole.get_parameter(name).requires_grad_(True)
    streamed = loss(model.eval())
    expected = loss(whole.eval())
    torch.autograd.backward([streamed, expected])
    # Where a head is split into other kernels for a mapped weight than for a loaded one, the last
    # bit may differ.
    assert torch.allclose(streamed, expected, rtol=0, atol=1e-6)
    trained = dict(model.named_parameters())

    for name in block:
        found = trained[name].grad
        true = whole.get_parameter(name).grad
        assert (found is None) == (true is None), name

        if found is not None and true is not None:
            assert torch.allclose(found, true, rtol=1e-4, atol=1e-7), name

    assert block.keys() == {name for name, parameter in trained.items() if parameter.requires_grad}


def test_tied_weights_that_are_stored_with_two_values_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hub id the files are not read when the model is made, and it is made tied."""
    monkeypatch.setattr("fluvial.models.pretrained.stores_another_head", lambda *_: False)
    folder = save_kind("llama", tmp_path, tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(
        ConfigError, match="differ, and config.json ties them; set tie_word_embeddings to false"
    ):
        open_weights(folder, skeleton(settings(folder)), pytest.fail)

    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    source = open_weights(folder, skeleton(settings(folder)), pytest.fail)
    assert torch.equal(source.get("model.embed_tokens.weight"), tensors["lm_head.weight"])


def test_a_model_that_keeps_its_weights_in_one_piece_is_not_streamed() -> None:
    from fluvial.models.frozen import check_streams

    with pytest.raises(
        ConfigError, match=r"method.hold='disk': 0 \(LSTM\) keeps its weights in one piece"
    ):
        check_streams(nn.Sequential(nn.LSTM(4, 4)))


def test_a_model_that_changes_itself_while_it_reads_is_refused() -> None:
    class Reader(nn.Module):
        def __init__(self, **settings: int) -> None:
            super().__init__()
            self.config = SimpleNamespace(**settings)

    with pytest.raises(ConfigError, match=r"Reader divides its own weights .* rescale_every to 0"):
        check_constant(Reader(rescale_every=6))
    check_constant(Reader(rescale_every=0))
    reader = Reader()
    reader.conv = nn.BatchNorm1d(4)

    with pytest.raises(ConfigError, match=r"conv \(BatchNorm1d\) keeps running means"):
        check_constant(reader)
