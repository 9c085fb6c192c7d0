"""Packed records: their logits, losses and gradients are those of each record alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fluvial.data import Example
from fluvial.data.packing import pack
from fluvial.errors import ConfigError
from fluvial.models.behaviour import check_packing, packed
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.seeds import generator
from fluvial.training.config import TrainConfig
from fluvial.training.train import collate, predictions, summed_loss, train
from fluvial.wire.tensors import relative_error, subtract
from tests.conftest import saved_model

SIZE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def kinds() -> dict[str, Any]:
    """Plain models of transformers, by name, with large weights so that a leak shows."""
    import transformers as tf

    small = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    mistral = tf.MistralConfig(**SIZE, sliding_window=5)
    return {
        "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZE, initializer_range=0.3)),
        "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**SIZE, initializer_range=0.3)),
        "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(**small, initializer_range=0.3)),
        "sliding window": (tf.MistralForCausalLM, mistral),
    }


def model_of(kind: str, attention: str) -> Any:
    make, config = kinds()[kind]
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make(config).eval()


def records(count: int) -> list[Example]:
    draw = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 16, (count,), generator=draw).tolist()
    ids = [torch.randint(3, 300, (length,), generator=draw).tolist() for length in lengths]
    return [Example(each, each) for each in ids]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "sliding window"])
def test_logits_and_gradients_are_those_of_single_records(kind: str, attention: str) -> None:
    model = model_of(kind, attention)
    some = records(12)
    sequences = pack(some, 32)
    assert any(len(sequence.lengths) > 2 for sequence in sequences)
    batch = collate(sequences, pad_token_id=0)
    logits, labels = predictions(model, batch)
    loss = summed_loss(logits, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    shared = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    rows = logits.reshape(len(sequences), -1, logits.shape[-1])
    total = torch.zeros(())
    for number, sequence in enumerate(sequences):
        start = 0
        for length in sequence.lengths:
            ids = torch.tensor([sequence.input_ids[start : start + length]])
            alone = model(input_ids=ids).logits[0]
            # fp32 sums in another order
            torch.testing.assert_close(
                rows[number, start : start + length - 1], alone[:-1], rtol=1e-4, atol=1e-4
            )
            total = total + nn.functional.cross_entropy(alone[:-1], ids[0, 1:], reduction="sum")
            start += length

    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    total.backward()  # type: ignore[no-untyped-call]
    for parameter, gradient in zip(model.parameters(), shared, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3)


def test_joined_without_bounds_they_would_leak() -> None:
    """Otherwise the test above would compare a thing with itself."""
    model = model_of("llama", "sdpa")
    (sequence,) = pack(records(3), 64)
    plain = Example(sequence.input_ids, sequence.labels)
    with torch.no_grad():
        leaking, _ = predictions(model, collate([plain], 0))
        kept, _ = predictions(model, collate([sequence], 0))
    second = sequence.lengths[0]
    assert torch.allclose(leaking[: second - 1], kept[: second - 1], atol=1e-4)
    assert float((leaking[second:] - kept[second:]).norm() / kept[second:].norm()) > 0.1


def test_flash_attention_gets_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention finds the bounds in one row only; the loss is the same in that form."""
    model = model_of("llama", "sdpa")
    batch = collate(pack(records(12), 32), 0)
    with torch.no_grad():
        rows, labels = predictions(model, batch)
        arguments = packed(model, batch["input_ids"], batch["position_ids"])
        assert arguments["input_ids"].shape[0] > 1
        seen = model.config
        monkeypatch.setattr(model, "config", Flash())
        arguments = packed(model, batch["input_ids"], batch["position_ids"])
        model.config = seen
        assert arguments["input_ids"].shape[0] == 1
        one_row = model(**arguments).logits.reshape(*batch["input_ids"].shape, -1)

    # fp32 sums in another order
    torch.testing.assert_close(one_row[:, :-1].flatten(0, 1), rows, rtol=1e-4, atol=1e-4)
    assert labels.shape == rows.shape[:1]


class Flash:
    """The configuration of a model with flash attention, as far as `packed` looks at it."""

    _attn_implementation = "flash_attention_2"


def unpackable() -> dict[str, Any]:
    """Architectures that know no bounds, by name."""
    import transformers as tf

    return {
        "bloom": (
            tf.BloomForCausalLM,
            tf.BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=4),
        ),
        "mamba": (
            tf.MambaForCausalLM,
            tf.MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4),
        ),
    }


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_an_architecture_that_would_leak_is_refused(
    kind: str, tmp_path: Path, run_config: dict[str, Any]
) -> None:
    make, config = unpackable()[kind]
    folder = saved_model(make, config, tmp_path)
    table = run_config | {
        "model": {"name_or_path": str(folder), "device": "cpu"},
        "lora": {"target_modules": "all-linear"},
        "data": run_config["data"] | {"packing": True},
    }
    with pytest.raises(ConfigError, match=r"data.packing: \w+ForCausalLM .* takes no positions"):
        plan(parse(table, "test"))
    with pytest.raises(ConfigError, match=r"data.packing: \w+ForCausalLM .* takes no positions"):
        ModelPool(ModelConfig(**table["model"]), LoraSettings(**table["lora"])).check_packing()


def test_a_model_that_takes_positions_and_leaks_is_refused(tiny_model: Path) -> None:
    pool = ModelPool(ModelConfig(name_or_path=str(tiny_model), device="cpu"), LoraSettings(r=4))
    pool.check_packing()

    with pool.model(pool.base_state()) as model:
        inner: Any = model
        base = inner.get_base_model()
        forward = base.model.forward

        def leaking(**options: Any) -> Any:
            """Positions reach the rotary embedding alone, and no bound the attention."""
            ids = options["input_ids"]
            return forward(**options | {"attention_mask": torch.ones_like(ids)})

        base.model.forward = leaking
        with pytest.raises(ConfigError, match="LlamaForCausalLM .* read the one before it"):
            check_packing(model, "leaky")
        del base.model.forward


def test_training_on_packed_records_gives_the_same_adapter(tiny_model: Path) -> None:
    lora = LoraSettings(r=4, lora_dropout=0.0)
    pool = ModelPool(ModelConfig(name_or_path=str(tiny_model), device="cpu"), lora)
    start = initial_state(pool.layout, 0)
    some = records(12)
    updates = []

    for examples in (some, pack(some, 32)):
        config = TrainConfig(
            learning_rate=0.1, optim="sgd", max_steps=4, per_device_train_batch_size=len(examples)
        )
        with pool.model(start, trainable="A and B") as model:
            report = train(model, examples, config, pad_token_id=0, generator=generator(0))
        updates.append(subtract(report.weights, start))
        assert report.label_tokens == 4 * sum(each.label_tokens for each in some)

    assert relative_error(*updates) < 1e-8  # squared; fp32 sums in another order
