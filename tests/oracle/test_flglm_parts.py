"""Parts of different kinds (LoRA, all weights, neither) against transformers and PEFT in a loop."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fluvial.data import Example, SiteTexts
from fluvial.federation.store import StateStore
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, parse
from fluvial.training.evaluate import heldout
from fluvial.wire.payload import Payload, split
from fluvial.wire.tensors import Named
from tests.conftest import saved_model
from tests.oracle.test_flglm import flglm
from tests.support.models import UNMEASURED, four_layers
from tests.support.runs import run_table, run_with_stops

STEPS = 20
RATE = 1e-3
CLOSE = 1e-5
"""Largest difference of a parameter: sums over the whole batch, and over its rows."""
TRAIN = {
    "learning_rate": RATE,
    "weight_decay": 0.1,
    "max_grad_norm": 0.05,  # every step is clipped, so that a wrong norm shows
    # Above the rounding of gradients that are zero, such as those of keys' biases.
    "adam_epsilon": 1e-5,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 512,
    "num_train_epochs": STEPS,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "layers": "model.layers",
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "front": ("model.embed_tokens.",),
        "back": ("model.norm.", "lm_head."),
    },
    "gpt2": {
        "layers": "transformer.h",
        "targets": ("c_attn",),
        "front": ("transformer.wte.", "transformer.wpe."),
        "back": ("transformer.ln_f.", "lm_head."),
    },
}
"""Names of the four layers of a family, of its adapted modules, and of what is outside of
layers."""
NO_METER = {"sites": "none"}
Parts = Mapping[str, str]


def tied_model(family: str, folder: Path) -> Path:
    """Folder of a random model of four layers whose head is its embedding."""
    shape = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    if family == "gpt2":
        gpt2 = GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=128, **shape)
        return saved_model(GPT2LMHeadModel, gpt2, folder)

    llama = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        **shape,
    )
    return saved_model(LlamaForCausalLM, llama, folder)


def table_of(run_config: dict[str, Any], family: str, folder: Path, *, sites: int) -> Any:
    """A run of one round of twenty steps on all data of the largest sites."""
    partition = {"by": "column", "column": "client", "largest": sites}
    return run_config | {
        "rounds": 1,
        "model": {"name_or_path": str(tied_model(family, folder))},
        "data": run_config["data"] | {"partition": partition},
        "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": "attention"},
        "train": TRAIN,
    }


def place_of(family: str, name: str) -> str:
    """The part of a tensor or a module of a model of four layers, cut behind the first and before
    the last one."""
    names = FAMILIES[family]
    if name.startswith((f"{names['layers']}.0.", *names["front"])):
        return "front"
    if name.startswith((f"{names['layers']}.3.", *names["back"])):
        return "back"
    assert name.startswith(f"{names['layers']}."), name
    return "middle"


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
    }


def plain_model(config: RunConfig, family: str, parts: Parts) -> tuple[nn.Module, Any]:
    """A whole model of transformers, with PEFT's adapter and gradients where the parts say so."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    model.requires_grad_(False)
    full = [name for name in named(model) if parts[place_of(family, name)] == "full"]
    targets = [
        name
        for name, _ in model.named_modules()
        if name.endswith(FAMILIES[family]["targets"]) and parts[place_of(family, name)] == "lora"
    ]
    if targets:
        lora = LoraConfig(
            r=4,
            lora_alpha=config.lora.alpha,
            target_modules=targets,
            fan_in_fan_out=family == "gpt2",
        )
        model = get_peft_model(model, lora)

    parameters = named(model)
    factors = {name: p.detach() for name, p in parameters.items() if ".lora_" in name}
    shapes = ModelPool(config.model, config.adapter).layout
    start = initial_state(shapes, config.seed)
    with torch.no_grad():
        for name in factors:
            parameters[name].copy_(start[name])
    for name in full:
        parameters[name].requires_grad_(True)

    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    assert trained.keys() == {*factors, *full}
    return model, trained


def summed_loss(model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, int]:
    """The loss of a site's sequences, summed over their label tokens, and the number of these."""
    ids = [torch.tensor(example.input_ids) for example in examples]
    labels = pad_sequence([torch.tensor(each.labels)[1:] for each in examples], True, -100.0)
    mask = pad_sequence([torch.ones_like(each) for each in ids], True)
    output = model(input_ids=pad_sequence(ids, True), attention_mask=mask, use_cache=False)
    logits = output.logits[:, :-1].flatten(0, 1)
    total = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    return total, int((labels != -100).sum())


def plain_steps(
    config: RunConfig, family: str, parts: Parts, data: Mapping[str, Sequence[Example]]
) -> dict[str, Named]:
    """The change of each site's whole model, all of which have one middle, by plain steps."""
    models: dict[str, nn.Module] = {}
    trained: dict[str, dict[str, nn.Parameter]] = {}
    middle: dict[str, nn.Parameter] = {}
    for site in data:
        models[site], trained[site] = plain_model(config, family, parts)
        inner = dict(models[site].named_modules())
        for full_name, parameter in list(models[site].named_parameters()):
            name = full_name.removeprefix("base_model.model.").replace(".default.", ".")
            if name not in trained[site] or place_of(family, name) != "middle":
                continue
            path, leaf = full_name.rsplit(".", 1)
            shared = middle.setdefault(name, parameter)
            inner[path]._parameters[leaf] = shared
            trained[site][name] = shared

    before = {
        site: {name: parameter.detach().clone() for name, parameter in each.items()}
        for site, each in trained.items()
    }
    parameters = list({id(p): p for each in trained.values() for p in each.values()}.values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1, eps=1e-5)
    for _ in range(STEPS):
        losses = [summed_loss(models[site], examples) for site, examples in data.items()]
        loss = torch.stack([each for each, _ in losses]).sum() / sum(count for _, count in losses)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters, 0.05)
        assert norm > 0.05
        optimizer.step()
        optimizer.zero_grad()

    return {
        site: {
            name: parameter.detach() - (0 if ".lora_" in name else before[site][name])
            for name, parameter in each.items()
        }
        for site, each in trained.items()
    }


def data_of(config: RunConfig) -> dict[str, list[Example]]:
    pool = ModelPool(config.model, config.adapter)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    return {name: texts.load(name).train for name in texts.names}


def server_state(folder: Path) -> Named:
    """The factors and changes of weights in the newest checkpoint of a run."""
    with RunFolder(folder) as run:
        found = run.newest()
    assert found is not None
    saved = Payload(found[1].tensors, found[1].value("server", dict))
    return split(saved, ("model", "memories"))["model"].tensors


def assert_close(ours: Named, theirs: Named) -> None:
    assert ours.keys() == theirs.keys()
    moved = {name: float(tensor.abs().max()) for name, tensor in theirs.items()}
    assert max(moved.values()) > 100 * CLOSE
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).abs().max()) <= CLOSE, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kinds", ["lora lora full", "full lora full", "frozen full lora"])
def test_mixed_parts_are_a_plain_loop(
    family: str, kinds: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Twenty steps of AdamW with one clip of the whole gradient. Both models have one tensor as
    embedding and head, which belongs to the front."""
    parts = dict(zip(("front", "middle", "back"), kinds.split(), strict=True))
    table = table_of(run_config, family, tmp_path / "base", sites=1)
    table["method"] = {"name": "flglm", "mode": "sequential", "parts": parts, "leakage": NO_METER}
    config = parse(table, "test")
    result = run_table(table, tmp_path / "run")
    ((_, expected),) = plain_steps(config, family, parts, data_of(config)).items()
    assert_close(server_state(tmp_path / "run"), expected)

    assert result["adapter_sha256"] is None
    words = ("merged", "all weights", *(["frozen"] if "frozen" in kinds else []))
    card = (tmp_path / "run/model/README.md").read_text("utf-8")
    assert all(word in text for word in words for text in (result["parts"], card))
    assert_exported(config, tmp_path / "run", expected, family, result)


def assert_exported(
    config: RunConfig, folder: Path, change: Named, family: str, result: dict[str, Any]
) -> None:
    """Assert that the model's folder has the adapters merged, and is what the sites measured."""
    base = load_file(Path(config.model.name_or_path) / "model.safetensors")
    written = load_file(folder / "model" / "model.safetensors")
    scale = config.lora.alpha / config.lora.r
    expected = dict(base)
    for name, tensor in change.items():
        if ".lora_A." in name:
            b = change[name.replace(".lora_A.", ".lora_B.")]
            delta = scale * b @ tensor
            name = name.replace(".lora_A.weight", ".weight")
            tensor = delta.T if family == "gpt2" else delta
        if ".lora_B." not in name:
            expected[name] = base[name] + tensor

    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((written[name] - tensor).abs().max()) <= CLOSE, name

    model = config.model.model_copy(update={"name_or_path": str(folder / "model")})
    pool = ModelPool(model, None)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    with pool.model({}) as whole:
        sums = heldout(
            whole, texts.load(texts.names[0]).heldout, pad_token_id=pool.tokenizer.pad_token_id
        )
    assert result["heldout"]["final"]["loss"] == pytest.approx(sums.loss, abs=1e-5)
    assert result["heldout"]["base"]["loss"] > sums.loss + 1e-4


@pytest.mark.parametrize(
    ("family", "kinds"), [("llama", "lora lora full"), ("gpt2", "full lora full")]
)
def test_a_client_batch_of_mixed_parts_is_a_plain_loop(
    family: str, kinds: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Two sites with ends of their own and one middle, clipped by one norm over all of it."""
    parts = dict(zip(("front", "middle", "back"), kinds.split(), strict=True))
    table = table_of(run_config, family, tmp_path / "base", sites=2)
    table["method"] = {"name": "flglm", "ends": "own", "parts": parts, "leakage": NO_METER}
    config = parse(table, "test")
    data = data_of(config)
    assert len({len(examples) for examples in data.values()}) == 2
    run_table(table, tmp_path / "run")
    expected = plain_steps(config, family, parts, data)
    middle = server_state(tmp_path / "run")
    store = StateStore(tmp_path / "run/sites")
    for site in data:
        ours = {
            name: tensor for name, tensor in middle.items() if place_of(family, name) == "middle"
        }
        assert_close(ours | store.read(site, "ends").tensors, expected[site])


@pytest.fixture
def small(run_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return run_config | {"model": {"name_or_path": str(four_layers(tmp_path / "model"))}}


@pytest.mark.parametrize(("kind", "key"), [("lora", "adapter_sha256"), ("full", "model_sha256")])
def test_parts_of_one_kind_are_the_run_without_parts(
    kind: str, key: str, small: dict[str, Any], tmp_path: Path
) -> None:
    """To the bit, whatever the run tunes else."""
    usual = small | {"tune": kind}
    if kind == "full":
        usual = {name: value for name, value in usual.items() if name != "lora"}
    parts = dict.fromkeys(("front", "middle", "back"), kind)
    named_parts = {name: value for name, value in usual.items() if name != "tune"}
    whole = flglm(usual, tmp_path / "usual", mode="hierarchical", leakage=NO_METER)
    apart = flglm(
        named_parts, tmp_path / "apart", mode="hierarchical", parts=parts, leakage=NO_METER
    )
    assert whole[key]
    assert apart[key] == whole[key]
    assert apart["bytes"] == whole["bytes"]


def test_parts_without_all_weights_give_an_adapter_of_what_is_tuned(
    small: dict[str, Any], tmp_path: Path
) -> None:
    """With frozen ends the adapter has factors of the middle only."""
    result = flglm(
        small, tmp_path / "run", parts={"front": "frozen", "back": "frozen"}, leakage=NO_METER
    )
    tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert result["model_sha256"] is None
    assert {name.split(".layers.")[1].split(".")[0] for name in tensors} == {"1", "2"}


@pytest.mark.parametrize(("mode", "ends"), [("hierarchical", "shared"), ("client-batch", "own")])
def test_resume_is_a_straight_run(
    mode: str, ends: str, small: dict[str, Any], tmp_path: Path
) -> None:
    """Stopped after each event and continued: the same bits."""
    parts = {"front": "lora", "middle": "lora", "back": "full"}
    table = small | {"method": UNMEASURED | {"mode": mode, "ends": ends, "parts": parts}}
    table["method"]["leakage"] = NO_METER
    straight = run_table(table, tmp_path / "straight")
    result = run_with_stops(table, tmp_path / "stopped", (1, 2, 99))
    for key in ("model_sha256", "heldout", "bytes"):
        assert result[key] == straight[key]
    assert (straight["model_sha256"] is None) == (ends == "own")


@pytest.mark.parametrize("back", ["lora", "full"])
def test_a_chosen_cut_is_the_cut_in_numbers(
    back: str, small: dict[str, Any], tmp_path: Path
) -> None:
    """What is tuned follows from the cut that is chosen when the run begins."""
    settings = {
        "mode": "sequential",
        "parts": {"front": "frozen", "back": back},
        "leakage": NO_METER,
    }
    chosen = flglm(small, tmp_path / "chosen", front="auto", back="auto", **settings)
    number = flglm(small, tmp_path / "number", front=1, back=1, **settings)
    for key in ("adapter_sha256", "model_sha256", "bytes", "parts"):
        assert chosen[key] == number[key]
