"""Parts of a pool train as the whole model does, and hold nothing else than their own."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fluvial.errors import ConfigError
from fluvial.models import base, base_weights
from fluvial.models.outline import Outline
from fluvial.models.parts import PartPool
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.split import Cut, Part
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.models.tuning import (
    checkpoint_layers,
    reseed_dropout,
    switch_dropout,
    tuned_parameters,
    whole_layers,
)
from fluvial.models.weight_sources import FolderSource, mapped_tensors, tensor_files
from fluvial.training.train import summed_loss
from fluvial.wire.tensors import Layout, Named
from tests.oracle.test_split import LAYERS, batch, config_of, gradients, split_logits

CUT = Cut(LAYERS, 2, 1)
LORA = LoraSettings(r=3, lora_dropout=0.2)


def pools_of(config: ModelConfig, lora: LoraSettings | None = LORA) -> tuple[PartPool, PartPool]:
    """Return the site's pool and the server's."""
    return PartPool(config, lora, CUT, server=False), PartPool(config, lora, CUT, server=True)


def start_of(layout: Layout) -> Named:
    """Return a state in which both factors of every module have a gradient."""
    state = initial_state(layout, 5)
    draw = torch.Generator().manual_seed(5)
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in state.items()
    }


@contextmanager
def borrowed(
    config: ModelConfig, state: Named, *, checkpointing: bool = False
) -> Iterator[tuple[Part, Part]]:
    """Lend a site's part and a server's that hold their parts of `state`, with dropout on."""
    site_pool, server_pool = pools_of(config)
    own = {name: state[name] for name in site_pool.layout.names}
    middle = {name: state[name] for name in server_pool.layout.names}

    with (
        site_pool.part(own, trainable=True, checkpointing=checkpointing) as site,
        server_pool.part(middle, trainable=True, checkpointing=checkpointing) as server,
    ):
        site.switch_dropout(active=True)
        server.switch_dropout(active=True)
        yield site, server


@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_layouts_of_both_ends_are_the_layout_of_the_whole_model(
    kind: str, lora: LoraSettings | None, tmp_path: Path
) -> None:
    config = config_of(kind, tmp_path)
    if lora is not None:
        lora = LoraSettings(r=3, lora_dropout=0)
    site, server = pools_of(config, lora)
    whole = ModelPool(config, lora).layout

    assert not set(site.layout.names) & set(server.layout.names)
    assert tuple(sorted(site.layout.shapes + server.layout.shapes)) == whole.shapes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral", "qwen2", "falcon", "bloom"])
def test_adapters_after_20_steps_with_dropout_and_one_clip_are_those_of_the_whole_model(
    kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    config = config_of(kind, tmp_path)
    pool = ModelPool(config, LORA)
    state = start_of(pool.layout)
    ids, mask, labels = batch()

    with (
        pool.model(state, trainable="A and B") as whole,
        borrowed(config, state, checkpointing=checkpointing) as (site, server),
    ):
        switch_dropout(whole, active=True)
        if checkpointing:
            checkpoint_layers(whole)
        ours = site.tuned() | server.tuned()
        plain = tuned_parameters(whole)
        optimizers = [torch.optim.AdamW(p.values(), lr=1e-3) for p in (ours, plain)]
        assert ours.keys() == plain.keys()

        for step in range(20):
            site.reseed_dropout(step)
            server.reseed_dropout(step)
            reseed_dropout(whole, step)
            gradients(site, server, ids, mask, labels)
            logits = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = summed_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) / 12
            loss.backward()  # type: ignore[no-untyped-call]

            for parameters, optimizer in zip((ours, plain), optimizers, strict=True):
                nn.utils.clip_grad_norm_(parameters.values(), 0.5)
                optimizer.step()
                optimizer.zero_grad()

        if checkpointing:
            whole_layers(whole)
        moved = max(float((plain[name] - state[name]).detach().abs().max()) for name in plain)
        assert moved > 5e-3
        for name, parameter in plain.items():
            assert float((ours[name] - parameter).detach().abs().max()) <= 1e-5, name


def test_micro_batches_that_are_held_at_once_give_the_gradients_of_one_after_another(
    tmp_path: Path,
) -> None:
    config = config_of("llama", tmp_path)
    ids, mask, labels = batch()
    grads = []

    for together in (False, True):
        with borrowed(config, start_of(ModelPool(config, LORA).layout)) as (site, server):
            if together:
                held = [_forward(site, server, ids, mask, labels, row) for row in range(3)]
                for tensors in reversed(held):
                    _backward(*tensors)
            else:
                for row in (2, 1, 0):
                    _backward(*_forward(site, server, ids, mask, labels, row))
            tuned = site.tuned() | server.tuned()
            grads.append({name: p.grad for name, p in tuned.items() if p.grad is not None})

    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) > 20
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def _forward(
    site: Part, server: Part, ids: Tensor, mask: Tensor, labels: Tensor, row: int
) -> tuple[Tensor, ...]:
    ids, mask, labels = ids[row : row + 1], mask[row : row + 1], labels[row : row + 1]
    site.reseed_dropout(row)
    server.reseed_dropout(row)
    front = site.embed(ids, mask)
    sent = front.detach().requires_grad_()
    middle = server.middle(sent, mask)
    received = middle.detach().requires_grad_()
    logits = site.logits(received, mask)
    loss = summed_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return front, sent, middle, received, loss


def _backward(front: Tensor, sent: Tensor, middle: Tensor, received: Tensor, loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    middle.backward(received.grad)  # type: ignore[no-untyped-call]
    front.backward(sent.grad)  # type: ignore[no-untyped-call]


@torch.no_grad()
def test_parts_of_several_threads_share_frozen_weights_and_not_their_adapters(
    tmp_path: Path,
) -> None:
    config = config_of("llama", tmp_path)
    site_pool, server_pool = pools_of(config)
    whole = ModelPool(config, LORA)
    ids, mask, _ = batch()
    states = [{n: t * s for n, t in start_of(whole.layout).items()} for s in (0.5, 1.0, 2.0)]

    def logits(state: Named) -> tuple[Tensor, set[int], set[int]]:
        middle = {name: state[name] for name in server_pool.layout.names}
        own = {name: state[name] for name in site_pool.layout.names}
        with (
            server_pool.part(middle, trainable=False) as server,
            site_pool.part(own, trainable=False) as site,
        ):
            for _ in range(20):
                got = split_logits(site, server, ids, mask)
            tuned = {id(p) for p in server.tuned().values()}
            frozen = {id(p) for p in server.model.parameters()} - tuned
            return got, frozen, tuned

    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(logits, states))

    for state, (got, frozen, _) in zip(states, results, strict=True):
        with whole.model(state) as model:
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        real = mask.bool()
        assert float((got[real] - expected[real]).abs().max()) <= 1e-5
        assert frozen == results[0][1]


@pytest.mark.parametrize("lora", [LORA, None])
def test_a_pool_reads_its_own_weights_only_and_takes_memory_for_no_others(
    lora: LoraSettings | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("llama", tmp_path)
    inside = FolderSource.get
    read: set[str] = set()

    def watch(source: FolderSource, name: str) -> Tensor:
        read.add(name)
        return inside(source, name)

    monkeypatch.setattr(FolderSource, "get", watch)
    whole = {name for name, _ in ModelPool(config, None).layout.shapes}
    middle = {name for name in whole if name.startswith(("model.layers.2.", "model.layers.3."))}
    site, server = pools_of(config, lora)

    for pool, own in ((site, whole - middle), (server, middle)):
        read.clear()
        with pool.part(start_of(pool.layout), trainable=True) as part:
            assert read == own
            named = dict(part.model.named_parameters())
            storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in named.values()}
            own_bytes = sum(t.numel() * t.element_size() for t in part.own_weights().values())
            absent = [name for name in named if not part.holds(name)]
            assert absent
            held = sum(storage.nbytes() for storage in storages.values())
            assert own_bytes <= held <= own_bytes + 4 * len(absent)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_pool_converts_its_own_experts_and_reads_no_others(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(kind, tmp_path)
    stored = tensor_files(Path(config.name_or_path))
    assert any(".experts.0." in name for name in stored), "experts are stored one by one"
    inside = FolderSource.get
    read: set[str] = set()

    def watch(source: FolderSource, name: str) -> Tensor:
        read.add(name)
        return inside(source, name)

    def watch_all(folder: Path, names: Iterable[str]) -> Named:
        read.update(names)
        return mapped_tensors(folder, names)

    monkeypatch.setattr(FolderSource, "get", watch)
    monkeypatch.setattr(base_weights, "mapped_tensors", watch_all)
    monkeypatch.setattr(base, "load_base", lambda _: pytest.fail("the whole model was loaded"))

    for pool in pools_of(config, None):
        read.clear()
        pool.load()
        in_middle = {name.startswith(("model.layers.2.", "model.layers.3.")) for name in read}
        assert in_middle == {pool.server}
        assert any(".experts.0." in name for name in read)


def test_the_cut_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    model = Outline(config_of("llama", tmp_path), None).base

    assert Cut.of(model) == Cut(LAYERS, 1, 1)
    with pytest.raises(ConfigError, match=r"method.front=3 and method.back=2: the model has 5"):
        Cut.of(model, 3, 2)
