"""klt_trellis: it meets its rate, knows error feedback, and trusts nothing."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fluvial.codecs.klt.trellis import KltTrellis, KltTrellisSettings
from fluvial.codecs.rotated.trellis import Trellis, TrellisSettings
from fluvial.errors import ConfigError, WireError
from fluvial.wire.frame import OVERHEAD, seal
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import (
    Layout,
    Named,
    add,
    energy,
    norm,
    relative_error,
    scale,
    subtract,
    zeros_like,
)
from tests.support.updates import attention_layout, subspace_updates

LAYOUT = attention_layout()
PROFILE = OVERHEAD - 4
"""Where a frame says which profile it uses; three of each age, then the flat one."""


SEEN = subspace_updates(LAYOUT, 12, seed=1, decay=0.5)
HELD_OUT = subspace_updates(LAYOUT, 3, seed=2, decay=0.5)


def fit(**settings: Any) -> KltTrellis:
    return KltTrellis.fit(KltTrellisSettings(**settings), LAYOUT, SEEN, seed=0)


@pytest.fixture(scope="module")
def fitted() -> KltTrellis:
    return fit()


@pytest.mark.parametrize(
    ("rate", "memory"), [(16, 10), (64, 6), (64, 8), (64, 10), (64, 12), (128, 10)]
)
def test_meets_its_rate_and_beats_the_bound_of_an_unlearned_code(rate: int, memory: int) -> None:
    codec = fit(rate=rate, memory=memory)
    for update in HELD_OUT:
        wire = codec.encode(update)
        assert 0.97 * LAYOUT.raw_bytes / rate < len(wire) <= LAYOUT.raw_bytes / rate
        without_learning = 2 ** (
            -2 * 32 / rate
        )  # distortion of a white Gaussian source at 32 / rate bits a value
        assert relative_error(update, codec.decode(wire)) < without_learning


def test_the_header_is_short(fitted: KltTrellis) -> None:
    silent = fitted.encode(zeros_like(SEEN[0]))
    assert len(silent) == OVERHEAD + 5 + 8
    assert norm(fitted.decode(silent)) == 0


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-12, 1.0, 1e12, 1e36])
def test_size_of_the_update_does_not_matter(fitted: KltTrellis, size: float) -> None:
    update = scale(HELD_OUT[0], size)
    wire = fitted.encode(update)
    assert len(wire) <= fitted.budget

    if size >= 1e-12:
        assert relative_error(update, fitted.decode(wire)) < 0.5


def test_one_factor_alone(fitted: KltTrellis) -> None:
    update = {
        name: tensor if "lora_B" in name else 0 * tensor for name, tensor in HELD_OUT[0].items()
    }
    decoded = fitted.decode(fitted.encode(update))
    assert all(norm({name: decoded[name]}) == 0 for name in decoded if "lora_A" in name)
    assert relative_error(update, decoded) < 0.4


@given(
    kind=st.sampled_from(["white", "spike", "spikes", "heavy", "factor"]),
    seed=st.integers(0, 2**32 - 1),
    rate=st.sampled_from([16, 64, 150]),
)
@examples(max_examples=40, deadline=None)
def test_nothing_grows(fitted: KltTrellis, kind: str, seed: int, rate: int) -> None:
    """Error feedback needs a contraction, even on updates unlike those of `fit`."""
    codec = KltTrellis(KltTrellisSettings(rate=rate), LAYOUT, fitted.model)
    draw = torch.Generator().manual_seed(seed)
    vector = torch.randn(LAYOUT.numel, generator=draw)

    if kind == "heavy":
        vector = torch.from_numpy(
            np.random.default_rng(seed).standard_cauchy(LAYOUT.numel).clip(-1e6, 1e6)
        ).float()
    elif kind != "white":
        mask = torch.zeros(LAYOUT.numel)
        mask[torch.randint(LAYOUT.numel, (1 if kind == "spike" else 40,), generator=draw)] = 1
        if kind == "factor":
            mask[: LAYOUT.sizes[0]] = 1
        vector = vector * mask

    update = LAYOUT.unflatten(vector)
    wire = codec.encode(update)
    assert len(wire) <= codec.budget
    assert relative_error(update, codec.decode(wire)) < 1


def residuals(codec: Any, updates: list[Named]) -> tuple[Named, list[int]]:
    """What error feedback is left with after `updates`, and the ages of the frames."""
    residual = zeros_like(updates[0])
    ages = []

    for number, update in enumerate(updates):
        wanted = add(update, residual)
        wire = codec.encode(wanted, seed=number)
        residual = subtract(wanted, codec.decode(wire))
        ages.append(wire[PROFILE] // 3)

    return residual, ages


def test_error_feedback_is_recognised_and_serves() -> None:
    stream = subspace_updates(LAYOUT, 12, seed=5, decay=0.5)
    codec = fit(rate=128)
    residual, ages = residuals(codec, stream)
    assert ages[0] < 2
    assert min(ages[-6:]) >= 2
    other, _ = residuals(Trellis(TrellisSettings(rate=128), LAYOUT), stream)
    assert energy(residual) < 0.9 * energy(other)
    codec._profiles = codec._profiles[:1]
    young, _ = residuals(codec, stream)
    assert energy(residual) < 0.95 * energy(young)


def test_error_feedback_stays_bounded_on_white_updates(fitted: KltTrellis) -> None:
    draw = torch.Generator().manual_seed(0)
    stream = [LAYOUT.unflatten(torch.randn(LAYOUT.numel, generator=draw)) for _ in range(16)]
    residual, _ = residuals(fitted, stream)
    assert energy(residual) < 3 * energy(stream[-1])


def test_a_fresh_update_is_young_and_a_strange_one_flat(fitted: KltTrellis) -> None:
    draw = torch.Generator().manual_seed(0)
    white = LAYOUT.unflatten(torch.randn(LAYOUT.numel, generator=draw))
    assert fitted.encode(white)[PROFILE] == len(fitted._profiles) - 1
    assert fitted.encode(HELD_OUT[0])[PROFILE] < 6


def test_published_gives_the_same_codec(fitted: KltTrellis) -> None:
    payload = Payload.from_bytes(fitted.published(decoder=False).to_bytes())
    again = KltTrellis.from_published(fitted.settings, LAYOUT, payload)
    wire = fitted.encode(HELD_OUT[0])
    assert again.encode(HELD_OUT[0]) == wire
    assert relative_error(fitted.decode(wire), again.decode(wire)) == 0


def test_malformed_publications_are_refused(fitted: KltTrellis) -> None:
    good = fitted.published(decoder=True).tensors
    for tensors in ({}, {**good, "extra": torch.zeros(1)}, {**good, "tops": good["tops"][:-1]}):
        with pytest.raises(WireError, match="klt"):
            KltTrellis.from_published(fitted.settings, LAYOUT, Payload(tensors, {"epoch": 0}))

    with pytest.raises(WireError, match="epoch"):
        KltTrellis.from_published(fitted.settings, LAYOUT, Payload(good, {"epoch": 256}))


def test_any_published_numbers_give_a_working_codec(fitted: KltTrellis) -> None:
    draw = np.random.default_rng(0)
    good = fitted.published(decoder=True).tensors
    for zero in (0, 1):
        wild = {
            name: torch.from_numpy(
                draw.integers(1 if name == "counts" else info.min, info.max + 1, good[name].shape)
                * (zero if name in ("tops", "rotations") else 1)
            ).to(good[name].dtype)
            for name in good
            for info in [torch.iinfo(good[name].dtype)]
        }
        codec = KltTrellis.from_published(fitted.settings, LAYOUT, Payload(wild, {"epoch": 7}))
        wire = codec.encode(HELD_OUT[0])
        assert len(wire) <= codec.budget
        assert relative_error(HELD_OUT[0], codec.decode(wire)) < 1


def test_refit_needs_only_what_is_published_and_follows(fitted: KltTrellis) -> None:
    turned = [
        {
            name: tensor.flip(1 if "lora_A" in name else 0).contiguous()
            for name, tensor in update.items()
        }
        for update in (*SEEN, HELD_OUT[0])
    ]
    twin = KltTrellis.from_published(fitted.settings, LAYOUT, fitted.published(decoder=True))
    mine, theirs = (codec.refit(turned[:-1], weight=0.5) for codec in (fitted, twin))
    assert mine.epoch == 1
    assert mine.published(decoder=True).to_bytes() == theirs.published(decoder=True).to_bytes()
    error = relative_error(turned[-1], mine.decode(mine.encode(turned[-1])))
    assert error < 0.9 * relative_error(turned[-1], fitted.decode(fitted.encode(turned[-1])))

    with pytest.raises(WireError, match="another published transform"):
        mine.decode(fitted.encode(HELD_OUT[0]))
    theirs.epoch = 255
    assert theirs.refit(turned[:1], weight=0.3).epoch == 0


def test_other_profiles_are_refused(fitted: KltTrellis) -> None:
    """Both ends compute the profiles; if a machine's differ in one code, its frames say so."""

    class Other(KltTrellis):
        def _foresee(self) -> Any:
            found = super()._foresee()
            found[3, 0, 254] += 1
            return found

    wire = Other(fitted.settings, LAYOUT, fitted.model).encode(HELD_OUT[0])
    with pytest.raises(WireError, match="another published transform"):
        fitted.decode(wire)
    for settings in (KltTrellisSettings(memory=8), KltTrellisSettings(rate=65)):
        with pytest.raises(WireError):
            KltTrellis(settings, LAYOUT, fitted.model).decode(fitted.encode(HELD_OUT[0]))


@pytest.fixture(scope="module")
def body(fitted: KltTrellis) -> bytes:
    """The body of an honest frame, whose search takes longer than many decodings."""
    return fitted.body(LAYOUT.flatten(HELD_OUT[0]), 0)


@given(seed=st.integers(0, 2**32 - 1))
@examples(max_examples=200, deadline=None)
def test_mutated_bodies_decode_or_are_refused(fitted: KltTrellis, body: bytes, seed: int) -> None:
    draw = random.Random(seed)
    mutated = bytearray(body)
    for _ in range(draw.randint(1, 8)):
        mutated[draw.randrange(13 if draw.random() < 0.8 else len(mutated))] = draw.randrange(256)
    if draw.random() < 0.2:
        mutated = mutated[: draw.randrange(len(mutated))] + bytes(draw.randrange(3))

    try:
        decoded = fitted.decode(seal(fitted.code, fitted.fingerprint, bytes(mutated)))
    except WireError:
        return

    assert bool(torch.isfinite(LAYOUT.flatten(decoded)).all())


def test_damaged_frames_are_refused(fitted: KltTrellis) -> None:
    wire = fitted.encode(HELD_OUT[0])
    for position in range(len(wire)):
        damaged = bytearray(wire)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(WireError):
            fitted.decode(bytes(damaged))


@pytest.mark.parametrize(
    ("d", "kv", "rank", "rate"), [(8, 8, 1, 16), (16, 8, 2, 24), (33, 7, 3, 64), (64, 32, 8, 300)]
)
def test_tiny_layouts(d: int, kv: int, rank: int, rate: int) -> None:
    layout = attention_layout(d, kv, rank=rank)
    seen = subspace_updates(layout, 4, seed=1, decay=0.5)
    codec = KltTrellis.fit(KltTrellisSettings(rate=rate), layout, seen, seed=0)
    wire = codec.encode(seen[0])
    assert len(wire) <= codec.budget
    assert relative_error(seen[0], codec.decode(wire)) < 1


def test_a_rate_below_the_lowest_is_no_remedy() -> None:
    with pytest.raises(ConfigError, match=r"'klt_trellis' has no rate below 16, .* 'identity'"):
        KltTrellis.frame_size(KltTrellisSettings(), attention_layout(2, 2, rank=1))


def test_what_it_cannot_code_is_said(fitted: KltTrellis) -> None:
    for layout in (Layout((("lm_head.weight", (8, 8)),)), Layout(())):
        with pytest.raises(ConfigError, match="klt codes only|no tensors"):
            KltTrellis.fit(
                KltTrellisSettings(),
                layout,
                [layout.unflatten(torch.ones(layout.numel))] if layout.shapes else [{}],
                seed=0,
            )

    with pytest.raises(ConfigError, match="no updates"):
        KltTrellis.fit(KltTrellisSettings(), LAYOUT, [], seed=0)
    with pytest.raises(ConfigError, match="no updates"):
        fitted.refit([], weight=0.5)
