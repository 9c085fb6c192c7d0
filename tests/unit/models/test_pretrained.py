"""A base folder of other people's: what is refused, before any round, in one line, and what is kept
of it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluvial.cli import app
from fluvial.errors import ConfigError, MissingWeightsError
from fluvial.models.loading import load_base, meta_base
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig, check_length, context_length, dtype_of
from fluvial.models.targets import LoraSettings
from fluvial.models.tokenizers import check_tokenizer, load_tokenizer
from fluvial.models.weights import check_weights
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from tests.conftest import saved_model

Change = Callable[[Path], None]


def config(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(name_or_path=str(folder), device="cpu", **changes)


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    return folder


def settings(**values: Any) -> Change:
    """A change of config.json; None removes a key."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        stored = json.loads(path.read_text()) | values
        path.write_text(
            json.dumps({key: value for key, value in stored.items() if value is not None})
        )

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """A change of the stored weights."""

    def change(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        save_file(edit(stored) or stored, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def sharded(folder: Path) -> list[Path]:
    """The folder's weights in shards."""
    base = load_base(config(folder))
    (folder / "model.safetensors").unlink()
    base.save_pretrained(folder, max_shard_size="20KB")  # type: ignore[operator]
    return sorted(folder.glob("model-*.safetensors"))


def without_a_shard(folder: Path) -> None:
    sharded(folder)[1].unlink()


def with_a_cut_shard(folder: Path) -> None:
    shard = sharded(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-10])


def with_a_wrong_index(folder: Path) -> None:
    sharded(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.7.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


class _Foreign:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran-foreign-code",)


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": _Foreign()}))


def as_pointer(folder: Path) -> None:
    """What git leaves of a large file that was not fetched."""
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 9)


def as_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "some/base"})
    )


def as_xlnet(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "xlnet"}))


def headless(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    stored = LlamaConfig.from_pretrained(folder, tie_word_embeddings=False)
    LlamaModel(stored).save_pretrained(folder)


REFUSED: dict[str, tuple[Change, str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "cut in half": (
        lambda folder: os.truncate(folder / "model.safetensors", 40_000),
        "is damaged or cut short",
    ),
    "a pointer": (as_pointer, "is damaged or cut short"),
    "missing shard": (
        without_a_shard,
        r"the shard 'model-00002-of-\d+\.safetensors' .* is missing",
    ),
    "cut shard": (with_a_cut_shard, "is damaged or cut short"),
    "wrong index": (
        with_a_wrong_index,
        r"lacks 'model\.layers\.7\.weight', which model\.safetensors\.index\.json",
    ),
    "foreign pickle": (as_pickle, "could run foreign code; save the model as safetensors"),
    "missing tensor": (
        tensors(lambda stored: stored.pop("model.norm.weight") is None or stored),
        r"lack 'model\.norm\.weight', which LlamaForCausalLM needs",
    ),
    "another shape": (
        settings(intermediate_size=80),
        "in another shape than config.json says",
    ),
    "too few layers": (settings(num_hidden_layers=3), r"lack 'model\.layers\.2\..* needs"),
    "too many layers": (
        settings(num_hidden_layers=1),
        r"stores 'model\.layers\.1\..*more layers than config\.json",
    ),
    "no head": (headless, r"lack 'lm_head\.weight'"),
    "whole numbers": (
        tensors(lambda stored: {name: tensor.to(torch.int8) for name, tensor in stored.items()}),
        r"stored as torch\.int8; only float weights",
    ),
    "quantised": (
        settings(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantised \(gptq",
    ),
    "adapter": (as_adapter, "is a PEFT adapter of 'some/base'; name that base"),
    "remote code": (settings(model_type="own", auto_map={"AutoConfig": "own.Own"}), "never run"),
    "other architecture": (
        settings(model_type="vit"),
        "no causal language model of the type 'vit'",
    ),
    "encoder-decoder": (settings(model_type="t5"), "'t5' is an encoder-decoder"),
    "encoder": (
        settings(model_type="bert"),
        "attends to later tokens, because config.json has is_decoder",
    ),
    "own seeds": (settings(model_type="reformer"), "random generator by itself|cannot be loaded"),
    "permutations": (as_xlnet, "attends to later tokens"),
    "no type": (settings(model_type=None), "names no 'model_type'"),
    "pad id": (settings(pad_token_id=5000), "Padding_idx must be within num_embeddings"),
    "heads": (settings(num_attention_heads=5), "cannot be loaded|cannot make a model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_check_refuses_a_folder_in_one_line(
    name: str,
    base: Path,
    run_config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    change, message = REFUSED[name]
    change(base)
    table = run_config | {"model": {"name_or_path": str(base), "device": "cpu"}}

    with pytest.raises(ConfigError, match=message) as error:
        plan(parse(table, "x"))
    assert "\n" not in str(error.value)
    assert str(base) in str(error.value)
    assert not (tmp_path / "ran-foreign-code").exists()

    for lora in (LoraSettings(r=2), None):
        with pytest.raises(ConfigError):
            ModelPool(parse(table, "x").model, lora).load()


def test_check_tells_the_sizes_of_a_folder_without_weights_and_refuses_it(
    base: Path, run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = plan(parse(run_config | {"model": {"name_or_path": str(base), "device": "cpu"}}, "x"))
    (base / "model.safetensors").unlink()
    (tmp_path / "run.toml").write_text('[model]\nname_or_path = "base"\ndevice = "cpu"\n')
    data = [
        f"data.{key}={json.dumps(value)}"
        for key, value in run_config["data"].items()
        if key != "partition"
    ]
    changes = [
        word for line in (*data, "data.partition={by='iid',sites=2}") for word in ("--set", line)
    ]

    with pytest.raises(MissingWeightsError, match="a run needs them: copy them"):
        app(
            ["check", str(tmp_path / "run.toml"), "--format", "json", *changes],
            standalone_mode=False,
        )

    assert (
        json.loads(capsys.readouterr().out)["model"]["parameters"] == whole["model"]["parameters"]
    )


def test_weights_in_other_forms_are_the_same_model(base: Path) -> None:
    expected = load_base(config(base)).state_dict()
    shards = sharded(base)
    assert len(shards) > 2
    assert check_weights(config(base), meta_base(config(base))) == []
    torch.save(expected, base / "pytorch_model.bin")
    assert all(
        torch.equal(load_base(config(base)).state_dict()[name], expected[name]) for name in expected
    )

    for path in [*shards, base / "model.safetensors.index.json"]:
        path.unlink()
    assert check_weights(config(base), meta_base(config(base))) == []
    assert all(
        torch.equal(load_base(config(base)).state_dict()[name], expected[name]) for name in expected
    )


def test_stored_tensors_without_a_use_are_told(base: Path) -> None:
    tensors(lambda stored: stored | {"score.weight": torch.ones(2, 32)})(base)
    assert check_weights(config(base), meta_base(config(base))) == [
        "model: 1 stored tensors are not used: 'score.weight'"
    ]


def test_a_weight_that_is_no_number_is_refused(base: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors(lambda stored: stored | {name: stored[name].clone().fill_(float("nan"))})(base)
    with pytest.raises(
        ConfigError, match=f"{name} holds values that are not finite in torch.float32"
    ):
        load_base(config(base))


@pytest.mark.parametrize("stored", ["safetensors", "shards", "bin"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_check_reads_each_weight_once_and_names_the_one_that_is_no_number(
    value: float, stored: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluvial.models.stored._AT_ONCE", 64)
    name = "model.layers.1.mlp.down_proj.weight"
    weights = load_file(base / "model.safetensors")
    weights[name][-1, -1] = value
    weights["unused.weight"] = torch.full((2,), value)
    (base / "model.safetensors").unlink()
    if stored == "bin":
        torch.save(weights, base / "pytorch_model.bin")
    elif stored == "safetensors":
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    else:
        save_file(weights, base / "a.safetensors", metadata={"format": "pt"})
        index = {"weight_map": dict.fromkeys(weights, "a.safetensors")}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))

    found = meta_base(config(base))
    with pytest.raises(ConfigError, match=rf"'{name}' \(in .*\) holds values that are not finite"):
        check_weights(config(base), found, values=True)
    assert check_weights(config(base), found)  # the headers alone are whole


def test_check_refuses_a_weight_beyond_the_range_of_the_type_that_is_set(base: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors(lambda stored: stored | {name: stored[name].clone().fill_(7e4)})(base)
    found = meta_base(config(base))
    assert not check_weights(config(base), found, values=True)
    half = config(base).model_copy(update={"dtype": "float16"})
    with pytest.raises(
        ConfigError, match=rf"'{name}' \(in .*\) holds .* not finite in torch.float16"
    ):
        check_weights(half, found, values=True)


def test_a_weight_that_is_no_number_is_refused_where_all_weights_are_tuned(base: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors(lambda stored: stored | {name: stored[name].clone().fill_(float("inf"))})(base)
    pool = ModelPool(config(base), None)
    with (
        pytest.raises(ConfigError, match=f"{name} holds values that are not finite"),
        pool.model(pool.base_state(), trainable=pool.layout.names),
    ):
        pass


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("told", ["dtype", "torch_dtype", "by its weights"])
def test_the_type_is_the_folder_s_own(kind: str, told: str, base: Path, tmp_path: Path) -> None:
    dtype = getattr(torch, kind)
    tensors(lambda stored: {name: tensor.to(dtype) for name, tensor in stored.items()})(base)
    settings(**{"dtype": None, "torch_dtype": None} | ({told: kind} if "dtype" in told else {}))(
        base
    )
    assert dtype_of(config(base)) == dtype
    assert dtype_of(config(base, dtype="float32")) == torch.float32
    pool = ModelPool(config(base), LoraSettings(r=2))

    with pool.model(pool.base_state()) as model:
        types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {types[name] for name in types if ".lora_" in name} == {torch.float32}
    assert {types[name] for name in types if ".lora_" not in name} == {dtype}
    whole = ModelPool(config(base), None)
    whole.save(whole.base_state(), tmp_path / "out")
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()
    } == {dtype}


def test_generation_settings_of_a_folder_change_no_measure_and_are_kept(
    base: Path, tmp_path: Path
) -> None:
    plain = ModelPool(config(base), None)
    expected = plain.generate(plain.base_state(), ["The river"], max_new_tokens=8)
    odd = {
        "do_sample": True,
        "temperature": 0.2,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": list(range(3, 200)),
        "forced_eos_token_id": 2,
        "num_beams": 3,
    }
    (base / "generation_config.json").write_text(json.dumps(odd))

    for lora in (None, LoraSettings(r=2)):
        pool = ModelPool(config(base), lora)
        assert pool.generate(pool.base_state(), ["The river"], max_new_tokens=8) == expected

    whole = ModelPool(config(base), None)
    whole.save(whole.base_state(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == odd


@pytest.mark.parametrize("form", [int, list])
def test_end_tokens_of_a_folder_end_an_answer_in_every_pool(base: Path, form: type) -> None:
    plain = ModelPool(config(base), None)
    (whole,) = plain.generate(plain.base_state(), ["The river"], max_new_tokens=4)
    last = plain.tokenizer(str(whole), add_special_tokens=False)["input_ids"][-1]
    listed = last if form is int else [last, 2]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))

    for lora in (None, LoraSettings(r=2)):
        pool = ModelPool(config(base), lora)
        (ended,) = pool.generate(pool.base_state(), ["The river"], max_new_tokens=4)
        assert ended != whole
        assert whole.startswith(ended)
        assert not ended.cut


@pytest.mark.parametrize("length", [-1, None, 64])
def test_a_context_without_a_limit(length: int | None, base: Path) -> None:
    model = meta_base(config(base))
    model.config.__dict__["max_position_embeddings"] = length
    assert context_length(model) == (64 if length == 64 else None)
    check_length(context_length(model), 64)


def test_roberta_counts_positions_behind_the_padding_s(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaForCausalLM

    settings = RobertaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=34,
        is_decoder=True,
        pad_token_id=1,
    )
    folder = saved_model(RobertaForCausalLM, settings, tmp_path)
    longest = context_length(meta_base(config(folder)))
    assert longest == 32
    model = load_base(config(folder))
    model(input_ids=torch.full((1, longest), 5))

    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


def test_longrope_has_the_length_up_to_which_a_batch_changes_no_text(tmp_path: Path) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    settings = Phi3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=2,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 8,
            "long_factor": [8.0] * 8,
        },
    )
    folder = saved_model(Phi3ForCausalLM, settings, tmp_path)
    longest = context_length(meta_base(config(folder)))
    assert longest == 32
    with pytest.raises(ConfigError, match="reads at most 32 tokens"):
        check_length(longest, longest + 1)

    model = load_base(config(folder))
    text = torch.arange(5, 15)[None]

    def beside(length: int) -> torch.Tensor:
        """Return the logits of the text, padded to the length of another one."""
        rows = torch.nn.functional.pad(text, (0, length - text.shape[1]))
        mask = torch.arange(length)[None] < text.shape[1]
        logits: torch.Tensor = model(input_ids=rows, attention_mask=mask.long()).logits
        return logits[:, : text.shape[1]]

    torch.testing.assert_close(beside(longest), model(input_ids=text).logits)
    assert not torch.allclose(beside(longest + 1), beside(longest), rtol=0, atol=1e-3)


def test_tokens_that_the_model_does_not_embed_are_refused(base: Path) -> None:
    model = meta_base(config(base))
    tokenizer = load_tokenizer(config(base))
    check_tokenizer(tokenizer, model, "base")
    more = load_tokenizer(config(base))
    more.add_tokens(["<one>"])

    with pytest.raises(
        ConfigError, match="last token '<one>' has id 300, and the model embeds ids up to 299"
    ):
        check_tokenizer(more, model, "base")

    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(
        ConfigError, match=r"pad token '\[PAD\]' has id 300.*; name a token .* as pad_token"
    ):
        check_tokenizer(tokenizer, model, "base")


def test_a_folder_without_tokenizer_or_end_says_so(base: Path) -> None:
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    with pytest.raises(ConfigError, match="no end-of-text token"):
        load_tokenizer(config(base))
    for path in base.glob("token*"):
        path.unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(config(base))
