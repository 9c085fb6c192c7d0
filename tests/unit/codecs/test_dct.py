"""dct_top_k, and the bits of kept values that it shares with top_k."""

import numpy as np
import pytest
import torch

from fluvial.codecs.dct import DctTopK, DctTopKSettings
from fluvial.codecs.sparse.largest import TopK, TopKSettings
from fluvial.errors import WireError
from fluvial.wire.frame import seal
from fluvial.wire.tensors import Layout, Named, norm, relative_error, subtract


def dct(update: Named, **changes: object) -> DctTopK:
    rate = {
        "rate": changes.pop("rate", 64)
    }  # here also below 1, which a file refuses: headers of a few values need it
    return DctTopK(
        DctTopKSettings.model_validate(changes).model_copy(update=rate), Layout.of(update)
    )


def top_k(update: Named, **changes: object) -> TopK:
    rate = {"rate": changes.pop("rate", 64)}
    return TopK(TopKSettings.model_validate(changes).model_copy(update=rate), Layout.of(update))


def gaussian(seed: int = 0) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 1e-5 * torch.randn(shape, generator=generator)
        for name, shape in (("a", (8, 2000)), ("b", (999, 8)))
    }


def smooth() -> Named:
    """Low frequencies along both axes, with a little noise."""
    x = torch.linspace(0, 1, 100)[:, None]
    y = torch.linspace(0, 2, 130)[None]
    return {"w": torch.sin(3 * x + 2 * y) + torch.cos(5 * x * y) + 0.01 * torch.randn(100, 130)}


@pytest.mark.parametrize("shape", [(), (7,), (130,), (65, 3), (100, 130), (2, 3, 70), (1, 1)])
def test_a_generous_rate_gives_the_update_back(shape: tuple[int, ...]) -> None:
    update = {"w": torch.randn(shape), "empty": torch.zeros(0, 4)}
    codec = dct(update, rate=0.03)
    assert relative_error(update, codec.decode(codec.encode(update))) < 3e-4


def test_smooth_updates_need_few_coefficients() -> None:
    update = smooth()
    errors = [
        relative_error(update, codec.decode(codec.encode(update)))
        for codec in (dct(update), top_k(update))
    ]
    assert errors[0] < 0.02 < 0.5 < errors[1]


@pytest.mark.parametrize(("rate", "expected"), [(32, 0.355), (64, 0.620), (128, 0.791)])
def test_errors_of_gaussian_updates(rate: float, expected: float) -> None:
    """Signs with one magnitude beyond a threshold at 1, 1/2 and 1/4 bits of entropy, computed
    numerically."""
    update = gaussian()
    for codec in (
        dct(update, rate=rate),
        top_k(update, rate=rate, value_bits=1),
        top_k(update, value_bits="best", rate=rate),
    ):
        frame = codec.encode(update)
        assert 0.97 * codec.layout.raw_bytes / rate <= len(frame) <= codec.layout.raw_bytes / rate
        assert relative_error(update, codec.decode(frame)) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("rate", [4, 8, 16, 64])
def test_best_is_no_worse_than_any_number_of_bits(rate: float) -> None:
    update = gaussian(1)
    errors = {
        bits: relative_error(update, codec.decode(codec.encode(update)))
        for bits in ("best", 1, 2, 4, 8)
        for codec in [top_k(update, rate=rate, value_bits=bits)]
    }
    assert errors["best"] <= min(errors.values()) + 1e-3


@pytest.mark.parametrize("value_bits", ["best", 1, 2, 4, 8])
def test_frames_that_lie_are_refused_or_harmless(value_bits: object) -> None:
    update = gaussian()
    for codec in (dct(update, value_bits=value_bits), top_k(update, value_bits=value_bits)):
        body = codec.encode(update)[8:-4]
        random = np.random.default_rng(0)
        refused = 0

        for _ in range(100):
            damaged = bytearray(body)
            damaged[random.integers(random.choice([8, len(body)]))] ^= 1 << random.integers(8)
            try:
                codec.layout.check(
                    codec.decode(seal(codec.code, codec.fingerprint, bytes(damaged))), "decoded"
                )
            except WireError:
                refused += 1

        assert refused > 10


@pytest.mark.parametrize("value_bits", ["best", 1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 63, 65])
def test_tiny_updates_silence_and_contraction(size: int, value_bits: object) -> None:
    update = {"w": torch.linspace(-1, 1, size) * 1e-6 + 1e-7, "zero": torch.zeros(5)}
    for rate in (0.05, 4 * (size + 5) / (12 + 28)):
        for make in (dct, top_k):
            if rate > 1 and value_bits not in ("best", 1):
                continue

            codec = make(update, rate=rate, value_bits=value_bits)
            frame = codec.encode(update, seed=3)
            assert frame == codec.encode(update, seed=4)
            decoded = codec.decode(frame)
            assert norm(subtract(update, decoded)) <= norm(update) * (1 + 1e-6)
            assert not decoded["zero"].any()
            nothing = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
            assert norm(codec.decode(codec.encode(nothing))) == 0
