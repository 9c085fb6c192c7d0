"""nf4: the levels of QLoRA, and errors below those of int4 on Gaussian values."""

import numpy as np
import pytest
import torch

from fluvial.codecs.base import Codec
from fluvial.codecs.quantise import NF4, Int4, Int4Settings, NF4Settings
from fluvial.errors import WireError
from fluvial.wire.frame import seal
from fluvial.wire.tensors import Layout, Named, norm, relative_error, subtract


def nf4(update: Named, block_size: int = 64) -> Codec:
    return NF4(NF4Settings(block_size=block_size), Layout.of(update))


def test_levels_are_those_of_qlora() -> None:
    """Appendix E of the paper, to four digits; largest 1, so that every level is in one block."""
    levels = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
    levels += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
    update = {"w": torch.tensor(levels)}
    decoded = nf4(update).decode(nf4(update).encode(update))["w"]
    assert torch.allclose(decoded, update["w"], atol=6e-5)
    assert decoded[7] == 0


def test_gaussian_values_lose_less_than_in_int4_for_the_same_bytes() -> None:
    update = {"w": 1e-6 * torch.randn(640, 100, generator=torch.Generator().manual_seed(0))}
    int4 = Int4(Int4Settings(), Layout.of(update))
    frames = [codec.encode(update) for codec in (nf4(update), int4)]
    assert len(frames[0]) == len(frames[1]) == 12 + 64_000 // 2 + 2 * 1000
    errors = [
        relative_error(update, codec.decode(f))
        for codec, f in zip((nf4(update), int4), frames, strict=True)
    ]
    assert errors == pytest.approx([0.0085, 0.0117], abs=0.0003)


@pytest.mark.parametrize("block_size", [1, 3, 64])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 63, 65])
def test_tiny_updates_contract_and_silence_stays_silent(size: int, block_size: int) -> None:
    update = {
        "w": torch.linspace(-1, 1, size) * 3e38,
        "tiny": torch.tensor([1e-45, -3e-42, 0.0]),
        "zero": torch.zeros(9),
    }
    codec = nf4(update, block_size)
    decoded = codec.decode(codec.encode(update))
    assert norm(subtract(update, decoded)) <= norm(update)
    assert not decoded["zero"].any()


def test_frames_that_lie_are_refused_or_harmless() -> None:
    update = {"w": torch.randn(40, 33)}
    codec = nf4(update)
    body = codec.encode(update)[8:-4]
    random = np.random.default_rng(0)

    for _ in range(200):
        damaged = bytearray(body)
        damaged[random.integers(len(body))] ^= 1 << random.integers(8)
        try:
            codec.layout.check(
                codec.decode(seal(codec.code, codec.fingerprint, bytes(damaged))), "decoded"
            )
        except WireError:
            continue

    for wrong in (body[:-1], body + b"\0", b"\xff\xff" + body[2:]):
        with pytest.raises(WireError):
            codec.decode(seal(codec.code, codec.fingerprint, wrong))
