"""hadamard and eden: errors near theory, budgets kept, unbiasedness, and frames that lie."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fluvial.codecs import compiled
from fluvial.codecs.base import Codec
from fluvial.codecs.gaussian import Blocks
from fluvial.codecs.rotated.eden import Eden, EdenSettings, lloyd_max
from fluvial.codecs.rotated.hadamard import Hadamard, HadamardSettings
from fluvial.codecs.rotated.rotation import Rotation
from fluvial.errors import ConfigError, WireError
from fluvial.wire.frame import Reader, seal
from fluvial.wire.tensors import Layout, Named, norm, relative_error, subtract

STEPS = (-9000, -3000, 0, 2000)
"""Steps of quantisers, in codes of `Blocks`."""


def gaussian(seed: int = 0, scales: tuple[float, ...] = (1, 1, 1, 1)) -> Named:
    """Tensors of 10,240 values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{index}": 1e-4 * scale * torch.randn(80, 128, generator=generator)
        for index, scale in enumerate(scales)
    }


def hadamard(update: Named, **changes: float) -> Codec:
    return Hadamard(HadamardSettings.model_validate(changes), Layout.of(update))


def eden(update: Named, **changes: object) -> Codec:
    return Eden(EdenSettings.model_validate(changes), Layout.of(update))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 63, 96, 1000, 1024, 2047])
def test_a_rotation_keeps_norms_and_is_undone(size: int) -> None:
    x = torch.randn(3, size, dtype=torch.float64)
    rotation = Rotation(5, 3, size)
    z = rotation.forward(x)
    assert torch.allclose(z.norm(dim=1), x.norm(dim=1))
    assert torch.allclose(rotation.inverse(z), x)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 63, 1000, 4096, 70_000])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_compiled_rotations_are_those_of_torch(
    size: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within rounding, as sums are in another order; the input is left alone unless it may be
    overwritten."""
    pytest.importorskip("numba")
    x = torch.randn(3, size, dtype=kind, generator=torch.Generator().manual_seed(size))
    before = x.clone()
    rotation = Rotation(5, 3, size)
    forward, inverse = rotation.forward(x), rotation.inverse(x)
    assert torch.equal(x, before)
    assert torch.equal(rotation.forward(x.clone(), overwrite=True), forward)
    strided = x.T.contiguous().T
    assert torch.equal(rotation.forward(strided), forward)

    monkeypatch.setattr(compiled, "available", lambda: False)
    precision = 1e-5 if kind == torch.float32 else 1e-13
    assert torch.allclose(rotation.forward(x), forward, rtol=0, atol=precision)
    assert torch.allclose(rotation.inverse(x), inverse, rtol=0, atol=precision)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_rows_anywhere_in_a_vector_are_turned_in_place(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `forward` and `inverse` turn them, compiled or not; what lies between is left alone."""
    x = torch.randn(50, dtype=kind, generator=torch.Generator().manual_seed(0))
    starts = np.array([40, 3, 20])
    rotation = Rotation(5, 3, 7)

    for _ in ("compiled", "torch"):
        turned = x.clone()
        rotation.turn(turned, starts)
        expected = x.clone()
        rows = torch.stack([x[start : start + 7] for start in starts])
        for start, row in zip(starts, rotation.forward(rows), strict=True):
            expected[start : start + 7] = row
        assert torch.equal(turned, expected)

        rotation.turn(turned, starts, back=True)
        assert torch.allclose(turned, x, rtol=0, atol=1e-6)
        monkeypatch.setattr(compiled, "available", lambda: False)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_frame(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    update = gaussian(0, (1, 0.1, 1, 1e-3))
    frame = hadamard(update).encode(update)
    decoded = hadamard(update).decode(frame)
    monkeypatch.setattr(compiled, "_cores", lambda: threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert hadamard(update).encode(update) == frame
    again = hadamard(update).decode(frame)
    assert all(torch.equal(decoded[name], again[name]) for name in decoded)


def test_compiled_blocks_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    random = np.random.default_rng(0)
    values = np.concatenate([random.standard_t(2, 500), 1e-3 * random.normal(size=70), np.zeros(9)])
    blocks = Blocks([500, 0, 70, 9])
    expected = [(blocks.excess(values, step, 99), blocks.encode_at(values, step)) for step in STEPS]
    monkeypatch.setattr(compiled, "available", lambda: False)

    for step, (excess, data) in zip(STEPS, expected, strict=True):
        assert blocks.excess(values, step, 99) == excess
        assert blocks.encode_at(values, step) == data


@pytest.mark.parametrize("size", [1024, 1500, 2047])
def test_a_rotation_spreads_a_spike(size: int) -> None:
    spike = torch.zeros(1, size, dtype=torch.float64)
    spike[0, size // 3] = 1
    assert Rotation(0, 1, size).forward(spike).abs().max() < 0.25


@pytest.mark.parametrize(
    ("rate", "expected"), [(16, 0.0892), (32, 0.3486), (64, 0.6177), (128, 0.7899)]
)
def test_hadamard_reaches_the_entropy_coded_quantiser(rate: float, expected: float) -> None:
    """Uniform thresholds and centroids for N(0, 1) at 2, 1, 1/2 and 1/4 bits, computed by numerical
    search."""
    for seed in range(3):
        update = gaussian(seed)
        codec = hadamard(update, rate=rate)
        frame = codec.encode(update, seed=seed)
        assert 0.98 * codec.layout.raw_bytes / rate <= len(frame) <= codec.layout.raw_bytes / rate
        assert relative_error(update, codec.decode(frame)) == pytest.approx(expected, abs=0.01)


def test_hadamard_spends_bits_where_the_energy_is() -> None:
    update = gaussian(0, (1, 0.1, 0.01, 1e-6))
    codec = hadamard(update, rate=64)
    decoded = codec.decode(codec.encode(update))
    assert relative_error(update, decoded) < 0.15
    assert not decoded["t3"].any()


@pytest.mark.parametrize(
    ("rate", "fixed", "coded"), [(16, 0.133, 0.099), (32, 0.572, 0.54), (64, 2.14, 1.62)]
)
def test_eden_errors_are_those_of_theory(rate: float, fixed: float, coded: float) -> None:
    """1 / (p (1 - D)) - 1 with D .1175, .3634 of Lloyd-Max at 2 and 1 bits, p = 1/2 for half a bit;
    or D of ECSQ."""
    update = gaussian(1)
    for levels, expected in (("fixed", fixed), ("entropy", coded)):
        codec = eden(update, rate=rate, levels=levels)
        frame = codec.encode(update, seed=3)
        assert 0.98 * codec.layout.raw_bytes / rate <= len(frame) <= codec.layout.raw_bytes / rate
        assert relative_error(update, codec.decode(frame)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("levels", ["fixed", "entropy"])
@pytest.mark.parametrize("rate", [20, 64])
def test_eden_is_unbiased_over_seeds(levels: str, rate: float) -> None:
    update = {"w": torch.randn(700, generator=torch.Generator().manual_seed(0)) ** 3}
    codec = eden(update, rate=rate, levels=levels)
    decoded = [codec.decode(codec.encode(update, seed=seed)) for seed in range(1200)]
    mean = torch.stack([one["w"] for one in decoded]).mean(0)
    noise = float(np.mean([relative_error(update, one) for one in decoded])) / len(decoded)
    assert float((mean @ update["w"]) / update["w"].square().sum()) == pytest.approx(1, abs=1e-4)
    assert relative_error(update, {"w": mean}) == pytest.approx(noise, rel=0.25)


@pytest.mark.parametrize("levels", ["fixed", "entropy"])
def test_eden_of_least_error_contracts_and_the_other_refuses_error_feedback(levels: str) -> None:
    update = gaussian()
    codec = eden(update, unbiased="no", levels=levels, rate=128)
    assert norm(subtract(update, codec.decode(codec.encode(update)))) < norm(update)

    with pytest.raises(ValidationError, match="error_feedback"):
        eden(update, error_feedback=True)
    eden(update, error_feedback=True, unbiased="no")


def test_lloyd_max_has_the_known_distortions() -> None:
    """Max, "Quantizing for Minimum Distortion", 1960, table I."""
    grid = np.random.default_rng(0).normal(size=400_000)
    for bits, expected in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        levels = lloyd_max(bits)
        nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)]
        assert ((grid - nearest) ** 2).mean() == pytest.approx(expected, rel=0.02)


def test_frames_are_deterministic_and_differ_by_seed() -> None:
    update = gaussian()
    for make in (hadamard, eden):
        frames = [make(update).encode(update, seed=seed) for seed in (1, 1, 2)]
        assert frames[0] == frames[1] != frames[2]


@pytest.mark.parametrize(
    "codec", [hadamard(gaussian()), eden(gaussian()), eden(gaussian(), levels="fixed")]
)
def test_frames_that_lie_are_refused_or_harmless(codec: Codec) -> None:
    body = codec.encode(gaussian())[8:-4]
    random = np.random.default_rng(0)
    refused = 0

    for _ in range(300):
        damaged = bytearray(body)
        damaged[random.integers(len(body)) if random.random() < 0.5 else random.integers(20)] ^= (
            1 << random.integers(8)
        )
        try:
            codec.layout.check(
                codec.decode(seal(codec.code, codec.fingerprint, bytes(damaged))), "decoded"
            )
        except WireError:
            refused += 1

    assert refused > 10


@pytest.mark.parametrize("size", [1, 2, 3, 63, 65])
@pytest.mark.parametrize("levels", ["fixed", "entropy"])
def test_tiny_updates_and_silence(size: int, levels: str) -> None:
    update = {"w": torch.linspace(-1, 1, size) * 1e-6 + 1e-7, "zero": torch.zeros(5)}
    room = {"rate": 0.05}  # a file refuses it; a few values need it, for their header
    layout = Layout.of(update)
    settings = EdenSettings.model_validate({"unbiased": "no", "levels": levels})
    codecs = (
        Hadamard(HadamardSettings().model_copy(update=room), layout),
        Eden(settings.model_copy(update=room), layout),
    )

    for codec in codecs:
        decoded = codec.decode(codec.encode(update))
        assert norm(decoded) > 0
        assert not decoded["zero"].any()
        assert norm(subtract(update, decoded)) <= norm(update)
        nothing = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
        assert norm(codec.decode(codec.encode(nothing))) == 0


def test_a_rate_without_room_is_refused() -> None:
    for make in (hadamard, eden):
        with pytest.raises(ConfigError, match="choose at most"):
            make({"w": torch.zeros(64)}, rate=64)


def test_blocks_decode_as_predicted_and_never_beyond_twice_a_value() -> None:
    random = np.random.default_rng(0)
    values = np.concatenate([random.standard_t(2, 500), 1e-3 * random.normal(size=70), np.zeros(9)])
    blocks = Blocks([500, 70, 9])

    for room in (16, 40, 400, 2000):
        data = blocks.encode(values, room)
        assert len(data) <= room
        decoded = blocks.decode(Reader(data))
        assert (np.abs(values - decoded) <= np.abs(values)).all()

    for step in (-6000, 0, 2000):
        assert np.array_equal(
            blocks.decode(Reader(blocks.encode_at(values, step))), blocks.decoded(values, step)
        )
