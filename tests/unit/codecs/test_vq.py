"""Vector quantisation: it meets its rate, learns what updates share, and trusts nothing."""

from typing import Any

import pytest
import torch

from fluvial.codecs.learned.vq import VQ, VQSettings
from fluvial.errors import ConfigError, WireError
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, norm, relative_error, scale
from tests.support.updates import attention_layout, count_refused_mutations

QUICK: dict[str, Any] = {"codebook": 128, "iterations": 8}


MODULES = ("q_proj", "v_proj")
LAYOUT = attention_layout(96, 48, modules=MODULES)


def updates_of(layout: Layout, count: int, seed: int) -> list[Named]:
    """Updates whose ranks move together along few directions, fixed for each factor."""
    draw = torch.Generator().manual_seed(seed)
    found = []

    for _ in range(count):
        update = {}
        for index, (name, shape) in enumerate(layout.shapes):
            rank = min(shape)
            features = max(shape)
            mixing = torch.randn(rank, 2, generator=torch.Generator().manual_seed(index))
            x = mixing @ torch.randn(2, features, generator=draw) + 0.1 * torch.randn(
                rank, features, generator=draw
            )
            update[name] = 1e-5 * (x if "lora_A" in name else x.T).contiguous()

        found.append(update)

    return found


SEEN = updates_of(LAYOUT, 12, seed=1)
HELD_OUT = updates_of(LAYOUT, 3, seed=2)


@pytest.fixture(scope="module")
def fitted() -> VQ:
    return VQ.fit(VQSettings(**QUICK), LAYOUT, SEEN, seed=0)


def test_dimension_follows_the_rate() -> None:
    assert [VQSettings(rate=rate).width for rate in (1, 16, 32, 64, 128, 1024)] == [
        2,
        4,
        8,
        8,
        16,
        16,
    ]
    assert VQSettings(dimension=3).width == 3


@pytest.mark.parametrize("rate", [16, 32, 64, 128])
def test_meets_its_rate_and_beats_the_bound_of_an_unlearned_code(rate: int) -> None:
    codec = VQ.fit(VQSettings(rate=rate, iterations=8), LAYOUT, SEEN, seed=0)
    assert codec.frame_size(codec.settings, LAYOUT) == LAYOUT.raw_bytes // rate
    for update in HELD_OUT:
        wire = codec.encode(update)
        assert len(wire) <= LAYOUT.raw_bytes / rate
        white = 2 ** (
            -2 * 32 / rate
        )  # distortion of a white Gaussian source at 32 / rate bits a value
        assert relative_error(update, codec.decode(wire)) < white


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-12, 1.0, 1e12, 1e37])
def test_size_of_the_update_does_not_matter(fitted: VQ, size: float) -> None:
    update = scale(scale(HELD_OUT[0], 1e5), size)
    decoded = fitted.decode(fitted.encode(update))
    assert Layout.of(decoded) == LAYOUT
    assert (
        norm(decoded) == 0 if size == 0 else relative_error(update, decoded) < 0.6 or size < 1e-30
    )


def test_updates_unlike_those_of_fit_still_fit_and_do_not_grow() -> None:
    draw = torch.Generator().manual_seed(0)
    for seen in (SEEN, [scale(SEEN[0], 0.0)]):
        codec = VQ.fit(VQSettings(rate=64, **QUICK), LAYOUT, seen, seed=0)
        for shape in (1.0, 4.0):
            white = LAYOUT.unflatten(torch.randn(LAYOUT.numel, generator=draw) ** shape)
            wire = codec.encode(white)
            assert len(wire) <= LAYOUT.raw_bytes / 64
            assert relative_error(white, codec.decode(wire)) <= 1


def test_one_factor_alone(fitted: VQ) -> None:
    update = {
        name: tensor if "lora_B" in name else 0 * tensor for name, tensor in HELD_OUT[0].items()
    }
    decoded = fitted.decode(fitted.encode(update))
    assert all(not decoded[name].any() for name in decoded if "lora_A" in name)
    assert relative_error(update, decoded) < 0.5


@pytest.mark.parametrize("rank", [1, 4, 6, 16])
def test_ranks_that_no_vector_divides(rank: int) -> None:
    layout = attention_layout(50, 31, rank=rank, modules=MODULES)
    codec = VQ.fit(
        VQSettings(rate=16, codebook=32, iterations=3),
        layout,
        updates_of(layout, 3, seed=1),
        seed=0,
    )
    update = updates_of(layout, 1, seed=2)[0]
    wire = codec.encode(update)
    assert len(wire) <= layout.raw_bytes / 16
    assert relative_error(update, codec.decode(wire)) < 0.9


def test_published_gives_the_same_codec(fitted: VQ) -> None:
    payload = Payload.from_bytes(fitted.published(decoder=False).to_bytes())
    again = VQ.from_published(fitted.settings, LAYOUT, payload)
    wire = fitted.encode(HELD_OUT[0])
    assert again.encode(HELD_OUT[0]) == wire
    assert relative_error(fitted.decode(wire), again.decode(wire)) == 0


def test_frames_of_another_codebook_are_refused(fitted: VQ) -> None:
    other = VQ.fit(fitted.settings, LAYOUT, SEEN[:6], seed=0)
    with pytest.raises(WireError, match="published"):
        other.decode(fitted.encode(HELD_OUT[0]))


def test_fit_depends_on_the_seed_alone(fitted: VQ) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = VQ.fit(fitted.settings, LAYOUT, SEEN, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.published(decoder=True).to_bytes() == fitted.published(decoder=True).to_bytes()
    other = VQ.fit(fitted.settings, LAYOUT, SEEN, seed=1)
    assert other.published(decoder=True).to_bytes() != fitted.published(decoder=True).to_bytes()


def test_malformed_publications_are_refused(fitted: VQ) -> None:
    good = fitted.published(decoder=True).tensors
    for tensors in (
        {},
        {"codebooks": good["codebooks"]},
        {**good, "extra": torch.zeros(1)},
        {**good, "codebooks": good["codebooks"][:, 1:]},
        {**good, "codebooks": good["codebooks"].float()},
        {**good, "codebooks": good["codebooks"] * float("nan")},
        {**good, "frequencies": good["frequencies"] * 0},
        {**good, "frequencies": -good["frequencies"]},
    ):
        with pytest.raises(WireError, match="vq"):
            VQ.from_published(fitted.settings, LAYOUT, Payload(tensors))


def test_mutated_bodies_decode_or_are_refused(fitted: VQ) -> None:
    assert count_refused_mutations(fitted, HELD_OUT[0], 600) > 300
    wire = bytearray(fitted.encode(HELD_OUT[0]))
    wire[20] ^= 1

    with pytest.raises(WireError, match="checksum"):
        fitted.decode(bytes(wire))


@pytest.mark.parametrize(
    ("layout", "rate", "message"),
    [
        (attention_layout(8, 8, modules=MODULES), 512, "choose at most"),
        (Layout((("lm_head.weight", (8, 8)),)), 4, "'lm_head.weight' with shape"),
        (Layout(()), 64, "no tensors"),
    ],
)
def test_what_it_cannot_code_is_said(layout: Layout, rate: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VQ.frame_size(VQSettings(rate=rate), layout)


def test_nothing_to_learn_from() -> None:
    with pytest.raises(ConfigError, match="no updates"):
        VQ.fit(VQSettings(), LAYOUT, [], seed=0)
