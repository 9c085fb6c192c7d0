"""The paper's download: which layers and units a plan keeps, and how its proxy is measured."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as runs
from hypothesis import strategies as st
from torch import Tensor

from fluvial.errors import ConfigError
from fluvial.methods.fedcybgd.proxy import (
    Anatomy,
    Manifest,
    ProxySettings,
    Prune,
    Scores,
    chances,
    cut,
    plan_proxy,
)
from fluvial.models.tuning import checkpoint_layers
from fluvial.training.train import collate, predictions, summed_loss
from tests.support.proxy import (
    BOTH,
    EXAMPLES,
    Tiny,
    kept_fraction,
    made_up,
    make,
)


@pytest.mark.parametrize("prune", ["neurons", BOTH])
@pytest.mark.parametrize("layers", [4, 6, 12])
def test_the_kept_share_is_what_was_asked_for(layers: int, prune: Prune, tmp_path: Path) -> None:
    kinds = ("gqa", "gpt2") if layers < 12 else ("gqa",)
    for kind in kinds:
        whole = make(kind, tmp_path / kind, layers)
        anatomy, scores = whole.measured(prune)
        for trained in ((0,), (layers // 2,), (layers - 1,), (1, 2), ()):
            for drop in (0.0, 0.25, 0.4):
                for kept in torch.linspace(0.3, 1 - drop, 8).tolist():
                    settings = ProxySettings(kept=kept - 1e-7, drop=drop, prune=prune)
                    least, most = anatomy.attainable(trained, settings)
                    if not least <= settings.kept <= most:
                        continue

                    manifest = plan_proxy(
                        scores, anatomy, trained=trained, settings=settings, seed=0, visit=0
                    )
                    assert abs(kept_fraction(manifest) / settings.kept - 1) <= 0.01
                    sent = cut(whole.weights, manifest)
                    inside = {name for name in whole.weights if name.startswith(f"{anatomy.path}.")}
                    inside -= {name for name in inside if int(name.split(".")[2]) in trained}
                    total = sum(whole.weights[name].numel() for name in inside)
                    there = sum(tensor.numel() for name, tensor in sent.items() if name in inside)
                    assert kept_fraction(manifest) == pytest.approx(there / total)


def test_layers_keep_like_shares_and_the_best_units() -> None:
    anatomy, scores = made_up(8)
    settings = ProxySettings(kept=0.6, drop=0, prune=BOTH, multiple=8)
    manifest = plan_proxy(scores, anatomy, trained=(3,), settings=settings, seed=0, visit=0)
    counts = [len(kept) for kept in manifest.neurons.values()]
    assert len(counts) == 7
    assert all(count % 8 == 0 for count in counts)
    assert max(counts) - min(counts) <= 8
    assert {len(kept) for kept in manifest.groups.values()} <= {2, 3}

    for index, kept in manifest.neurons.items():
        gone = [unit for unit in range(96) if unit not in kept]
        assert scores.neurons[index][list(kept)].min() >= scores.neurons[index][gone].max()


def test_the_multiple_is_halved_only_where_the_share_is_missed_otherwise() -> None:
    for layers, multiple in ((40, 64), (3, 8)):
        anatomy, scores = made_up(layers, neurons=512, prune="neurons")
        settings = ProxySettings(kept=0.53, drop=0)
        manifest = plan_proxy(scores, anatomy, trained=(0,), settings=settings, seed=0, visit=0)
        assert math.gcd(*(len(kept) for kept in manifest.neurons.values())) == multiple
        assert abs(kept_fraction(manifest) / 0.53 - 1) <= 0.01


@runs(max_examples=300, deadline=None)
@given(
    layers=st.integers(1, 16),
    start=st.integers(0, 15),
    length=st.integers(0, 4),
    place=st.floats(0, 1),
    drop=st.floats(0, 0.9),
    prune=st.sampled_from(["neurons", BOTH]),
    randomised=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_protected_layers_stay_and_every_attainable_share_is_met(
    layers: int,
    start: int,
    length: int,
    place: float,
    drop: float,
    prune: Prune,
    randomised: bool,
    seed: int,
) -> None:
    anatomy, scores = made_up(layers, groups=16, neurons=400, prune=prune)
    trained = tuple(index for index in range(start, start + length) if index < layers)
    settings = ProxySettings(
        kept=(1 - drop) / 2, drop=drop, prune=prune, randomised=randomised and drop > 0
    )
    least, most = anatomy.attainable(trained, settings)
    kept = min(least + place * (most - least), 1 - drop)
    settings = settings.model_copy(update={"kept": kept})

    if kept * 1.01 < least:  # a share is met within 1 %
        with pytest.raises(ConfigError, match="attainable is"):
            plan_proxy(scores, anatomy, trained=trained, settings=settings, seed=seed, visit=1)
        return

    assume(
        0.01 * kept * anatomy.size(trained) >= 96 / 2
    )  # otherwise a single neuron is too large a step
    manifest = plan_proxy(scores, anatomy, trained=trained, settings=settings, seed=seed, visit=1)
    protected = {0, layers - 1, *trained, *(t - 1 for t in trained), *(t + 1 for t in trained)}
    assert not protected & set(manifest.dropped)
    assert not protected & set(manifest.gains)
    assert not set(trained) & (set(manifest.neurons) | set(manifest.groups))
    assert len(manifest.dropped) <= drop * (layers - len(trained)) + 1e-9
    assert abs(kept_fraction(manifest) / kept - 1) <= 0.01
    values = json.loads(json.dumps(manifest.values()))
    assert Manifest.from_values(values, anatomy, trained) == manifest


def test_the_least_influential_layers_are_dropped() -> None:
    anatomy, scores = made_up(10, prune="neurons")
    scores = replace(scores, influence=(0.1, 0.9, 0.2, 0.8, 0.3, 0.1, 0.05, 0.7, 0.6, 0.1))
    settings = ProxySettings(kept=0.6, drop=0.25)
    manifest = plan_proxy(scores, anatomy, trained=(5,), settings=settings, seed=0, visit=0)
    assert manifest.dropped == (2, 8)  # 0, 4, 5, 6 and 9 are protected, 2.25 are asked for


def test_a_plan_is_the_same_for_any_seed_and_visit_unless_it_is_randomised() -> None:
    anatomy, scores = made_up(12, prune="neurons")

    def plans(*, randomised: bool) -> list[tuple[int, ...]]:
        settings = ProxySettings(kept=0.6, drop=0.3, randomised=randomised)
        draws = [(seed, visit) for seed in (1, 2) for visit in (1, 2, 3, 1)]
        return [
            plan_proxy(
                scores, anatomy, trained=(4,), settings=settings, seed=seed, visit=visit
            ).dropped
            for seed, visit in draws
        ]

    assert len(set(plans(randomised=False))) == 1
    drawn = plans(randomised=True)
    assert drawn[0] == drawn[3]
    assert drawn[4] == drawn[7]
    assert len(set(drawn)) > 3
    assert drawn == plans(randomised=True)


def test_the_expected_change_of_a_randomised_layer_is_its_change() -> None:
    anatomy, scores = made_up(10, prune="neurons")
    settings = ProxySettings(kept=0.5, drop=0.4, randomised=True)
    draws = 1500
    plans = [
        plan_proxy(scores, anatomy, trained=(4,), settings=settings, seed=seed, visit=seed)
        for seed in range(draws)
    ]
    assert {len(plan.dropped) for plan in plans} == {3}

    for index in anatomy.droppable((4,)):
        gains = torch.tensor(
            [0.0 if index in plan.dropped else plan.gains.get(index, 1.0) for plan in plans]
        )
        assert abs(float(gains.mean()) - 1) < 4.5 * float(gains.std()) / draws**0.5 + 1e-6


def test_a_randomised_drop_leaves_a_layer_that_may_be_dropped() -> None:
    anatomy, _ = made_up(10, prune="neurons")
    assert anatomy.droppable((4,)) == [1, 2, 6, 7, 8]
    assert anatomy.num_dropped((4,), ProxySettings(kept=0.1, drop=0.9)) == 5
    assert anatomy.num_dropped((4,), ProxySettings(kept=0.1, drop=0.9, randomised=True)) == 4


def test_chances_to_stay_sum_to_what_stays_and_have_the_least_variance() -> None:
    influence = [0.04, 0.09, 0.01, 0.3, 0.02]
    best = chances(influence, 3)
    assert float(best.sum()) == pytest.approx(3)
    assert float(best.max()) <= 1
    assert float(best.min()) >= 0.3 - 1e-12

    def variance(stay: Tensor) -> float:
        return float((torch.tensor(influence, dtype=torch.float64) * (1 / stay - 1)).sum())

    for seed in range(100):
        other = best + 0.02 * torch.randn(
            5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        other = (other - (other.sum() - 3) / 5).clamp(0.3, 1)
        if float(other.sum()) <= 3:
            assert variance(other) >= variance(best) - 1e-9

    assert chances([0.0, 0.0, 0.0], 2).tolist() == pytest.approx([2 / 3] * 3)


@pytest.mark.parametrize("kind", ["llama", "gqa", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_the_trained_block_has_its_shapes(
    kind: str, tiny: Callable[[str], Tiny], *, checkpointing: bool
) -> None:
    whole = tiny(kind)
    manifest = whole.plan(ProxySettings(kept=0.5, drop=0.25, prune=BOTH, randomised=True), 3)
    proxy = whole.slim(manifest)
    block = f"{manifest.anatomy.path}.3."
    trained = {
        name: p.requires_grad_() for name, p in proxy.named_parameters() if name.startswith(block)
    }

    if checkpointing:
        checkpoint_layers(proxy)

    loss = summed_loss(*predictions(proxy, collate(EXAMPLES, 0)))
    gradients = torch.autograd.grad(loss, list(trained.values()))
    whole_block = {name: t.shape for name, t in whole.weights.items() if name.startswith(block)}
    assert {name: g.shape for name, g in zip(trained, gradients, strict=True)} == whole_block
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_measuring_leaves_no_hook_behind(tiny: Callable[[str], Tiny]) -> None:
    whole = tiny("gpt2")
    whole.measured(BOTH)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in whole.model.modules()
    )


def test_the_block_of_llama_2_7b_is_planned_without_weights() -> None:
    import transformers
    from accelerate import init_empty_weights

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )

    with init_empty_weights(include_buffers=False):
        model = transformers.LlamaForCausalLM(config)
    for settings in (ProxySettings(kept=0.5), ProxySettings(kept=0.25, prune=BOTH)):
        anatomy = Anatomy.of(model, settings.prune)
        assert {layer.size for layer in anatomy.layers} == {202_383_360}
        heads = 32 if settings.prune == BOTH else 0
        draw = torch.Generator().manual_seed(0)
        scores = Scores(
            tuple(torch.rand(32, generator=draw).tolist()),
            tuple(torch.rand(11008, generator=draw) for _ in range(32)),
            tuple(torch.rand(heads, generator=draw) for _ in range(32)),
        )
        manifest = plan_proxy(scores, anatomy, trained=(10,), settings=settings, seed=0, visit=0)
        assert len(manifest.dropped) == 7
        assert all(len(kept) % 64 == 0 for kept in manifest.neurons.values())
        assert kept_fraction(manifest) == pytest.approx(settings.kept, rel=1e-3)
        assert len(json.dumps(manifest.values())) < 100_000
