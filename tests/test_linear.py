"""The linear autoencoder: it meets its rate, carries more than a code without learning can, and trusts nothing."""

import random

import numpy as np
import pytest
import torch

from fluvial.codecs.frame import seal
from fluvial.codecs.linear import Linear, LinearSettings, tables
from fluvial.errors import ConfigError, WireError
from fluvial.payload import Payload
from fluvial.tensors import Layout, Named, add, norm, relative_error, scale, subtract


def layout_of(d: int = 64, kv: int = 32, layers: int = 2) -> Layout:
    shapes = {}
    for layer in range(layers):
        for module, out in (("q_proj", d), ("k_proj", kv), ("v_proj", kv), ("o_proj", d)):
            path = f"model.layers.{layer}.self_attn.{module}"
            shapes[f"{path}.lora_A.weight"] = (8, d)
            shapes[f"{path}.lora_B.weight"] = (out, 8)
    return Layout(tuple(sorted(shapes.items())))


LAYOUT = layout_of()


def updates_of(layout: Layout, count: int, seed: int) -> list[Named]:
    """Updates whose rows lie near one fixed subspace for each feature axis, as those of real training do."""
    found = []
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        update = {}
        for name, shape in layout.shapes:
            features = max(shape)
            shared = torch.Generator().manual_seed(features + ("lora_A" in name))
            q = torch.linalg.qr(torch.randn(features, features, generator=shared)).Q
            x = torch.randn(8, features, generator=draw) * (1 + torch.arange(features)) ** -1.0 @ q.T
            update[name] = 1e-3 * (x if "lora_A" in name else x.T).contiguous()
        found.append(update)
    return found


SEEN, HELD_OUT = updates_of(LAYOUT, 12, seed=1), updates_of(LAYOUT, 3, seed=2)


@pytest.fixture(scope="module")
def fitted() -> Linear:
    return Linear.fit(LinearSettings(), LAYOUT, SEEN, seed=0)


@pytest.mark.parametrize("rate", [8, 16, 32, 64, 128])
def test_meets_its_rate_and_beats_the_bound_of_an_unlearned_code(rate: int) -> None:
    codec = Linear.fit(LinearSettings(rate=rate), LAYOUT, SEEN, seed=0)
    for update in HELD_OUT:
        wire = codec.encode(update)
        assert len(wire) <= LAYOUT.raw_bytes / rate
        assert len(wire) > 0.9 * LAYOUT.raw_bytes / rate
        without_learning = 2 ** (-2 * 32 / rate)  # distortion of a white Gaussian source at 32 / rate bits a value
        assert relative_error(update, codec.decode(wire)) < min(0.9 * without_learning, 0.9)


def test_analysis_keeps_norms_and_is_inverted(fitted: Linear) -> None:
    vector = LAYOUT.flatten(HELD_OUT[0])
    latent = fitted.analyse(vector)
    assert latent.shape == vector.shape
    assert float(latent.norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
    assert torch.allclose(fitted.synthesise(latent), vector, atol=1e-8)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-12, 1.0, 1e12, 1e30])
def test_size_of_the_update_does_not_matter(fitted: Linear, size: float) -> None:
    update = scale(HELD_OUT[0], size)
    wire = fitted.encode(update)
    assert len(wire) <= fitted.budget
    if size == 0 or size >= 1e-12:
        assert relative_error(update, fitted.decode(wire)) < 0.5


def test_one_factor_alone(fitted: Linear) -> None:
    update = {name: tensor if "lora_B" in name else 0 * tensor for name, tensor in HELD_OUT[0].items()}
    decoded = fitted.decode(fitted.encode(update))
    assert all(norm({name: decoded[name]}) == 0 for name in decoded if "lora_A" in name)
    assert relative_error(update, decoded) < 0.3


def test_white_updates_do_not_grow(fitted: Linear) -> None:
    """Error feedback needs a contraction, even on updates unlike those of `fit`."""
    draw = torch.Generator().manual_seed(0)
    white = LAYOUT.unflatten(torch.randn(LAYOUT.numel, generator=draw))
    assert relative_error(white, fitted.decode(fitted.encode(white))) < 1


def test_error_feedback_stays_bounded(fitted: Linear) -> None:
    residual = scale(SEEN[0], 0.0)
    for update in updates_of(LAYOUT, 12, seed=5):
        wanted = add(update, residual)
        residual = subtract(wanted, fitted.decode(fitted.encode(wanted)))
        assert norm(residual) < 2 * norm(update)


def test_published_gives_the_same_codec(fitted: Linear) -> None:
    payload = Payload.from_bytes(fitted.published(decoder=False).to_bytes())
    again = Linear.from_published(fitted.settings, LAYOUT, payload)
    wire = fitted.encode(HELD_OUT[0])
    assert again.encode(HELD_OUT[0]) == wire
    assert relative_error(fitted.decode(wire), again.decode(wire)) == 0
    assert len(payload.to_bytes()) < LAYOUT.raw_bytes  # less than one raw update


def test_fit_is_deterministic(fitted: Linear) -> None:
    again = Linear.fit(fitted.settings, LAYOUT, SEEN, seed=0)
    assert again.published(decoder=True).to_bytes() == fitted.published(decoder=True).to_bytes()


def test_fit_from_one_zero_update() -> None:
    codec = Linear.fit(LinearSettings(), LAYOUT, [scale(SEEN[0], 0.0)], seed=0)
    assert relative_error(HELD_OUT[0], codec.decode(codec.encode(HELD_OUT[0]))) < 1


def test_malformed_publications_are_refused(fitted: Linear) -> None:
    good = fitted.published(decoder=True).tensors
    for tensors in (
        {},
        {name: tensor for name, tensor in good.items() if name != "rows"},
        {**good, "extra": torch.zeros(1)},
        {**good, "tops": good["tops"][:-1]},
        {**good, "rows": good["rows"].float()},
        {**good, "rotations": good["rotations"] * float("nan")},
        {**good, "rotations": good["rotations"] * 1e6},
    ):
        with pytest.raises(WireError, match="linear"):
            Linear.from_published(fitted.settings, LAYOUT, Payload(tensors))


def test_any_published_numbers_give_a_working_codec(fitted: Linear) -> None:
    draw = np.random.default_rng(0)
    good = fitted.published(decoder=True).tensors
    wild = {
        "tops": torch.from_numpy(draw.integers(-128, 128, good["tops"].shape).astype(np.int8)) * 0,
        "rotations": good["rotations"],
        "rows": torch.from_numpy(draw.integers(-(2**15), 2**15, good["rows"].shape).astype(np.int16)),
        "cols": torch.from_numpy(draw.integers(-(2**15), 2**15, good["cols"].shape).astype(np.int16)),
    }
    codec = Linear.from_published(fitted.settings, LAYOUT, Payload(wild))
    wire = codec.encode(HELD_OUT[0])
    assert len(wire) <= codec.budget
    assert Layout.of(codec.decode(wire)) == LAYOUT


def test_mutated_bodies_decode_or_are_refused(fitted: Linear) -> None:
    body = fitted.body(LAYOUT.flatten(HELD_OUT[0]), 0)
    draw = random.Random(0)
    for _ in range(1000):
        mutated = bytearray(body)
        for _ in range(draw.randint(1, 8)):
            mutated[draw.randrange(len(mutated))] = draw.randrange(256)
        if draw.random() < 0.2:
            mutated = mutated[: draw.randrange(len(mutated))] + bytes(draw.randrange(3))
        try:
            decoded = fitted.decode(seal(fitted.code, LAYOUT.fingerprint, bytes(mutated)))
        except WireError:
            continue
        assert bool(torch.isfinite(LAYOUT.flatten(decoded)).all())


def test_tables() -> None:
    frequencies, centroids = tables()
    assert int(frequencies.min()) > 0
    assert np.array_equal(frequencies, frequencies[:, ::-1])
    assert np.allclose(frequencies.sum(1) / 2**22, 1, atol=1e-3)
    assert bool((np.diff(centroids, axis=1) > 0).all())


@pytest.mark.parametrize(
    ("layout", "rate", "message"),
    [
        (layout_of(d=8, kv=8, layers=1), 128, "choose a lower rate"),
        (Layout((("lm_head.weight", (8, 8)),)), 64, "'lm_head.weight' with shape"),
        (Layout(()), 64, "no tensors"),
    ],
)
def test_what_it_cannot_code_is_said(layout: Layout, rate: float, message: str) -> None:
    update = layout.unflatten(torch.ones(layout.numel)) if layout.shapes else {}
    with pytest.raises(ConfigError, match=message):
        Linear.fit(LinearSettings(rate=rate), layout, [update], seed=0)


def test_nothing_to_learn_from() -> None:
    with pytest.raises(ConfigError, match="no updates"):
        Linear.fit(LinearSettings(), LAYOUT, [], seed=0)
