"""The convolutional opponent: it meets its rate, learns an easy source, and trusts nothing."""

from typing import Any

import pytest
import torch

from fluvial.codecs.learned.cnn import CNN
from fluvial.codecs.learned.cnn_signals import CNNSettings
from fluvial.errors import ConfigError, WireError
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, norm, relative_error, scale
from tests.support.updates import attention_layout, count_refused_mutations

QUICK: dict[str, Any] = {"iterations": 2, "hidden": 8}


MODULES = ("q_proj", "v_proj")
LAYOUT = attention_layout(96, 50, rank=4, modules=MODULES)


def smooth(count: int, seed: int) -> list[Named]:
    """Updates of slow waves along the features, one for all ranks of a factor: an easy source."""
    draw = torch.Generator().manual_seed(seed)
    found = []

    for _ in range(count):
        update = {}
        for name, shape in LAYOUT.shapes:
            time = torch.arange(max(shape)) / 48 + torch.rand(1, generator=draw)
            x = torch.sin(2 * torch.pi * time).expand(min(shape), -1)
            update[name] = 1e-5 * (x if "lora_A" in name else x.T).contiguous()

        found.append(update)

    return found


SEEN = smooth(8, seed=1)
HELD_OUT = smooth(3, seed=2)


@pytest.fixture(scope="module")
def quick() -> CNN:
    return CNN.fit(CNNSettings(rate=16, **QUICK), LAYOUT, SEEN, seed=0)


def test_learns_an_easy_source() -> None:
    codec = CNN.fit(CNNSettings(rate=32, iterations=120, hidden=16), LAYOUT, SEEN, seed=0)
    assert [iteration for iteration, _ in codec.loss_curve] == list(range(1, 121))
    assert codec.loss_curve[-1][1] < 0.5 * codec.loss_curve[0][1]

    for update in HELD_OUT:
        assert relative_error(update, codec.decode(codec.encode(update))) < 0.5


@pytest.mark.parametrize("rate", [8, 16, 32])
@pytest.mark.parametrize("share", [1.0, 0.25, 0.01])
@pytest.mark.parametrize("normalise", ["global_rms", "factor_rms"])
def test_meets_its_rate(rate: int, share: float, normalise: Any) -> None:
    settings = CNNSettings(rate=rate, latent_share=share, normalise=normalise, **QUICK)
    codec = CNN.fit(settings, LAYOUT, SEEN, seed=0)
    assert codec.frame_size(settings, LAYOUT) == LAYOUT.raw_bytes // rate
    draw = torch.Generator().manual_seed(0)

    for update in (HELD_OUT[0], LAYOUT.unflatten(torch.randn(LAYOUT.numel, generator=draw))):
        wire = codec.encode(update)
        assert len(wire) <= LAYOUT.raw_bytes / rate
        assert Layout.of(codec.decode(wire)) == LAYOUT


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_size_of_the_update_does_not_matter(quick: CNN, size: float) -> None:
    decoded = quick.decode(quick.encode(scale(HELD_OUT[0], size / 1e-5)))
    assert norm(decoded) < 10 * norm(scale(HELD_OUT[0], size / 1e-5)) + 1e-12
    assert norm(decoded) > 0 or size == 0


def test_fit_depends_on_the_seed_alone(quick: CNN) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = CNN.fit(quick.settings, LAYOUT, SEEN, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.published(decoder=True).to_bytes() == quick.published(decoder=True).to_bytes()
    other = CNN.fit(quick.settings, LAYOUT, SEEN, seed=1)
    assert other.published(decoder=True).to_bytes() != quick.published(decoder=True).to_bytes()


def test_published_gives_the_same_codec(quick: CNN) -> None:
    payload = Payload.from_bytes(quick.published(decoder=True).to_bytes())
    again = CNN.from_published(quick.settings, LAYOUT, payload)
    wire = quick.encode(HELD_OUT[0])
    assert again.encode(HELD_OUT[0]) == wire
    assert relative_error(quick.decode(wire), again.decode(wire)) == 0


def test_encoder_alone_encodes_but_does_not_decode(quick: CNN) -> None:
    site = CNN.from_published(quick.settings, LAYOUT, quick.published(decoder=False))
    wire = site.encode(HELD_OUT[0])
    assert wire == quick.encode(HELD_OUT[0])

    with pytest.raises(ConfigError, match="holds only the encoder"):
        site.decode(wire)


def test_malformed_publications_are_refused(quick: CNN) -> None:
    good = quick.published(decoder=True).tensors
    name = "encoder.linear.weight"
    for tensors in (
        {},
        {key: tensor for key, tensor in good.items() if key != name},
        {**good, name: good[name].double()},
        {**good, name: good[name][:1]},
        {**good, name: good[name] * float("nan")},
        {**good, "encoder.extra": torch.zeros(1)},
    ):
        with pytest.raises(WireError, match="cnn"):
            CNN.from_published(quick.settings, LAYOUT, Payload(tensors))


def test_mutated_bodies_decode_or_are_refused(quick: CNN) -> None:
    assert count_refused_mutations(quick, HELD_OUT[0], 600) > 200
    with pytest.raises(WireError, match="checksum"):
        quick.decode(quick.encode(HELD_OUT[0])[:-1] + b"\0")


def test_what_it_cannot_code_is_said() -> None:
    other = attention_layout(96, 50, rank=2, modules=MODULES)
    mixed = Layout((*other.shapes[:1], *LAYOUT.shapes[1:2]))
    for layout, message in (
        (attention_layout(8, 8, rank=4, modules=MODULES), "choose at most"),
        (Layout((("lm_head.weight", (8, 8)),)), "'lm_head.weight' with shape"),
        (Layout(()), "one rank"),
        (mixed, "one rank"),
    ):
        with pytest.raises(ConfigError, match=message):
            CNN.frame_size(CNNSettings(rate=64), layout)

    with pytest.raises(ConfigError, match="no updates"):
        CNN.fit(CNNSettings(), LAYOUT, [], seed=0)
