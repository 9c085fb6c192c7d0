"""powersgd: low rank is found, the rate is met, coding contracts, and frames that lie."""

import numpy as np
import pytest
import torch

from fluvial.codecs.lowrank import PowerSgd, PowerSgdSettings
from fluvial.errors import ConfigError, WireError
from fluvial.wire.frame import seal
from fluvial.wire.tensors import Layout, Named, norm, relative_error, subtract


def powersgd(update: Named, rate: float = 64) -> PowerSgd:
    return PowerSgd(PowerSgdSettings().model_copy(update={"rate": rate}), Layout.of(update))


def lora(seed: int = 0, *, rank: int, noise: float = 0.1) -> Named:
    """Six layers whose A factors, and whose B factors, lie near a common subspace of `rank`
    features."""
    generator = torch.Generator().manual_seed(seed)
    update = {}

    for kind in ("A", "B"):
        basis = torch.linalg.qr(torch.randn(128, rank, generator=generator)).Q * 128**0.5
        for layer in range(6):
            x = torch.randn(8, rank, generator=generator) @ basis.T / rank**0.5
            x = 1e-4 * (x + noise * torch.randn(8, 128, generator=generator))
            update[f"layers.{layer}.q_proj.lora_{kind}.weight"] = (
                x if kind == "A" else x.T.contiguous()
            )

    return update


@pytest.mark.parametrize("rate", [8, 16, 32, 64, 128])
def test_frames_use_their_budget_and_no_more(rate: float) -> None:
    for update in (lora(rank=4), lora(rank=40)):
        codec = powersgd(update, rate)
        assert (
            0.95 * codec.layout.raw_bytes / rate
            <= len(codec.encode(update))
            <= codec.layout.raw_bytes / rate
        )


def test_a_frame_of_few_bytes_still_carries_something() -> None:
    update = lora(rank=4)
    codec = powersgd(update, 700)
    assert relative_error(update, codec.decode(codec.encode(update))) < 0.9


def test_common_subspaces_are_found() -> None:
    for rank, most in ((1, 0.05), (2, 0.15), (4, 0.35)):
        update = lora(rank=rank)
        codec = powersgd(update)
        assert relative_error(update, codec.decode(codec.encode(update))) < most


def test_at_high_rates_the_error_is_of_full_rank_quantisation() -> None:
    update = lora(rank=8, noise=0)
    codec = powersgd(update, 4)
    assert relative_error(update, codec.decode(codec.encode(update))) < 1e-3


def test_frames_are_deterministic_and_need_no_seed() -> None:
    update = lora(rank=4)
    assert powersgd(update).encode(update, seed=1) == powersgd(update).encode(update, seed=2)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (65,), (1, 9), (9, 1), (3, 4, 5), (63, 65)])
@pytest.mark.parametrize("tight", [True, False])
def test_any_shape_contracts_and_silence_stays_silent(
    shape: tuple[int, ...], *, tight: bool
) -> None:
    update = {
        "w": torch.randn(shape) * 1e-6,
        "x": torch.randn(shape),
        "zero": torch.zeros(shape),
        "no": torch.zeros(0),
    }
    layout = Layout.of(update)
    codec = powersgd(update, layout.raw_bytes / (12 + 28) if tight else 0.04)
    decoded = codec.decode(codec.encode(update))
    assert norm(subtract(update, decoded)) <= norm(update) * (1 + 1e-6)
    assert not decoded["zero"].any()
    assert tight or norm(decoded) > 0
    nothing = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
    assert norm(codec.decode(codec.encode(nothing))) == 0


def test_frames_that_lie_are_refused_or_harmless() -> None:
    codec = powersgd(lora(rank=4))
    body = codec.encode(lora(rank=4))[8:-4]
    random = np.random.default_rng(0)
    refused = 0

    for _ in range(300):
        damaged = bytearray(body)
        damaged[random.integers(random.choice([8, len(body)]))] ^= 1 << random.integers(8)
        try:
            codec.layout.check(
                codec.decode(seal(codec.code, codec.fingerprint, bytes(damaged))), "decoded"
            )
        except WireError:
            refused += 1

    assert refused > 50
    for ranks, reason in (
        (b"\x00\x00", "whose rank is at most"),
        (b"\xff\xff", "more ranks than stacks"),
    ):
        with pytest.raises(WireError, match=reason):
            codec.decode(seal(codec.code, codec.fingerprint, ranks + body[2:]))


def test_a_rate_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose at most"):
        powersgd({"w": torch.zeros(8, 8)})
