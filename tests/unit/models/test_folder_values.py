"""Values of a base folder's JSON files and weights that others read in their own way: each is as
transformers reads it, or refused by `check` with the file and the key."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fluvial.errors import ConfigError
from fluvial.models.base_weights import open_weights
from fluvial.models.loading import fill, load_base, meta_base, skeleton
from fluvial.models.pretrained import ModelConfig, dtype_of, read_config
from fluvial.models.tokenizers import load_tokenizer

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    return folder


def config(folder: Path) -> ModelConfig:
    return ModelConfig(name_or_path=str(folder), device="cpu")


def change(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; a value of ... removes one."""
    stored = json.loads(path.read_text()) | values
    kept = {key: value for key, value in stored.items() if value is not ...}
    path.write_text(json.dumps(kept))


# -- config.json and generation_config.json ------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan, expected a number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps = -1e-05, expected a finite number at least 0"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon = inf, expected a finite"),
        ({"rope_theta": 0}, "rope_theta = 0, expected a finite number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor = 0, expected"),
        (
            {"rope_parameters": {"full": {"rope_type": "yarn", "factor": -2.0}}},
            "rope_parameters.full.factor = -2.0, expected",
        ),
        ({"any": [{"other": float("nan")}]}, "any.0.other = nan"),
    ],
)
def test_a_number_with_which_a_model_computes_nan_is_refused(
    values: dict[str, Any], told: str, base: Path
) -> None:
    change(base / "config.json", **values)
    with pytest.raises(ConfigError, match=re.escape(f"config.json: {told}")):
        read_config(config(base))


def test_numbers_that_models_have_are_taken(base: Path) -> None:
    change(base / "config.json", time_step_limit=[0.0, float("inf")], loss_factor=0, some_eps=0.0)
    read_config(config(base))


@pytest.mark.parametrize("text", ["[]", "{", "5"])
def test_generation_settings_that_are_no_object_are_refused(text: str, base: Path) -> None:
    (base / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match="generation_config.json: .*copy it again"):
        read_config(config(base))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"hidden_act": "nope"}, "hidden_act"),
        (
            {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
            "rope_parameters.rope_type",
        ),
    ],
)
def test_a_name_that_transformers_does_not_know_is_told_with_its_key(
    values: dict[str, Any], key: str, base: Path
) -> None:
    change(base / "config.json", **values)
    with pytest.raises(ConfigError, match=f"config.json: {key} = 'nope' is unknown; correct it"):
        meta_base(config(base))


# -- tokenizer_config.json -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("model_max_length", "512", "'512', expected a number of tokens above 0"),
        ("model_max_length", float("nan"), "nan, expected"),
        ("model_max_length", True, "True, expected"),
        ("chat_template", 5, "5, expected the text of a template"),
    ],
)
def test_values_of_a_tokenizer_that_cannot_be_used_are_refused(
    key: str, value: Any, told: str, base: Path
) -> None:
    (base / "chat_template.jinja").unlink(missing_ok=True)
    change(base / "tokenizer_config.json", **{key: value})
    with pytest.raises(ConfigError, match=re.escape(f"{key} in tokenizer_config.json is {told}")):
        load_tokenizer(config(base))


def test_special_tokens_without_text_are_none(base: Path) -> None:
    """transformers gives an empty special token the id of the unknown token."""
    change(base / "tokenizer_config.json", bos_token="", pad_token="", unk_token="<unk>")
    tokenizer = load_tokenizer(config(base))
    assert tokenizer.bos_token_id is None
    assert tokenizer.pad_token_id == tokenizer.eos_token_id

    change(base / "tokenizer_config.json", eos_token="")
    with pytest.raises(ConfigError, match=r"no end-of-text token.*name one as eos_token in"):
        load_tokenizer(config(base))


def test_dropout_of_merges_is_switched_off_with_a_remark(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "The river carries the water of many small streams."
    expected = load_tokenizer(config(base))(text)["input_ids"]
    stored = json.loads((base / "tokenizer.json").read_text())
    change(base / "tokenizer.json", model=stored["model"] | {"dropout": 0.5})

    tokenizers = [load_tokenizer(config(base)) for _ in range(2)]
    read = [tokenizer(text)["input_ids"] for tokenizer in tokenizers for _ in range(3)]
    assert read == [expected] * 6
    assert [record.getMessage().count("dropout = 0.5") for record in caplog.records] == [1]


def test_sampling_of_sentencepiece_is_refused(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    tokenizer = load_tokenizer(config(base))
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    tokenizer.sp_model_kwargs = {"enable_sampling": True}
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    with pytest.raises(ConfigError, match=r"sp_model_kwargs\.enable_sampling .* expected false"):
        load_tokenizer(config(base))


# -- weights -------------------------------------------------------------------------------------


def with_head(folder: Path, shift: float, form: str) -> None:
    """Store a head beside the embedding that config.json ties it to, `shift` away from it."""
    stored = load_file(folder / "model.safetensors")
    stored[HEAD] = stored[EMBEDDING] + shift
    (folder / "model.safetensors").unlink()
    if form == "pickle":
        torch.save(stored, folder / "pytorch_model.bin")
    elif form == "one file":
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        write_shards(folder, [{HEAD: stored.pop(HEAD)}, stored])


def write_shards(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["one file", "shards", "pickle"])
@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_a_head_of_other_values_than_the_embedding_is_untied_as_in_transformers(
    shift: float, form: str, base: Path
) -> None:
    """Held whole beside an adapter, and read weight by weight where all are tuned."""
    with_head(base, shift, form)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base).eval()(tokens).logits
        held = load_base(config(base))(tokens).logits
        model = skeleton(config(base))
        source = open_weights(base, model, lambda: load_base(config(base)))
        fill(model, lambda name, _: source.get(name))
        tuned = model(tokens).logits

    assert torch.equal(held, expected)
    assert torch.equal(tuned, expected)
    assert (HEAD in source.names) == (shift != 0)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_the_type_of_a_folder_of_several_is_that_of_transformers(
    first: torch.dtype, shards: int, base: Path
) -> None:
    """Neither the order in the file nor the number of weights of a type decides."""
    other = torch.bfloat16 if first == torch.float32 else torch.float32
    stored = load_file(base / "model.safetensors")
    names = sorted(stored)
    typed = {name: stored[name].to(first if name == names[0] else other) for name in names}
    (base / "model.safetensors").unlink()
    change(base / "config.json", dtype=...)

    if shards == 1:
        save_file(typed, base / "model.safetensors", metadata={"format": "pt"})
    else:
        write_shards(base, [{name: typed.pop(name) for name in names[-2:]}, typed])

    theirs = AutoModelForCausalLM.from_pretrained(base).dtype
    assert dtype_of(config(base)) == theirs
    assert theirs == (first if shards == 1 else other)
