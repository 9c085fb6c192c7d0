"""The paper's download: the slim model equals the whole one with these layers and units silent."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluvial.methods.fedcybgd.proxy import (
    Anatomy,
    Manifest,
    ProxySettings,
    Prune,
    Rescale,
    cut,
    slim,
)
from fluvial.models.loading import load_base
from fluvial.models.pretrained import ModelConfig
from fluvial.training.train import collate, predictions
from fluvial.wire.payload import Payload
from tests.support.proxy import (
    _OF_KIND,
    BOTH,
    EXAMPLES,
    LAYERS,
    WHOLE,
    Tiny,
    filled,
    kept_fraction,
    logits,
    make,
    stack,
)


@pytest.mark.parametrize("kind", _OF_KIND)
def test_nothing_dropped_and_nothing_pruned_is_the_whole_model_bitwise(
    kind: str, tiny: Callable[[str], Tiny]
) -> None:
    whole = tiny(kind)
    manifest = whole.plan(WHOLE, 2)
    assert kept_fraction(manifest) == 1
    assert torch.equal(logits(whole.slim(manifest)), logits(whole.model))


def test_also_with_the_models_of_the_other_tests(
    tiny_model: Path, tiny_gqa_model: Path, tiny_gpt2_model: Path
) -> None:
    for folder in (tiny_model, tiny_gqa_model, tiny_gpt2_model):
        base = load_base(ModelConfig(name_or_path=str(folder), device="cpu")).eval()
        whole = Tiny(
            folder, base, {name: parameter.detach() for name, parameter in base.named_parameters()}
        )
        assert torch.equal(logits(whole.slim(whole.plan(WHOLE, 0))), logits(base))


@pytest.mark.parametrize("kind", _OF_KIND)
def test_a_dropped_layer_is_the_identity_bitwise(kind: str, tiny: Callable[[str], Tiny]) -> None:
    whole = tiny(kind)
    manifest = replace(whole.plan(WHOLE, 0), dropped=(2, 4))
    proxy = whole.slim(manifest)
    without = copy.deepcopy(whole.model)

    for index in (2, 4):
        stack(without, manifest.anatomy)[index].forward = lambda hidden, *_args, **_options: hidden
    assert torch.equal(logits(proxy), logits(without))
    assert not torch.equal(logits(proxy), logits(whole.model))
    assert sum(p.numel() for p in stack(proxy, manifest.anatomy)[2].parameters()) == 0


def test_a_model_with_dropped_layers_is_the_shorter_model(tmp_path: Path) -> None:
    whole = make("gqa", tmp_path / "whole")
    shorter = make("gqa", tmp_path / "shorter", layers=4)
    proxy = whole.slim(replace(whole.plan(WHOLE, 0), dropped=(2, 4)))
    places = {0: 0, 1: 1, 2: 3, 3: 5}
    weights = {
        name: whole.weights[name]
        if ".layers." not in name
        else whole.weights[
            ".".join(
                [*name.split(".")[:2], str(places[int(name.split(".")[2])]), *name.split(".")[3:]]
            )
        ]
        for name in shorter.weights
    }
    assert torch.equal(logits(filled(shorter.empty(), weights)), logits(proxy))


@pytest.mark.parametrize("prune", ["neurons", BOTH])
@pytest.mark.parametrize("kind", _OF_KIND)
def test_a_pruned_model_is_the_whole_one_whose_units_are_silent(
    kind: str, prune: Prune, tiny: Callable[[str], Tiny]
) -> None:
    whole = tiny(kind)
    manifest = whole.plan(ProxySettings(kept=0.7, drop=0, prune=prune), 1)
    assert len(manifest.neurons) == LAYERS - 1
    assert bool(manifest.groups) == (prune == BOTH)
    silenced = copy.deepcopy(whole.model)

    for index, layer in enumerate(manifest.anatomy.layers):
        for part, table in ((layer.mlp, manifest.neurons), (layer.attention, manifest.groups)):
            if part is None or index not in table:
                continue
            gone = torch.tensor([unit not in table[index] for unit in range(part.units)])
            weight: Any = silenced.get_submodule(part.out).weight
            inputs = weight if kind == "gpt2" else weight.T

            with torch.no_grad():
                inputs[gone.repeat_interleave(len(inputs) // part.units)] = 0

    torch.testing.assert_close(logits(whole.slim(manifest)), logits(silenced), rtol=1e-4, atol=1e-4)
    assert float((logits(silenced) - logits(whole.model)).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["gqa", "gpt2"])
def test_a_gain_multiplies_the_change_that_a_layer_makes(
    kind: str, tiny: Callable[[str], Tiny]
) -> None:
    whole = tiny(kind)
    proxy = whole.slim(replace(whole.plan(WHOLE, 0), gains={3: 2.5}))
    seen: dict[str, Tensor] = {}

    def watch(model: nn.Module, name: str) -> None:
        layer = stack(model, Anatomy.of(model, "neurons"))[3]
        layer.register_forward_hook(
            lambda _m, args, output: seen.update({name: output, f"{name} in": args[0]})
        )

    plain = copy.deepcopy(whole.model)
    watch(plain, "plain")
    watch(proxy, "proxy")
    logits(plain)
    logits(proxy)
    expected = seen["plain in"] + 2.5 * (seen["plain"] - seen["plain in"])
    assert torch.equal(seen["proxy in"], seen["plain in"])
    assert torch.equal(seen["proxy"], expected)
    both = Rescale(2.0)(plain, (torch.ones(1),), (torch.full((1,), 3.0), "weights"))
    assert both == (torch.full((1,), 5.0), "weights")  # as layers returned it before transformers 5


@pytest.mark.parametrize("kind", _OF_KIND)
def test_a_message_gives_the_same_proxy_on_the_other_side(
    kind: str, tiny: Callable[[str], Tiny]
) -> None:
    whole = tiny(kind)
    settings = ProxySettings(kept=0.5, drop=0.25, prune=BOTH, randomised=True)
    manifest = whole.plan(settings, 0, seed=3)
    assert manifest.dropped
    assert manifest.neurons
    data = Payload(cut(whole.weights, manifest), {"manifest": manifest.values()}).to_bytes()
    received = Payload.from_bytes(data)
    empty = whole.empty()
    read = Manifest.from_values(received.value("manifest", dict), Anatomy.of(empty, BOTH), (0,))
    assert read == manifest
    there = filled(slim(empty, read), received.tensors)
    assert torch.equal(logits(there), logits(whole.slim(manifest)))
    assert not torch.equal(logits(there), logits(whole.model))


def test_scores_are_what_they_are_said_to_be(tiny: Callable[[str], Tiny]) -> None:
    whole = tiny("gqa")
    anatomy, scores = whole.measured(BOTH)
    streams: list[Tensor] = []
    inner: dict[str, list[Tensor]] = {"mlp.down_proj": [], "self_attn.o_proj": []}
    handles = [
        layer.register_forward_hook(lambda _m, args, _o: streams.append(args[0][0]))
        for layer in stack(whole.model, anatomy)[1:3]
    ]

    for name, found in inner.items():
        module = whole.model.get_submodule(f"model.layers.1.{name}")
        handles.append(
            module.register_forward_pre_hook(lambda _m, args, found=found: found.append(args[0][0]))
        )

    with torch.no_grad():
        for example in EXAMPLES:  # one by one, so nothing is padded
            predictions(whole.model, collate([example], 0))

    for handle in handles:
        handle.remove()
    before = torch.cat(streams[0::2])
    after = torch.cat(streams[1::2])
    cosines = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
    assert scores.influence[1] == pytest.approx(1 - float(cosines.mean()), rel=1e-4)
    down, out = (whole.weights[f"model.layers.1.{name}.weight"] for name in inner)
    active = torch.cat(inner["mlp.down_proj"])
    heads = torch.cat(inner["self_attn.o_proj"])
    neurons = down.abs().sum(0) * active.square().mean(0).sqrt()
    torch.testing.assert_close(scores.neurons[1].float(), neurons, rtol=1e-4, atol=1e-6)

    for group in range(2):
        entries = slice(16 * group, 16 * (group + 1))
        added = heads[:, entries] @ out[:, entries].T
        assert float(scores.groups[1][group]) == pytest.approx(
            float(added.square().sum(1).mean().sqrt()), rel=1e-4
        )
