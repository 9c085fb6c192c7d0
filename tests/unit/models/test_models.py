"""Models: one frozen base, adapters that do not disturb each other, and folders that PEFT reads."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fluvial.errors import ConfigError
from fluvial.models.adapters import SeededDropout, adapt
from fluvial.models.encoding import Encoder
from fluvial.models.loading import load_base, meta_base, resolve_device
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.models.tokenizers import load_tokenizer
from fluvial.models.tuning import (
    reseed_dropout,
    switch_dropout,
    tuned_parameters,
    write_weights,
)
from fluvial.wire.tensors import Layout, Named, factor, subtract, zeros_like
from tests.support.weights import read_weights

LORA = LoraSettings(r=4, lora_dropout=0.0, target_modules=("q_proj", "v_proj"))
TOKENS = torch.arange(3, 43).reshape(2, 20)


def config(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(name_or_path=str(folder), device="cpu", **changes)


def trained(layout: Layout, seed: int = 0) -> Named:
    """An adapter that changes the model: every factor random."""
    draw = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in layout.shapes}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.fixture(scope="module")
def pool(tiny_model: Path) -> ModelPool:
    return ModelPool(config(tiny_model), LORA)


def test_adapter_tensors_are_named_by_layer_module_and_factor(
    pool: ModelPool, tiny_model: Path
) -> None:
    expected = {
        f"model.layers.{layer}.self_attn.{module}.lora_{which}.weight": (4, 32)
        if which == "A"
        else (32, 4)
        for layer in range(2)
        for module in ("q_proj", "v_proj")
        for which in "AB"
    }
    assert dict(pool.layout.shapes) == expected
    loaded = {name: p.shape for name, p in load_base(config(tiny_model)).named_parameters()}
    assert {name: p.shape for name, p in pool.outline.base.named_parameters()} == loaded


def test_grouped_queries_make_narrower_values(tiny_gqa_model: Path) -> None:
    layout = ModelPool(config(tiny_gqa_model), LORA).layout
    shapes = dict(layout.shapes)
    assert shapes["model.layers.0.self_attn.v_proj.lora_B.weight"] == (16, 4)
    assert shapes["model.layers.0.self_attn.q_proj.lora_B.weight"] == (32, 4)


def test_borrowed_models_share_the_base_and_nothing_of_the_adapter(pool: ModelPool) -> None:
    adapter = trained(pool.layout)
    with pool.model(adapter) as one, pool.model(adapter) as two:
        assert one is not two
        ones = dict(one.named_parameters())
        twos = dict(two.named_parameters())
        assert ones.keys() == twos.keys()

        for name in ones:
            assert (ones[name].data_ptr() == twos[name].data_ptr()) == (factor(name) is None), name


def test_two_borrowed_models_do_not_disturb_each_other(pool: ModelPool) -> None:
    first = trained(pool.layout, 1)
    second = trained(pool.layout, 2)
    with pool.model(first) as model:
        alone = logits(model)
    with pool.model(first) as one, pool.model(second, trainable="A and B") as two:
        two.train()
        two(input_ids=TOKENS).logits.square().sum().backward()
        with torch.no_grad():
            for parameter in tuned_parameters(two).values():
                parameter.add_(1.0)

        assert torch.equal(logits(one), alone)
        assert all(parameter.grad is None for parameter in one.parameters())
        assert not one.training
        assert all(torch.equal(read_weights(one)[name], first[name]) for name in first)

    with pool.model(first) as again:
        assert torch.equal(logits(again), alone)


def test_a_model_is_reused_and_forgets_its_last_borrower(tiny_model: Path) -> None:
    pool = ModelPool(config(tiny_model), LORA)
    with pool.model(trained(pool.layout), trainable="A and B", checkpointing=True) as used:
        used.train()
        used(input_ids=TOKENS).logits.sum().backward()

    with pool.model(pool.base_state()) as model:
        assert model is used
        assert not model.training
        assert not any(
            parameter.requires_grad or parameter.grad is not None
            for parameter in model.parameters()
        )
        assert not any(
            getattr(module, "gradient_checkpointing", False) for module in model.modules()
        )


def test_a_fresh_model_is_not_in_training(tiny_model: Path) -> None:
    pool = ModelPool(config(tiny_model), LORA.model_copy(update={"lora_dropout": 0.5}))
    with pool.model(trained(pool.layout)) as model:
        assert not any(module.training for module in model.modules())
        assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_known_model_is_not_walked_over(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    """In a small model a traversal of its modules costs as much as a layer."""
    pool = ModelPool(config(tiny_model), LORA.model_copy(update={"lora_dropout": dropout}))
    one = trained(pool.layout, 1)
    other = trained(pool.layout, 2)

    with pool.model(one) as model:
        reseed_dropout(model, 1)
    for walk in ("named_modules", "children"):
        monkeypatch.setattr(nn.Module, walk, lambda *_, **__: pytest.fail("walked over"))
    with pool.model(other, trainable="B") as again:
        assert again is model
        reseed_dropout(model, 2)
        found = read_weights(model)

    assert all(torch.equal(found[name], other[name]) for name in other)


def test_a_model_without_references_is_dropped(tiny_model: Path) -> None:
    pool = ModelPool(config(tiny_model), LORA)
    with pool.model(pool.base_state()) as model:
        held = weakref.ref(model)
    del pool, model
    gc.collect()
    assert held() is None


def test_a_model_comes_back_after_an_error(tiny_model: Path) -> None:
    pool = ModelPool(config(tiny_model), LORA)
    with pytest.raises(ZeroDivisionError), pool.model(pool.base_state()) as borrowed:
        raise ZeroDivisionError
    with pool.model(pool.base_state()) as model:
        assert model is borrowed


def test_what_is_written_is_read(pool: ModelPool) -> None:
    adapter = trained(pool.layout, 3)
    with pool.model(adapter) as model:
        found = read_weights(model)
        assert found.keys() == adapter.keys()
        assert all(torch.equal(found[name], adapter[name]) for name in adapter)
        name = pool.layout.names[0]
        write_weights(model, {name: torch.zeros_like(adapter[name])})
        assert read_weights(model)[name].count_nonzero() == 0
        assert torch.equal(read_weights(model)[pool.layout.names[1]], adapter[pool.layout.names[1]])
        assert torch.equal(found[name], adapter[name]), "a read adapter is a copy"


@pytest.mark.parametrize(("trainable", "factors"), [("none", ""), ("A and B", "AB"), ("B", "B")])
def test_only_the_named_factors_get_gradients(
    pool: ModelPool, trainable: Literal["none", "A and B", "B"], factors: str
) -> None:
    with pool.model(trained(pool.layout), trainable=trainable) as model:
        if factors:
            logits_with_grad: Tensor = model(input_ids=TOKENS).logits
            logits_with_grad.square().sum().backward()  # type: ignore[no-untyped-call]

        for name, parameter in model.named_parameters():
            wanted = factor(name) is not None and str(factor(name)) in factors
            assert parameter.requires_grad == wanted, name
            assert (parameter.grad is not None) == wanted, name


def test_the_base_has_no_dropout_of_its_own(tiny_model: Path, tiny_gpt2_model: Path) -> None:
    assert json.loads((tiny_model / "config.json").read_text())["attention_dropout"] == 0.1
    assert json.loads((tiny_gpt2_model / "config.json").read_text())["resid_pdrop"] == 0.1
    for folder, target in ((tiny_model, "q_proj"), (tiny_gpt2_model, "c_attn")):
        pool = ModelPool(config(folder), LoraSettings(r=4, target_modules=(target,)))
        with pool.model(trained(pool.layout), trainable="A and B") as model:
            still = logits(model)
            switch_dropout(model, active=True)  # as `train` does
            reseed_dropout(model, 1)
            first = logits(model)
            torch.rand(100)  # the process-wide generator has no part in it
            assert torch.equal(logits(model), first)
            assert not torch.equal(first, still)
            settings = model.config.to_dict()  # type: ignore[operator, union-attr]

        stored = json.loads((folder / "config.json").read_text())
        assert {key: settings[key] for key in stored if "dropout" in key or "pdrop" in key} == {
            key: value for key, value in stored.items() if "dropout" in key or "pdrop" in key
        }, "what is written has the settings of the folder"


def test_lora_dropout_depends_on_its_seed_and_place_alone(tiny_model: Path) -> None:
    model = adapt(load_base(config(tiny_model)), LORA.model_copy(update={"lora_dropout": 0.5}))
    write_weights(model, trained(Layout.of(read_weights(model))))
    switch_dropout(model, active=True)
    places = [module.place for module in model.modules() if isinstance(module, SeededDropout)]
    assert len(set(places)) == len(places) == 4
    assert not any(isinstance(module, nn.Dropout) and module.training for module in model.modules())
    reseed_dropout(model, 1)
    first = logits(model)
    torch.rand(100)  # the process-wide generator has no part in it
    assert torch.equal(logits(model), first)
    reseed_dropout(model, 2)
    assert not torch.equal(logits(model), first)
    assert not torch.equal(logits(model.eval()), first)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    dropout = SeededDropout(0.25, place=3)
    hidden = torch.ones(200, 200)
    dropped = dropout(hidden)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float((dropped == 0).float().mean()) == pytest.approx(
        0.25, abs=0.01
    )  # 4.6 standard deviations
    assert not torch.equal(SeededDropout(0.25, place=4)(hidden), dropped)
    assert dropout.eval()(hidden) is hidden
    assert SeededDropout(0.0, place=0)(hidden) is hidden


def test_gpt2_is_adapted_at_its_fused_projection(tiny_gpt2_model: Path) -> None:
    pool = ModelPool(config(tiny_gpt2_model), LoraSettings(r=4, target_modules=("c_attn",)))
    assert dict(pool.layout.shapes) == {
        f"transformer.h.{layer}.attn.c_attn.lora_{which}.weight": shape
        for layer in range(2)
        for which, shape in (("A", (4, 32)), ("B", (96, 4)))
    }
    base = logits(load_base(config(tiny_gpt2_model)).eval())

    with pool.model(initial_state(pool.layout, 0)) as model:
        assert torch.equal(logits(model), base)
    with pool.model(trained(pool.layout)) as model:
        assert not torch.allclose(logits(model), base, atol=1e-3)


def test_the_initial_adapter_is_published_by_its_seed(pool: ModelPool) -> None:
    adapter = initial_state(pool.layout, 5)
    assert Layout.of(adapter) == pool.layout
    again = initial_state(pool.layout, 5)
    other = initial_state(pool.layout, 6)

    for name, tensor in adapter.items():
        assert torch.equal(tensor, again[name])
        if factor(name) == "B":
            assert tensor.count_nonzero() == 0
        else:
            assert not torch.equal(tensor, other[name])
            assert 0.8 / 32**0.5 < float(tensor.abs().max()) <= 1 / 32**0.5

    assert (
        len(
            {
                tuple(tensor.flatten().tolist())
                for name, tensor in adapter.items()
                if factor(name) == "A"
            }
        )
        == 4
    )


def test_the_initial_adapter_changes_nothing(pool: ModelPool, tiny_model: Path) -> None:
    base = logits(load_base(config(tiny_model)).eval())
    for adapter in (initial_state(pool.layout, 5), pool.base_state()):
        with pool.model(adapter) as model:
            assert torch.equal(logits(model), base)

    assert pool.base_state().keys() == zeros_like(adapter).keys()


def test_scaling_follows_alpha_and_rank(tiny_model: Path) -> None:
    adapter = None
    found = {}
    for alpha, rslora in ((4.0, False), (2.0, True), (8.0, False)):
        settings = LORA.model_copy(update={"lora_alpha": alpha, "use_rslora": rslora})
        pool = ModelPool(config(tiny_model), settings)
        adapter = adapter or trained(pool.layout)

        with pool.model(adapter) as model:
            found[alpha] = logits(model)

    assert torch.equal(found[4.0], found[2.0]), "4 / 4 = 2 / sqrt(4)"
    assert not torch.equal(found[4.0], found[8.0])


def test_a_saved_adapter_is_a_peft_folder(
    pool: ModelPool, tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = trained(pool.layout, 9)
    pool.save(adapter, tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        f.name for f in tmp_path.iterdir()
    }
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()

    with pool.model(adapter) as model:
        assert torch.equal(logits(loaded), logits(model))
    difference = subtract(read_weights(loaded), adapter)
    assert all(tensor.count_nonzero() == 0 for tensor in difference.values())
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("stream")["input_ids"]
        == pool.tokenizer("stream")["input_ids"]
    )


def test_a_tokenizer_larger_than_the_model_does_not_change_the_saved_adapter(
    tiny_model: Path, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    pool = ModelPool(config(tiny_model), LoraSettings())
    pool.tokenizer.add_special_tokens({"unk_token": "[UNKNOWN]"})
    adapter = trained(pool.layout, 9)
    pool.save(adapter, tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()

    with pool.model(adapter) as model:
        assert torch.equal(logits(loaded), logits(model)), "no row was added"
    assert not pool.exports_tokenizer()


def test_meta_base_has_names_but_no_memory(pool: ModelPool, tiny_model: Path) -> None:
    base = meta_base(config(tiny_model))
    assert {parameter.device.type for parameter in base.parameters()} == {"meta"}
    assert {n: p.shape for n, p in base.named_parameters()} == {
        n: p.shape for n, p in load_base(config(tiny_model)).named_parameters()
    }
    adapted = adapt(base, LORA)
    assert {n: tuple(p.shape) for n, p in tuned_parameters(adapted).items()} == dict(
        pool.layout.shapes
    )


def test_the_base_is_held_in_the_wanted_type_and_the_adapter_in_fp32(tiny_model: Path) -> None:
    pool = ModelPool(config(tiny_model, dtype="bfloat16"), LORA)
    with pool.model(trained(pool.layout)) as model:
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.bfloat16 if factor(name) is None else torch.float32), (
                name
            )


def test_the_tokenizer_pads_on_the_right_with_something(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(config(tiny_model))
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<pad>")
    without = load_tokenizer(config(tiny_model))
    without.pad_token = None
    without.save_pretrained(tmp_path)
    assert load_tokenizer(config(tmp_path)).pad_token == "</s>"


def test_an_answer_ends_where_the_context_ends(tiny_gpt2_model: Path) -> None:
    """GPT-2 has no position beyond its context, so one more token would be an error."""
    pool = ModelPool(config(tiny_gpt2_model), None)
    context = pool.outline.context
    assert context is not None
    encoder = Encoder.of(pool.tokenizer)
    prompts = ["a b c d " * repeats for repeats in range(1, context)]
    lengths = [len(encoder.prompt(prompt)) for prompt in prompts]
    near = next(p for p, length in zip(prompts, lengths, strict=True) if length > context - 9)
    answers = pool.generate({}, [near, prompts[-1]], max_new_tokens=20)

    assert len(encoder.prompt(near)) < context < lengths[-1]
    assert answers == [
        pool.generate({}, [near], max_new_tokens=context - len(encoder.prompt(near)))[0],
        "",
    ]
    assert not any(answer.cut for answer in answers)  # what ends them is the context


def test_generate_is_greedy_and_leaves_the_prompt_out(pool: ModelPool) -> None:
    adapter = trained(pool.layout)
    prompts = ["The river", "def mean(values):"]
    answers = pool.generate(adapter, prompts, max_new_tokens=5)
    assert answers == pool.generate(adapter, prompts, max_new_tokens=5)
    tokens = pool.tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    expected = []

    with pool.model(adapter) as model, torch.no_grad():
        for _ in range(5):
            following = model(input_ids=tokens).logits[:, -1:].argmax(-1)
            expected.append(int(following))
            if expected[-1] == pool.tokenizer.eos_token_id:
                break
            tokens = torch.cat([tokens, following], dim=1)

    assert answers[0] == pool.tokenizer.decode(expected, skip_special_tokens=True)
    assert answers[0].cut == (pool.tokenizer.eos_token_id not in expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            LoraSettings(r=4, target_modules=("q_proj", "c_attn")),
            r"lora.target_modules: the model has no linear module 'c_attn'; it has down_proj, "
            r"gate_proj, k_proj",
        ),
        (LoraSettings(r=4, target_modules=("norm",)), "no linear module 'norm'"),
        (LoraSettings(r=4, target_modules=("embed_tokens",)), "no linear module 'embed_tokens'"),
        (LoraSettings(r=33), "lora.r=33 exceeds dimension 32 of 'q_proj'; choose at most 32"),
    ],
    ids=["other model", "norm", "embedding", "rank"],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tiny_model: Path, settings: LoraSettings, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt(meta_base(config(tiny_model)), settings)


def test_rank_is_bound_by_the_narrowest_target(tiny_gqa_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.r=17 exceeds dimension 16 of 'v_proj'"):
        adapt(meta_base(config(tiny_gqa_model)), LORA.model_copy(update={"r": 17}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", r"model.name_or_path: there is no folder './no/such/folder'"),
        ("~/no-such-folder", "there is no folder"),
        (
            "nobody/no-such-model",
            "model.name_or_path='nobody/no-such-model' is no folder here .*name a local folder",
        ),
    ],
)
def test_a_model_that_is_not_there_is_a_config_error(name: str, message: str) -> None:
    for load in (load_tokenizer, load_base, meta_base):
        with pytest.raises(ConfigError, match=message):
            load(ModelConfig(name_or_path=name, device="cpu"))


def test_a_broken_model_folder_is_a_config_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(config(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])

    with pytest.raises(ConfigError, match=r"model\.safetensors: is damaged or cut short"):
        load_base(config(broken))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("banana", "model.device='banana': choose 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("meta", "model.device='meta': choose"),
        ("cuda:99", r"model.device='cuda:99': this machine has \d+ CUDA devices; use 'auto'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_device(name)
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
