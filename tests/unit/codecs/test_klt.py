"""klt and klt_sum: they meet their rate, carry more than a code without learning can, and trust
nothing."""

import json
import random
import struct
import subprocess
import sys
import zlib
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import ValidationError

from fluvial.codecs.klt import tables as klt_tables
from fluvial.codecs.klt.codec import Klt
from fluvial.codecs.klt.settings import KltSettings
from fluvial.codecs.klt.sum import KltSum, KltSumSettings
from fluvial.errors import ConfigError, WireError
from fluvial.wire.frame import OVERHEAD, seal
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import (
    Layout,
    Named,
    add,
    cosine,
    norm,
    relative_error,
    scale,
    subtract,
)
from tests.support import GOLDEN, ROOT, reference_klt
from tests.support.updates import attention_layout, subspace_updates

FRAMES = GOLDEN / "klt.json"


LAYOUT = attention_layout()


SEEN = subspace_updates(LAYOUT, 12, seed=1, decay=1.0)
HELD_OUT = subspace_updates(LAYOUT, 3, seed=2, decay=1.0)


def white(seed: int = 0) -> Named:
    return LAYOUT.unflatten(
        torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(seed))
    )


@pytest.fixture(scope="module")
def fitted() -> Klt:
    return Klt.fit(KltSettings(), LAYOUT, SEEN, seed=0)


@pytest.fixture(scope="module")
def dithered(fitted: Klt) -> Klt:
    return Klt(KltSettings(mode="dithered", rate=16), LAYOUT, fitted.model)


@pytest.fixture(scope="module")
def summed() -> KltSum:
    return KltSum.fit(KltSumSettings(rate=16), LAYOUT, SEEN, seed=0)


@pytest.mark.parametrize("rate", [4, 8, 16, 32, 64, 128])
def test_meets_its_rate_and_beats_the_bound_of_an_unlearned_code(rate: int) -> None:
    codec = Klt.fit(KltSettings(rate=rate), LAYOUT, SEEN, seed=0)
    for update in HELD_OUT:
        wire = codec.encode(update)
        assert len(wire) <= LAYOUT.raw_bytes / rate
        assert len(wire) > 0.97 * LAYOUT.raw_bytes / rate
        without_learning = 2 ** (
            -2 * 32 / rate
        )  # distortion of a white Gaussian source at 32 / rate bits a value
        assert relative_error(update, codec.decode(wire)) < min(0.9 * without_learning, 0.9)


@pytest.mark.parametrize("rate", [4, 8, 16])
def test_updates_unlike_those_of_the_fit_are_not_silent(rate: int) -> None:
    """White updates on so few that most directions seem to have no variance: what has is sent."""
    layout = attention_layout(128, 128, layers=2, rank=4, modules=("q_proj",))
    updates = [
        layout.unflatten(torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed)))
        for seed in range(5)
    ]
    codec = Klt.fit(KltSettings(rate=rate), layout, updates[1:], seed=0)
    wire = codec.encode(updates[0])
    assert len(wire) <= layout.raw_bytes / rate
    assert relative_error(updates[0], codec.decode(wire)) < 0.95


def test_the_header_is_short(fitted: Klt) -> None:
    silent = fitted.encode(scale(SEEN[0], 0.0))
    assert len(silent) == OVERHEAD + 3 + 1 + 8 // 2


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_analysis_keeps_norms_and_is_inverted(share: float) -> None:
    codec = Klt.fit(KltSettings(basis_share=share), LAYOUT, SEEN, seed=0)
    vector = LAYOUT.flatten(white())
    latent = codec.analyse(vector)
    assert latent.shape == vector.shape
    assert float(latent.norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
    assert torch.allclose(codec.synthesise(latent), vector, atol=1e-5)
    leading = codec.transform.forward(vector, rest=False)
    assert torch.equal(leading, latent[: codec.transform.num_tops])
    only = torch.cat([leading, torch.zeros(len(latent) - len(leading))])
    assert torch.allclose(codec.synthesise(leading), codec.synthesise(only), atol=1e-5)


def test_latents_and_updates_give_the_same_frame(fitted: Klt) -> None:
    vector = LAYOUT.flatten(HELD_OUT[0])
    decoded = fitted.decode(fitted.seal(fitted.pack(fitted.analyse(vector))))
    assert relative_error(fitted.decode(fitted.encode(HELD_OUT[0])), decoded) < 1e-2


def test_ranks_may_differ_and_targets_share_what_they_read() -> None:
    shapes = {
        "layers.0.mlp.gate_proj.lora_A.weight": (4, 32),
        "layers.0.mlp.gate_proj.lora_B.weight": (48, 4),
        "layers.0.mlp.up_proj.lora_A.weight": (2, 32),
        "layers.0.mlp.up_proj.lora_B.weight": (48, 2),
        "layers.0.mlp.down_proj.lora_A.weight": (2, 48),
        "layers.0.mlp.down_proj.lora_B.weight": (32, 2),
    }
    layout = Layout(tuple(sorted(shapes.items())))
    seen = [layout.unflatten(torch.randn(layout.numel)) for _ in range(4)]
    codec = Klt.fit(KltSettings(rate=8), layout, seen, seed=0)
    assert len({factor.basis for factor in codec.factors}) == 5
    vector = layout.flatten(seen[0])
    assert torch.allclose(codec.synthesise(codec.analyse(vector)), vector, atol=1e-5)
    assert relative_error(seen[0], codec.decode(codec.encode(seen[0]))) < 0.2


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-12, 1.0, 1e12, 1e30])
def test_size_of_the_update_does_not_matter(fitted: Klt, size: float) -> None:
    update = scale(HELD_OUT[0], size)
    wire = fitted.encode(update)
    assert len(wire) <= fitted.budget

    if size == 0 or size >= 1e-12:
        assert relative_error(update, fitted.decode(wire)) < 0.5


def test_one_factor_alone(fitted: Klt) -> None:
    update = {
        name: tensor if "lora_B" in name else 0 * tensor for name, tensor in HELD_OUT[0].items()
    }
    decoded = fitted.decode(fitted.encode(update))
    assert all(norm({name: decoded[name]}) == 0 for name in decoded if "lora_A" in name)
    assert relative_error(update, decoded) < 0.3


@given(kind=st.sampled_from(["white", "spike", "spikes", "column"]), seed=st.integers(0, 2**32 - 1))
@examples(max_examples=25, deadline=None)
def test_nothing_grows(fitted: Klt, kind: str, seed: int) -> None:
    """Error feedback needs a contraction, even on updates unlike those of `fit`."""
    draw = torch.Generator().manual_seed(seed)
    vector = torch.randn(LAYOUT.numel, generator=draw)

    if kind != "white":
        where = torch.randint(LAYOUT.numel, (1 if kind == "spike" else 40,), generator=draw)
        mask = torch.zeros(LAYOUT.numel)
        mask[where] = 1

        if kind == "column":
            mask[: LAYOUT.sizes[0]] = 1
        vector = vector * mask

    update = LAYOUT.unflatten(vector)
    wire = fitted.encode(update)
    assert len(wire) <= fitted.budget
    assert relative_error(update, fitted.decode(wire)) <= 1  # a lone spike may be beyond the budget


def test_error_feedback_stays_bounded(fitted: Klt) -> None:
    residual = scale(SEEN[0], 0.0)
    for update in subspace_updates(LAYOUT, 12, seed=5, decay=1.0):
        wanted = add(update, residual)
        residual = subtract(wanted, fitted.decode(fitted.encode(wanted)))
        assert norm(residual) < 2 * norm(update)


def test_published_gives_the_same_codec(fitted: Klt) -> None:
    payload = Payload.from_bytes(fitted.published(decoder=False).to_bytes())
    again = Klt.from_published(fitted.settings, LAYOUT, payload)
    wire = fitted.encode(HELD_OUT[0])
    assert again.encode(HELD_OUT[0]) == wire
    assert relative_error(fitted.decode(wire), again.decode(wire)) == 0
    assert len(payload.to_bytes()) < LAYOUT.raw_bytes  # less than one raw update


def test_fit_is_deterministic(fitted: Klt) -> None:
    again = Klt.fit(fitted.settings, LAYOUT, SEEN, seed=0)
    assert again.published(decoder=True).to_bytes() == fitted.published(decoder=True).to_bytes()


def test_fit_from_one_zero_update() -> None:
    codec = Klt.fit(KltSettings(), LAYOUT, [scale(SEEN[0], 0.0)], seed=0)
    assert relative_error(HELD_OUT[0], codec.decode(codec.encode(HELD_OUT[0]))) < 1


def test_another_rate_is_the_codec_fitted_at_it_but_for_its_entropy_tables(fitted: Klt) -> None:
    coarse = fitted.at_rate(2 * fitted.settings.rate)
    again = coarse.at_rate(fitted.settings.rate)
    wire = fitted.encode(HELD_OUT[0])
    assert again.encode(HELD_OUT[0]) == wire
    assert coarse.published(decoder=True).to_bytes() == fitted.published(decoder=True).to_bytes()
    assert len(coarse.encode(HELD_OUT[0])) <= LAYOUT.raw_bytes / coarse.settings.rate < len(wire)


def turned(updates: list[Named]) -> list[Named]:
    """Updates along other directions: every feature axis reversed."""
    return [
        {
            name: tensor.flip(1 if "lora_A" in name else 0).contiguous()
            for name, tensor in update.items()
        }
        for update in updates
    ]


def test_refit_learns_new_directions_and_keeps_old_ones(fitted: Klt) -> None:
    new = turned(SEEN)
    unseen = turned(HELD_OUT)[0]
    again = fitted.refit(new, weight=0.5)
    assert again.epoch == 1

    def error(codec: Klt, update: Named) -> float:
        return relative_error(update, codec.decode(codec.encode(update)))

    assert error(again, unseen) < 0.8 * error(fitted, unseen)
    assert error(again, HELD_OUT[0]) < error(
        Klt.fit(fitted.settings, LAYOUT, new, seed=0), HELD_OUT[0]
    )
    same = fitted.refit(new, weight=0.0)
    assert error(same, HELD_OUT[0]) == pytest.approx(error(fitted, HELD_OUT[0]), rel=0.1)


def test_refit_needs_only_what_is_published(fitted: Klt) -> None:
    twin = Klt.from_published(fitted.settings, LAYOUT, fitted.published(decoder=True))
    decoded = [fitted.decode(fitted.encode(update)) for update in HELD_OUT]
    mine = fitted.refit(decoded, weight=0.3)
    theirs = twin.refit(decoded, weight=0.3)
    assert mine.published(decoder=True).to_bytes() == theirs.published(decoder=True).to_bytes()
    theirs.epoch = 255
    assert theirs.refit(decoded[:1], weight=0.3).epoch == 0


def test_refit_is_the_same_in_another_process(fitted: Klt) -> None:
    program = (
        "import zlib, torch; torch.set_num_threads(1); from tests.unit.codecs.test_klt import *;"
        "codec = Klt.fit(KltSettings(), LAYOUT, SEEN, seed=0).refit(HELD_OUT, weight=0.3);"
        "print(zlib.crc32(codec.published(decoder=True).to_bytes()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        cwd=ROOT,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    mine = Klt.fit(KltSettings(), LAYOUT, SEEN, seed=0).refit(HELD_OUT, weight=0.3)
    torch.set_num_threads(before)
    assert int(found.stdout) == zlib.crc32(mine.published(decoder=True).to_bytes())


def test_another_epoch_is_named(fitted: Klt) -> None:
    wire = fitted.encode(HELD_OUT[0])
    with pytest.raises(WireError, match="transform epoch 0, this end has epoch 1"):
        fitted.refit(HELD_OUT, weight=0.1).decode(wire)
    other = Klt.fit(fitted.settings, LAYOUT, HELD_OUT, seed=0)
    with pytest.raises(WireError, match="another published transform"):
        other.decode(wire)


def test_dither_has_no_bias(dithered: Klt) -> None:
    count = 256
    decoded = [dithered.decode(dithered.encode(HELD_OUT[0], seed=seed)) for seed in range(count)]
    single = np.mean([relative_error(HELD_OUT[0], each) for each in decoded[:16]])
    mean = scale(reduce(add, decoded), 1 / count)
    assert relative_error(HELD_OUT[0], mean) < 1.3 * single / count


def test_dither_of_what_is_far_below_the_step_has_no_bias(dithered: Klt) -> None:
    """At a high rate nearly all is rounded at random."""
    coarse = dithered.at_rate(256)
    count = 512
    decoded = [coarse.decode(coarse.encode(HELD_OUT[0], seed=seed)) for seed in range(count)]
    single = np.mean([relative_error(HELD_OUT[0], each) for each in decoded[:16]])
    assert (
        relative_error(HELD_OUT[0], scale(reduce(add, decoded), 1 / count)) < 1.3 * single / count
    )


def test_the_seed_decides(dithered: Klt) -> None:
    wire = dithered.encode(HELD_OUT[0], seed=5)
    assert len(wire) <= dithered.budget
    assert dithered.encode(HELD_OUT[0], seed=5) == wire != dithered.encode(HELD_OUT[0], seed=6)
    assert wire[OVERHEAD - 4 + 3 : OVERHEAD - 4 + 7] == struct.pack("<I", 5)


def test_dither_with_feedback_is_refused() -> None:
    with pytest.raises(ValidationError, match="diverges"):
        KltSettings(mode="dithered", error_feedback=True)


@pytest.mark.parametrize("codec", ["klt", "klt_sum"])
def test_malformed_publications_are_refused(fitted: Klt, summed: KltSum, codec: str) -> None:
    one: Klt | KltSum = fitted if codec == "klt" else summed
    good = one.published(decoder=True).tensors
    for tensors in (
        {},
        {name: tensor for name, tensor in good.items() if name != "rows"},
        {**good, "extra": torch.zeros(1)},
        {**good, "tops": good["tops"][:-1]},
        {**good, "rows": good["rows"].float()},
        {**good, "counts": 0 * good["counts"]},
    ):
        with pytest.raises(WireError, match="klt"):
            type(one).from_published(one.settings, LAYOUT, Payload(tensors, {"epoch": 0}))

    values: list[dict[str, Any]] = [{}, {"epoch": 256}, {"epoch": -1}, {"epoch": True}]
    for each in values:
        with pytest.raises(WireError, match="epoch"):
            type(one).from_published(one.settings, LAYOUT, Payload(good, each))


def test_any_published_numbers_give_a_working_codec(fitted: Klt) -> None:
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
        codec = Klt.from_published(fitted.settings, LAYOUT, Payload(wild, {"epoch": 7}))
        wire = codec.encode(HELD_OUT[0])
        assert len(wire) <= codec.budget
        assert Layout.of(codec.decode(wire)) == LAYOUT


@given(seed=st.integers(0, 2**32 - 1), mode=st.sampled_from(["biased", "dithered", "summed"]))
@examples(max_examples=300, deadline=None)
def test_mutated_bodies_decode_or_are_refused(
    fitted: Klt, dithered: Klt, summed: KltSum, seed: int, mode: str
) -> None:
    codec: Klt | KltSum = {"biased": fitted, "dithered": dithered, "summed": summed}[mode]  # type: ignore[assignment]
    draw = random.Random(seed)
    mutated = bytearray(codec.body(LAYOUT.flatten(HELD_OUT[0]), 0))

    for _ in range(draw.randint(1, 8)):
        mutated[draw.randrange(12 if draw.random() < 0.5 else len(mutated))] = draw.randrange(256)
    if draw.random() < 0.2:
        mutated = mutated[: draw.randrange(len(mutated))] + bytes(draw.randrange(3))

    wire = seal(codec.code, codec.fingerprint, bytes(mutated))
    try:
        decoded = codec.decode(wire)
    except WireError:
        return

    assert bool(torch.isfinite(LAYOUT.flatten(decoded)).all())


def test_damaged_frames_are_refused(fitted: Klt) -> None:
    wire = fitted.encode(HELD_OUT[0])
    for position in range(len(wire)):
        damaged = bytearray(wire)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(WireError):
            fitted.decode(bytes(damaged))

    for short in (b"", wire[:8], wire[:-1]):
        with pytest.raises(WireError):
            fitted.decode(short)


def test_tables() -> None:
    for mode, digest in (("biased", 1642577127), ("dithered", 3947261910)):
        tables = klt_tables.Tables(mode)  # type: ignore[arg-type]
        assert tables.digest == digest, (
            "frames of other builds could not be read: this is a new format"
        )
        for table in tables.tables:
            assert int(table.counts.min()) > 0
            assert table.signed.sum() == pytest.approx(klt_tables.TOTAL, rel=1e-2)
            assert bool((np.diff(table.centroids) > 0).all())


def test_the_reference_decodes_the_same() -> None:
    layout = attention_layout(d=32, kv=16, layers=1, rank=4)
    seen = subspace_updates(layout, 8, seed=1, decay=1.0)
    for rate in (8, 32):
        codec = Klt.fit(KltSettings(rate=rate), layout, seen[:6], seed=0)
        published = {
            name: tensor.tolist() for name, tensor in codec.published(decoder=True).tensors.items()
        }
        for update in seen[6:]:
            wire = codec.encode(update)
            ours = codec.decode(wire)
            share = codec.settings.basis_share
            theirs = reference_klt.decode(wire, layout.shapes, published, share)  # type: ignore[arg-type]
            largest = max(float(tensor.abs().max()) for tensor in ours.values())

            for number, name in enumerate(layout.names):
                assert torch.allclose(
                    ours[name], torch.tensor(theirs[str(number)]), rtol=1e-5, atol=1e-5 * largest
                )


def test_golden_frames() -> None:
    """Frames written once decode to what they did then: the format cannot change unnoticed."""
    golden = json.loads(FRAMES.read_text())
    layout = Layout(tuple((name, tuple(shape)) for name, shape in golden["layout"]))
    types = {"tops": torch.int8, "rotations": torch.int8, "rows": torch.int8, "cols": torch.int8}
    types |= {"groups": torch.int16, "counts": torch.int16, "centroids": torch.int8}
    tensors = {
        name: torch.tensor(golden["published"][name], dtype=kind) for name, kind in types.items()
    }
    payload = Payload(tensors, {"epoch": golden["epoch"]})

    for each in golden["frames"]:
        settings = each["settings"]
        kind = Klt if each["settings"]["name"] == "klt" else KltSum
        schema = KltSettings if kind is Klt else KltSumSettings
        codec = kind.from_published(schema.model_validate(settings), layout, payload)
        decoded = layout.flatten(codec.decode(bytes.fromhex(each["wire"]), round=golden["round"]))
        assert torch.allclose(decoded, torch.tensor(each["values"]), rtol=1e-4, atol=1e-8), settings

        if settings.get("mode") == "biased":
            values = reference_klt.decode(
                bytes.fromhex(each["wire"]),
                layout.shapes,  # type: ignore[arg-type]
                golden["published"],
                schema().basis_share,
            )
            flat = [
                value
                for number in range(len(layout.names))
                for row in values[str(number)]
                for value in row
            ]
            assert torch.allclose(decoded, torch.tensor(flat), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 64])
def test_a_sum_of_frames_is_a_frame_of_the_sum(summed: KltSum, count: int) -> None:
    updates = [HELD_OUT[number % 3] for number in range(count)]
    frames = [summed.encode(update, seed=seed, round=3) for seed, update in enumerate(updates)]
    assert {len(frame) for frame in frames} == {len(frames[0])}
    assert len(frames[0]) <= LAYOUT.raw_bytes / 16
    integers = sum(
        summed.quantise(LAYOUT.flatten(update), seed) for seed, update in enumerate(updates)
    )
    assert isinstance(integers, np.ndarray)
    total = summed.sum_frames(frames)
    assert torch.equal(
        LAYOUT.flatten(summed.decode_sum(total, count, round=3)), summed.synthesise(integers)
    )
    each = reduce(add, [summed.decode(frame, round=3) for frame in frames])
    assert relative_error(each, summed.decode_sum(total, count)) < 1e-10


def test_sums_do_not_depend_on_the_order_and_nest(summed: KltSum) -> None:
    a, b, c = (summed.encode(update, seed=seed) for seed, update in enumerate(HELD_OUT))
    assert summed.sum_frames([a, b, c]) == summed.sum_frames([c, summed.sum_frames([b, a])])


def test_masks_that_cancel_leave_no_trace(summed: KltSum) -> None:
    vectors = [LAYOUT.flatten(update) for update in HELD_OUT[:2]]
    mask = np.random.default_rng(0).integers(0, 2**30, summed.kept)
    plain = [summed.quantise(vector, 0) for vector in vectors]
    masked = [
        summed.seal(summed._pack(plain[0] + mask)),
        summed.seal(summed._pack(plain[1] - mask)),
    ]

    with pytest.raises(WireError, match="a mask is left"):
        summed.decode(masked[0])
    total = summed.decode_sum(summed.sum_frames(masked), 2)
    assert torch.equal(LAYOUT.flatten(total), summed.synthesise(plain[0] + plain[1]))


def test_the_sum_is_close_to_the_truth(summed: KltSum) -> None:
    frames = [summed.encode(update, seed=seed) for seed, update in enumerate(HELD_OUT)]
    assert cosine(summed.decode_sum(summed.sum_frames(frames), 3), reduce(add, HELD_OUT)) > 0.9


def test_rounding_of_sums_has_no_bias(summed: KltSum) -> None:
    vector = LAYOUT.flatten(scale(HELD_OUT[0], 0.3))  # clipped nowhere
    wanted = summed.transform.forward(vector).numpy()[summed._where] / summed._steps
    mean = np.mean([summed.quantise(vector, seed) for seed in range(1000)], axis=0)
    assert np.abs(mean - wanted).max() < 5 * 0.5 / 1000**0.5


def test_sums_that_cannot_be_right_are_refused(summed: KltSum) -> None:
    frame = summed.encode(HELD_OUT[0], round=1)
    with pytest.raises(ConfigError, match="max_sites"):
        summed.sum_frames([frame] * 65)
    with pytest.raises(ConfigError, match="0 frames"):
        summed.sum_frames([])
    with pytest.raises(WireError, match="of round 2"):
        summed.sum_frames([frame, summed.encode(HELD_OUT[0], round=2)])
    with pytest.raises(WireError, match="shorter"):
        summed.sum_frames([b"x"])
    total = summed.sum_frames([frame] * 8)
    with pytest.raises(WireError, match="sites are missing"):
        summed.decode_sum(total, 1)
    with pytest.raises(WireError, match="0 sites"):
        summed.decode_sum(total, 0)


@pytest.mark.parametrize(
    ("sites", "levels", "bits"), [(1, 1, 2), (64, 7, 10), (64, 8, 11), (2, 1, 3)]
)
def test_integers_have_room_for_all_sites(sites: int, levels: int, bits: int) -> None:
    settings = KltSumSettings(max_sites=sites, levels=levels)
    assert settings.bits == bits
    assert 2**bits >= 2 * levels * sites + 1


@pytest.mark.parametrize("kind", [KltSettings, KltSumSettings])
@pytest.mark.parametrize(
    ("layout", "rate", "message"),
    [
        (attention_layout(d=8, kv=8, layers=1), 400, "lower rate|at most"),
        (Layout((("lm_head.weight", (8, 8)),)), 64, "'lm_head.weight' with shape"),
        (Layout((("q_proj.lora_A.weight", (0, 8)),)), 64, "with shape"),
        (Layout(()), 64, "no tensors"),
    ],
)
def test_what_it_cannot_code_is_said(kind: Any, layout: Layout, rate: float, message: str) -> None:
    update = layout.unflatten(torch.ones(layout.numel)) if layout.shapes else {}
    codec = Klt if kind is KltSettings else KltSum
    with pytest.raises(ConfigError, match=message):
        codec.fit(kind(rate=rate), layout, [update], seed=0)


def test_nothing_to_learn_from(fitted: Klt) -> None:
    with pytest.raises(ConfigError, match="no updates"):
        Klt.fit(KltSettings(), LAYOUT, [], seed=0)
    with pytest.raises(ConfigError, match="no updates"):
        KltSum.fit(KltSumSettings(), LAYOUT, [], seed=0)
    with pytest.raises(ConfigError, match="no updates"):
        fitted.refit([], weight=0.5)
