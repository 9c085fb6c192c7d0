"""Attacks on training steps: labels from gradients, decoders that were trained on public text."""

import copy

import pytest
import torch
from torch import Tensor

from fluvial.data import IGNORE_INDEX
from fluvial.methods.flglm.leakage.attacks import Effort, attacks, on_gradients
from fluvial.methods.flglm.leakage.causal import CausalSettings
from fluvial.methods.flglm.leakage.decoder import DecoderSettings
from fluvial.methods.flglm.leakage.gradients import (
    GradientMatching,
    PublicBack,
    text_of_labels,
)
from fluvial.methods.flglm.leakage.meter import Observation, measure
from fluvial.methods.flglm.leakage.noise import HiddenNoise, NoiseConfig
from fluvial.methods.flglm.leakage.public_model import PublicModel
from fluvial.models.split import Cut, Part
from fluvial.training.train import summed_loss
from tests.support.leakage import embedded, heldout, public

LAYERS = 4
LABELS = 37
"""Label tokens of the logical batch, of which these texts are a share."""


def part(back: int, *, server: bool = False) -> Part:
    return Part(copy.deepcopy(embedded()), Cut(LAYERS, 1, back), server=server)


def step(
    site: Part, server: Part, ids: Tensor, labels: Tensor, noise: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h_A as sent, h_B and dL/dh_B, each (tokens, width), of one training step."""
    mask = torch.ones(1, len(ids), dtype=torch.int64)
    with torch.no_grad():
        front = site.embed(ids[None], mask)
        front += noise * torch.randn(front.shape, generator=torch.Generator().manual_seed(5))
        middle = server.middle(front, mask)

    middle.requires_grad_()
    logits = site.logits(middle, mask)
    loss = summed_loss(logits[0, :-1], labels[1:]) / LABELS
    loss.backward()  # type: ignore[no-untyped-call]
    assert middle.grad is not None
    return front[0], middle.detach()[0], middle.grad[0]


@pytest.mark.parametrize("back", [1, 2])
@pytest.mark.parametrize("weight", [None, 1 / LABELS])
def test_labels_are_read_from_gradients_whatever_the_noise_on_hidden_states(
    back: int, weight: float | None
) -> None:
    """A prompt without labels, and a gap in them, are read as such."""
    ids = heldout(1, 16)[0]
    labels = ids.clone()
    labels[:6] = IGNORE_INDEX
    labels[9] = IGNORE_INDEX
    _, middle, gradient = step(part(back), part(back, server=True), ids, labels, noise=20.0)

    read = GradientMatching(PublicBack(part(back)), weight=weight)(middle, gradient)

    assert torch.equal(read[:-1], labels[1:])
    assert int(read[-1]) == IGNORE_INDEX


def test_a_gradient_in_bf16_still_shows_the_labels() -> None:
    ids = heldout(1, 16)[0]
    _, middle, gradient = step(part(1), part(1, server=True), ids, ids)
    read = GradientMatching(PublicBack(part(1)))(middle, gradient.bfloat16())
    assert torch.equal(text_of_labels(read)[1:], ids[1:])


def test_capped_logits_change_nothing() -> None:
    """A model that caps its logits (Gemma 2) has another slope at each of them."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=300,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                final_logit_softcapping=0.5,
                initializer_range=0.3,
                pad_token_id=0,
            )
        ).eval()

    model.requires_grad_(False)
    site, server, back = (
        Part(copy.deepcopy(model), Cut(3, 1, 1), server=each) for each in (False, True, False)
    )
    ids = torch.randint(3, 300, (12,), generator=torch.Generator().manual_seed(2))
    _, middle, gradient = step(site, server, ids, ids)
    read = GradientMatching(PublicBack(back))(middle, gradient)
    assert torch.equal(read[:-1], ids[1:])


def test_no_gradient_shows_no_label() -> None:
    middle = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    read = GradientMatching(PublicBack(part(1)))(middle, torch.zeros(5, 128))
    assert read.tolist() == [IGNORE_INDEX] * 5
    assert text_of_labels(read).tolist() == [-1] * 5


EFFORT = Effort(
    trials=1,
    decoders=tuple(DecoderSettings(context=each, steps=60) for each in (0, 2)),
    shifted=DecoderSettings(shifted=True, steps=60),
    searches=(CausalSettings(shortlist=64), CausalSettings(beams=2, prior=1.0, shortlist=64)),
)


def test_all_attacks_on_one_mechanism() -> None:
    """The search reads more than the decoder that chooses its candidates, and the aligned decoder
    more than the shifted one; gradients show all labels."""
    noise = NoiseConfig(clip=8.0, multiplier=0.15)
    model = PublicModel(embedded(), 1, noise)
    readers = attacks(model, public(50, 24), EFFORT)
    readers["gradients"] = on_gradients(GradientMatching(PublicBack(part(1))))
    mechanism = HiddenNoise(noise, b"k" * 32)
    observations = []

    for number, ids in enumerate(heldout(4, 16)):
        front, middle, gradient = step(part(1), part(1, server=True), ids, ids)
        released = mechanism.release(front, bytes([number]))
        observations.append(Observation(ids, released, middle, gradient))

    leakage = measure(observations, readers)
    accuracy = {reading.attack: reading.accuracy for reading in leakage.readings}

    assert leakage.tokens == 60
    assert accuracy["exact causal search"] > accuracy["trained decoder"]
    assert accuracy["trained decoder"] > accuracy["shifted decoder"]
    assert accuracy["nearest token"] > 0.5
    assert accuracy["gradients"] == 1
    assert leakage.sentence == (
        "the server could read 100 % of the tokens (gradients); 4 of 64 are not counted, because "
        "all texts of a site begin with them"
    )


def test_large_noise_leaves_a_decoder_what_is_known_without_it() -> None:
    """No more than always naming one token: the decoder learns which tokens are frequent."""
    noise = NoiseConfig(clip=8.0, multiplier=1000.0)
    readers = attacks(PublicModel(embedded(), 1, noise), public(50, 24), EFFORT)
    texts = heldout(4, 16)
    mechanism = HiddenNoise(noise, b"k" * 32)
    observations = [
        Observation(ids, mechanism.release(PublicModel(embedded(), 1).hidden(ids[None])[0]))
        for ids in texts
    ]
    most = torch.stack(texts)[:, 1:].flatten().mode()
    share = float((torch.stack(texts)[:, 1:] == most.values).double().mean())

    for reading in measure(observations, readers).readings:
        assert reading.accuracy <= share + 0.05
