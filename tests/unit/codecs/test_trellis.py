"""Trellis-coded quantisation: near the Gaussian bound, a contraction, bits that both ends lay out
alike."""

import json

import numpy as np
import pytest
import torch

from fluvial.codecs.rotated.hadamard import Hadamard, HadamardSettings
from fluvial.codecs.rotated.paths import Plan, codebook, follow, search
from fluvial.codecs.rotated.trellis import Trellis, TrellisSettings
from fluvial.errors import WireError
from fluvial.wire.frame import OVERHEAD
from fluvial.wire.tensors import Layout, Named, norm, relative_error, subtract
from tests.support import GOLDEN

SHAPES = {
    f"layers.{layer}.{module}.lora_{which}.weight": (8, 96) if which == "A" else (96, 8)
    for layer in range(4)
    for module in ("q_proj", "v_proj")
    for which in ("A", "B")
}


def update(seed: int = 0, quiet: float = 1.0) -> Named:
    """Gaussian; B factors are `quiet` times as loud."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: (quiet if ".lora_B." in name else 1.0) * 1e-3 * torch.randn(shape, generator=random)
        for name, shape in SHAPES.items()
    }


LAYOUT = Layout.of(update())


def make(rate: float = 64, memory: int = 10) -> Trellis:
    return Trellis(TrellisSettings.model_validate({"rate": rate, "memory": memory}), LAYOUT)


@pytest.mark.parametrize(
    ("bits", "bound"), [(0.25, 0.707), (0.5, 0.5), (1.0, 0.25), (2.0, 0.0625), (1.5, 0.125)]
)
def test_a_path_is_near_the_gaussian_bound(bits: float, bound: float) -> None:
    """Within 0.6 dB of 2^-2R, where an entropy-coded scalar quantiser is 0.5 (low R) to 1.5 dB
    above it."""
    values = np.random.default_rng(0).normal(size=8192)
    _, decoded = search(values, int(bits * 8192), 10)
    error = float(((values - decoded) ** 2).mean() / (values**2).mean())
    assert bound < error < bound * (1.35 if bits > 1 else 1.2)


def test_more_memory_is_nearer_to_the_bound() -> None:
    values = np.random.default_rng(1).normal(size=8192)
    errors = [
        float(((values - search(values, 4096, memory)[1]) ** 2).mean()) for memory in (6, 8, 10, 12)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("rate", [16, 32, 64, 128])
def test_it_loses_less_than_a_scalar_quantiser_at_equal_bytes(rate: float) -> None:
    trellis = make(rate)
    scalar = Hadamard(HadamardSettings(rate=rate), LAYOUT)
    for seed in range(3):
        frames = [codec.encode(update(seed), seed=seed) for codec in (trellis, scalar)]
        assert len(frames[0]) <= LAYOUT.raw_bytes / rate
        errors = [
            relative_error(update(seed), codec.decode(f))
            for codec, f in zip((trellis, scalar), frames, strict=True)
        ]
        assert errors[0] < 0.97 * errors[1]


def test_loud_groups_get_more_bits() -> None:
    """By reverse water-filling: two groups at half the energy each 20 dB apart need no bits for the
    quiet one."""
    found = update(quiet=0.1)
    decoded = make().decode(make().encode(found))
    assert relative_error(found, decoded) < 0.35
    even = relative_error(update(), make().decode(make().encode(update())))
    assert even > 0.5


@pytest.mark.parametrize("kind", ["cauchy", "one", "tiny", "huge", "sparse"])
def test_any_update_shrinks(kind: str) -> None:
    random = np.random.default_rng(0)
    values = {
        "cauchy": random.standard_cauchy(LAYOUT.numel),
        "one": np.eye(1, LAYOUT.numel, 77)[0],
        "tiny": 1e-37 * random.normal(size=LAYOUT.numel),
        "huge": 1e36 * random.normal(size=LAYOUT.numel),
        "sparse": random.normal(size=LAYOUT.numel) * (random.random(LAYOUT.numel) < 0.01),
    }[kind]
    found = LAYOUT.unflatten(torch.from_numpy(values).float())
    decoded = make(32).decode(make(32).encode(found))
    assert norm(subtract(found, decoded)) < norm(found)


def test_decoding_needs_the_bytes_only_and_follows_the_seed() -> None:
    frames = [make().encode(update(), seed=seed) for seed in (1, 1, 2)]
    assert frames[0] == frames[1] != frames[2]
    fresh = Trellis(TrellisSettings(), LAYOUT).decode(frames[0])
    assert all(
        torch.equal(fresh[name], tensor) for name, tensor in make().decode(frames[0]).items()
    )


def test_the_search_returns_what_the_bits_decode_to() -> None:
    for size, bits, memory in (
        (1, 6, 6),
        (10, 3, 8),
        (1025, 700, 10),
        (3000, 9001, 6),
        (64, 1, 12),
    ):
        path, decoded = search(np.random.default_rng(size).normal(size=size), bits, memory)
        plan = Plan.of(size, bits)
        assert len(path) == plan.total <= bits
        assert np.array_equal(follow(path, plan, memory), decoded)


def test_no_other_path_of_a_short_block_is_better() -> None:
    """All 2^10 paths, tried one by one."""
    values = np.random.default_rng(3).normal(size=20)
    plan = Plan.of(20, 10)
    _, found = search(values, 10, 6)
    every = (np.arange(1 << 10)[:, None] >> np.arange(10) & 1).astype(np.uint8)
    errors = [float(((values - follow(path, plan, 6)) ** 2).sum()) for path in every]
    assert float(((values - found) ** 2).sum()) == pytest.approx(min(errors), rel=1e-5)


def test_the_codebook_is_the_same_everywhere() -> None:
    """Pinned: both ends make it anew."""
    book = codebook(10)
    assert book.shape == (64, 1024)
    assert book[0, :4] == pytest.approx([1.6795753, -0.81365865, 0.92976713, -1.0362457], rel=1e-6)
    assert codebook(6)[63, -2:] == pytest.approx([1.8748971, 1.4211738], rel=1e-6)
    assert float(np.abs(book.mean(1)).max()) < 1e-6
    assert np.allclose((book**2).mean(1), 1, atol=1e-5)


def test_no_step_has_more_values_than_a_code_has_numbers() -> None:
    """A group of 1,025 values in two blocks needs 18 bits, not the 17 that are 1,025 / 64."""
    layout = Layout((("a", (1025,)), ("b", (20_000,))))
    codec = Trellis(TrellisSettings(rate=64, memory=6), layout)
    random = torch.Generator().manual_seed(0)
    loud = {name: torch.randn(shape, generator=random) for name, shape in layout.shapes}
    counts = set()

    for quiet in np.linspace(0.3, 1, 60):
        update = {"a": float(quiet) * loud["a"], "b": loud["b"]}
        lower = np.array([round(-8 * np.log2(quiet)), 0])
        counts.add(int(codec._allocate(lower)[0]))
        assert norm(subtract(update, codec.decode(codec.encode(update)))) < norm(update)

    for low in range(256):
        bits = codec._allocate(np.array([low, 0]))
        for size, count in zip((1025, 20_000), bits, strict=True):
            plan = Plan.of(size, int(count))
            assert plan.spans.max(initial=0) <= 64

    assert {0} < counts


def test_mutated_frames_are_refused_or_decode_to_numbers() -> None:
    codec = make()
    frame = codec.encode(update())
    random = np.random.default_rng(0)

    for _ in range(300):
        body = bytearray(frame[OVERHEAD - 4 : -4])
        for _ in range(random.integers(1, 5)):
            body[random.integers(len(body))] = random.integers(256)
        if random.random() < 0.3:
            body = body[: random.integers(len(body))]

        try:
            decoded = codec.decode(codec.seal(bytes(body)))
        except WireError:
            continue

        LAYOUT.check(decoded, "decoded")


def test_golden_frames_decode_as_they_did() -> None:
    """The format cannot change unnoticed."""
    golden = json.loads((GOLDEN / "trellis.json").read_text())
    layout = Layout(tuple(sorted((name, tuple(shape)) for name, shape in golden["shapes"].items())))

    for row in golden["frames"]:
        codec = Trellis(TrellisSettings(rate=row["rate"], memory=row["memory"]), layout)
        decoded = layout.flatten(codec.decode(bytes.fromhex(row["frame"]), round=3))
        assert decoded[::9].tolist() == pytest.approx(row["values"], rel=1e-4, abs=1e-6)
