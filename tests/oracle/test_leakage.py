"""Attacks on hidden states: without noise the public front gives every token away."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluvial.methods.flglm.leakage.causal import CausalSearch, CausalSettings
from fluvial.methods.flglm.leakage.nearest import NearestSettings, NearestToken
from fluvial.methods.flglm.leakage.noise import HiddenNoise, NoiseConfig, std_of_mean_absolute
from fluvial.methods.flglm.leakage.public_model import PublicModel
from fluvial.models.loading import load_base
from fluvial.models.pretrained import ModelConfig
from fluvial.models.split import Cut, Part
from tests.support.leakage import BOS, embedded, heldout
from tests.support.model_kinds import save_kind

LAYERS = 4


def sent(ids: Tensor, front: int) -> Tensor:
    """Return what a site sends of a text (tokens,), computed by its own part."""
    part = Part(copy.deepcopy(embedded()), Cut(LAYERS, front, 1), server=False)
    with torch.no_grad():
        return part.embed(ids[None], torch.ones(1, len(ids), dtype=torch.int64))[0]


@pytest.mark.parametrize("front", [1, 2])
def test_without_noise_every_token_is_read(front: int) -> None:
    public = PublicModel(embedded(), front)
    search = CausalSearch(public, CausalSettings())
    for ids in heldout(2, 16):
        assert torch.equal(search(sent(ids, front)), ids)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen2"])
def test_kept_keys_and_values_change_no_distance(kind: str, tmp_path: Path) -> None:
    folder = save_kind(kind, tmp_path / kind, num_hidden_layers=LAYERS)
    model = load_base(ModelConfig(name_or_path=str(folder), device="cpu"))
    noise = NoiseConfig(clip=1.0, multiplier=0.05)
    public = PublicModel(model, 2, noise)
    ids = torch.randint(3, 300, (10,), generator=torch.Generator().manual_seed(2))
    hidden = public.hidden(ids[None])[0]
    noisy = HiddenNoise(noise, b"k" * 32).release(hidden, b"1")

    for observed in (hidden, noisy):
        fast, plain = (
            CausalSearch(public, CausalSettings(beams=2, batch=150, reuse=reuse))(observed)
            for reuse in (True, False)
        )
        assert torch.equal(fast, plain)
    assert torch.equal(CausalSearch(public, CausalSettings())(hidden), ids)


def test_at_one_layer_a_token_alone_is_near_enough() -> None:
    """What attention adds to one layer hides few tokens."""
    ids = heldout(1, 24)[0]
    hidden = sent(ids, 1)
    for settings in (NearestSettings(), NearestSettings(context=(BOS,), cosine=True)):
        got = NearestToken(PublicModel(embedded(), 1), settings)(hidden)
        assert float((got == ids).double().mean()) >= 0.9


def test_a_shortlist_keeps_the_token_and_saves_the_rest() -> None:
    ids = heldout(1, 24)[0]
    search = CausalSearch(PublicModel(embedded(), 1), CausalSettings(shortlist=64))
    assert torch.equal(search(sent(ids, 1)), ids)


@pytest.mark.parametrize("multiplier", [20.0, 1000.0])
def test_large_noise_leaves_chance(multiplier: float) -> None:
    """Chance is 1 of 2048; of 63 tokens more than three would come with probability 1e-8."""
    noise = NoiseConfig(clip=8.0, multiplier=multiplier)
    public = PublicModel(embedded(), 1, noise)
    right = 0

    for number, ids in enumerate(heldout(4, 16)):
        released = HiddenNoise(noise, b"k" * 32).release(sent(ids, 1), bytes([number]))
        got = CausalSearch(public, CausalSettings())(released)
        right += int((got == ids)[1:].sum())

    assert right <= 3


def test_the_papers_noise_protects_nothing() -> None:
    """Their 0.02 and their 0.1 (mean absolute noise) leave every token to be read."""
    ids = heldout(1, 16)[0]
    hidden = sent(ids, 1)
    clip = float(hidden.norm(dim=-1).max()) + 1

    for mean_absolute in (0.02, 0.1):
        noise = NoiseConfig(clip=clip, multiplier=std_of_mean_absolute(mean_absolute) / clip)
        released = HiddenNoise(noise, b"k" * 32).release(hidden, b"1")
        search = CausalSearch(PublicModel(embedded(), 1, noise), CausalSettings())
        assert torch.equal(search(released), ids)


def test_a_beam_and_the_models_expectation_read_more_under_noise() -> None:
    noise = NoiseConfig(clip=8.0, multiplier=0.3)
    public = PublicModel(embedded(), 1, noise)
    right = []

    for settings in (
        CausalSettings(shortlist=256),
        CausalSettings(beams=2, prior=1.0, shortlist=256),
    ):
        search = CausalSearch(public, settings)
        right.append(0)
        for number, ids in enumerate(heldout(4, 16)):
            released = HiddenNoise(noise, b"k" * 32).release(sent(ids, 1), bytes([number]))
            right[-1] += int((search(released) == ids).sum())

    assert right[1] > right[0]


def test_the_mechanism_is_part_of_what_is_public() -> None:
    """Under a clip that shortens every state, a search without it does not find them."""
    noise = NoiseConfig(clip=1.0, multiplier=1e-6)
    ids = heldout(1, 16)[0]
    released = HiddenNoise(noise, b"k" * 32).release(sent(ids, 1), b"1")
    assert torch.equal(
        CausalSearch(PublicModel(embedded(), 1, noise), CausalSettings())(released), ids
    )
    blind = CausalSearch(PublicModel(embedded(), 1), CausalSettings())(released)
    assert not torch.equal(blind, ids)


def test_a_shortlist_without_the_token_is_given_up() -> None:
    """The scores are the worst: all other tokens come first."""
    ids = heldout(1, 12)[0]
    public = PublicModel(embedded(), 1)
    scores = -torch.nn.functional.one_hot(ids, public.vocabulary).double()
    search = CausalSearch(public, CausalSettings(shortlist=8), lambda _hidden: scores)
    assert torch.equal(search(sent(ids, 1)), ids)
