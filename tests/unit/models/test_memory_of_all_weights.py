"""Where all weights are tuned: nothing is held twice, and what has not changed is neither held nor
sent."""

import math
from pathlib import Path

import pytest
import torch

from fluvial.codecs.quantise import Identity
from fluvial.errors import WireError
from fluvial.federation.sites import read_state_message, state_message
from fluvial.methods.fedcybgd.blocks import partition
from fluvial.methods.fedcybgd.ledger import Commit, Ledger
from fluvial.methods.fedcybgd.memory import client_memory, process_memory
from fluvial.methods.fedcybgd.visit_sizes import Cache, Sizes
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import changed, initial_state, no_change
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, WeightedMean


@pytest.fixture
def pool(tiny_model: Path) -> ModelPool:
    return ModelPool(ModelConfig(name_or_path=str(tiny_model), device="cpu", dtype="float32"), None)


def one_layer(pool: ModelPool) -> Named:
    """A change of layer 1, and none of anything else."""
    draw = torch.Generator().manual_seed(3)
    state = pool.base_state()

    for name in state:
        if ".layers.1." in name:
            state[name] = 0.01 * torch.randn(state[name].shape, generator=draw)

    return state


def test_models_that_are_measured_at_a_time_share_the_base(pool: ModelPool) -> None:
    state = one_layer(pool)
    with pool.model(state) as first, pool.model(pool.base_state()) as second:
        left = dict(first.named_parameters())
        right = dict(second.named_parameters())
        assert {name for name in left if left[name] is not right[name]} == changed(state).keys()

        for name, parameter in left.items():
            expected = pool.base.get(name).float() + state[name]
            assert torch.equal(parameter, expected.to(parameter.dtype)), name

    with pool.model(state, trainable="A and B") as third:
        assert not any(parameter is left[name] for name, parameter in third.named_parameters())


def test_no_change_takes_no_memory_and_is_not_sent(pool: ModelPool) -> None:
    state = one_layer(pool)
    assert no_change((1000, 1000)).untyped_storage().nbytes() == 4
    assert all(
        tensor.untyped_storage().nbytes() == 4 for tensor in initial_state(pool.layout, 0).values()
    )
    message = Payload.from_bytes(
        state_message(changed(state), pool.layout, which="sent").to_bytes()
    )
    assert message.tensors.keys() == {name for name in state if ".layers.1." in name}
    assert read_state_message(message, pool.layout).keys() == message.tensors.keys()
    nothing = Payload.from_bytes(state_message({}, pool.layout).to_bytes())
    assert read_state_message(nothing, pool.layout) == {}
    whole = {name: torch.ones(shape) for name, shape in pool.layout.shapes}
    again = read_state_message(
        Payload.from_bytes(state_message(whole, pool.layout).to_bytes()), pool.layout
    )
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_state_that_does_not_fit_is_refused(pool: ModelPool) -> None:
    name = pool.layout.names[0]
    shape = dict(pool.layout.shapes)[name]
    for tensors in (
        {"model.other.weight": torch.zeros(2)},
        {name: torch.zeros(3)},
        {name: torch.zeros(shape, dtype=torch.float64)},
        {name: torch.full(shape, math.nan)},
    ):
        with pytest.raises(WireError, match="state: "):
            read_state_message(Payload(tensors), pool.layout)


def test_a_checkpoint_has_only_what_moved(pool: ModelPool) -> None:
    parts = partition(pool.layout)
    codecs = [Identity.of(block.layout) for block in parts.blocks]
    ledger = Ledger(parts, codecs, initial_state(pool.layout, 0))
    step = {name: torch.ones(shape) for name, shape in parts.blocks[1].layout.shapes}
    ledger.commit(1, Commit(1.0, (codecs[1].encode(step),), (5,)))
    saved = Payload.from_bytes(ledger.save().to_bytes())
    assert {n for n in saved.tensors if n.startswith("state/")} == {f"state/{n}" for n in step}
    restored = Ledger(parts, codecs, initial_state(pool.layout, 0))
    restored.restore(saved)
    assert restored.versions == [0, 1]

    for name, tensor in ledger.state.items():
        assert torch.equal(restored.state[name], tensor), name


def test_a_mean_in_pieces_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    updates = [
        {"a": torch.randn(37, 5, generator=draw), "b": torch.randn(11, generator=draw)}
        for _ in range(3)
    ]

    def folded() -> Named:
        mean = WeightedMean()
        for weight, update in enumerate(updates, start=1):
            WeightedMean.check(update, weight)
            mean.add(update, weight)

        return mean.mean()

    whole = folded()
    monkeypatch.setattr(WeightedMean, "_PIECE", 7)
    pieces = folded()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_the_memory_of_a_process_is_that_of_its_parts() -> None:
    shapes = {f"model.layers.{i}.w.weight": (100, 10) for i in range(4)} | {
        "model.embed_tokens.weight": (500, 10)
    }
    parts = partition(Layout(tuple(sorted(shapes.items()))))
    sizes = Sizes.of(parts, 0)
    found = process_memory(sizes, Cache(2, 4, 1100), width=4, moved=2, coded=1100, workers=2)
    assert (
        found.visit
        == client_memory(sizes, Cache(2, 4, 1100), width=4).visit()
        == 4 * 9000 + 20 * 1000
    )
    assert (found.state, found.log, found.server) == (8000, 2200, 10200)
    assert found.evaluate == 4 * 9000 + 8000 + 2 * (8000 + 8000)
    assert found.peak == 10200 + max(56000, 28000, 76000)
