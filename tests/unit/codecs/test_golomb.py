"""Golomb-coded positions, and frames of some values: round trips, lengths, damaged bytes."""

import numpy as np
import pytest
import torch

from fluvial.codecs.golomb import SparseFrames, Values, decode, encode, largest, parameter, rounded
from fluvial.errors import WireError
from fluvial.wire.frame import seal
from fluvial.wire.tensors import Layout
from tests.support.memory import allocates_less

LAYOUT = Layout.of({"m.lora_A.weight": torch.zeros(8, 300), "m.lora_B.weight": torch.zeros(200, 8)})
SHARES = (0.0003, 0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.75, 0.9, 0.95, 0.99)


def _entropy(count: int, total: int) -> float:
    """Bits of `count` positions of `total`, each as likely."""
    p = count / total
    return float(-total * (p * np.log2(p) + (1 - p) * np.log2(1 - p)))


@pytest.mark.parametrize("total", [1, 2, 7, 1000])
def test_positions_come_back(total: int) -> None:
    random = np.random.default_rng(total)
    groups = [(np.flatnonzero(random.random(total) < share), total) for share in (0, *SHARES, 1)]
    found = decode(encode(groups), [(len(where), total) for where, total in groups])

    for (where, _), back in zip(groups, found, strict=True):
        assert np.array_equal(where, back)


def test_none_and_all_cost_nothing() -> None:
    assert encode([(np.arange(0), 50), (np.arange(50), 50)]) == b""


@pytest.mark.parametrize("share", SHARES)
def test_positions_take_their_entropy(share: float) -> None:
    """Within 2 % where a Golomb code can; a whole number of bits for a gap costs more near a share
    of 0.4."""
    where = np.flatnonzero(np.random.default_rng(0).random(200_000) < share)
    assert 8 * len(encode([(where, 200_000)])) <= 1.02 * _entropy(len(where), 200_000) + 8


@pytest.mark.parametrize("share", [0.34, 0.38, 0.42, 0.58, 0.62, 0.66])
def test_positions_never_take_more_than_a_bitmap(share: float) -> None:
    where = np.flatnonzero(np.random.default_rng(0).random(200_000) < share)
    bits = 8 * len(encode([(where, 200_000)]))
    assert bits <= 1.05 * _entropy(len(where), 200_000)
    assert bits <= 200_008


@pytest.mark.parametrize("count", [1, 3, 10, 40, 100, 333, 499, 500])
def test_the_parameter_is_the_best(count: int) -> None:
    """No other number gives a shorter code for random positions, by more than 0.1 %."""
    p = count / 1000

    def bits(m: int) -> float:
        """Mean bits of a gap with P(gap) = p (1 - p)^gap."""
        gaps = np.arange(40_000)
        width = (m - 1).bit_length()
        remainder = np.where(gaps % m < (1 << width) - m, width - 1, width)
        return float((p * (1 - p) ** gaps * (gaps // m + 1 + remainder)).sum())

    assert bits(parameter(count, 1000)) <= 1.001 * min(
        bits(m) for m in range(1, 2 * parameter(count, 1000) + 3)
    )


def test_damaged_positions_are_refused_or_are_positions() -> None:
    random = np.random.default_rng(1)
    where = np.flatnonzero(random.random(3000) < 0.07)
    data = encode([(where, 3000)])

    for _ in range(300):
        damaged = bytearray(data)
        damaged[random.integers(len(data))] ^= 1 << random.integers(8)
        try:
            (found,) = decode(bytes(damaged), [(len(where), 3000)])
        except WireError:
            continue

        assert len(found) == len(where)
        assert (np.diff(found) > 0).all()
        assert found[0] >= 0
        assert found[-1] < 3000

    for wrong in (data[:-1], data + b"\0", data + b"\xff", b"", bytes(10_000)):
        with pytest.raises(WireError):
            decode(wrong, [(len(where), 3000)])


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("span", [(0, LAYOUT.numel), (1000, 3000), (2500, 2501)])
def test_a_frame_comes_back(kind: Values, span: tuple[int, int]) -> None:
    frames = SparseFrames(LAYOUT, kind, *span)
    vector = np.random.default_rng(0).standard_normal(span[1] - span[0]).astype(np.float32)
    for count in (0, 1, len(vector) // 3, len(vector)):
        where = largest(abs(vector), count)
        found, values = frames.decode(frames.encode(vector, where, round=7), round=7)
        assert np.array_equal(found, where)
        assert np.array_equal(values, rounded(vector[where], kind))
        assert kind != "fp32" or np.array_equal(values, vector[where])


def test_a_frame_takes_its_values_and_their_entropy() -> None:
    vector = np.random.default_rng(0).standard_normal(LAYOUT.numel).astype(np.float32)
    where = largest(abs(vector), LAYOUT.numel // 4)
    size = len(SparseFrames(LAYOUT, "fp16").encode(vector, where, round=1))
    assert size <= 12 + 2 * 2 + 2 * len(where) + 1.02 * _entropy(len(where), LAYOUT.numel) / 8 + 2


def test_the_largest_are_kept_and_zeros_are_not() -> None:
    magnitudes = np.array([0.0, 3.0, 1.0, 0.0, 2.0])
    assert largest(magnitudes, 2).tolist() == [1, 4]
    assert largest(magnitudes, 5).tolist() == [1, 2, 4]
    assert largest(np.zeros(3), 2).tolist() == []


def test_large_values_are_sent_as_the_largest_number() -> None:
    assert rounded(np.array([1e6, -1e6], dtype=np.float32), "fp16").tolist() == [65504.0, -65504.0]


def _resealed(frame: bytes, body: bytes) -> bytes:
    """`body` under the header of `frame`, of round 1, and a checksum that fits."""
    return seal(SparseFrames.code, int.from_bytes(frame[4:8], "little"), body, round=1)


def test_damaged_frames_are_refused_and_allocate_little() -> None:
    frames = SparseFrames(LAYOUT, "fp16")
    vector = np.random.default_rng(0).standard_normal(LAYOUT.numel).astype(np.float32)
    frame = frames.encode(vector, largest(abs(vector), 500), round=1)

    def decode_damaged() -> None:
        for bit in np.random.default_rng(0).integers(0, 8 * len(frame), 100):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(WireError):
                frames.decode(bytes(damaged), round=1)

        random = np.random.default_rng(2)
        for _ in range(300):  # bodies under a valid checksum
            body = bytearray(frame[8:-4])
            for place in random.integers(0, len(body), 1 + random.integers(4)):
                body[place] = random.integers(256)
            if random.random() < 0.3:
                del body[random.integers(len(body)) :]

            try:
                _, values = frames.decode(_resealed(frame, bytes(body)), round=1)
            except WireError:
                continue

            assert np.isfinite(values).all()

    assert allocates_less(decode_damaged, 40 * LAYOUT.numel)


def test_a_frame_of_another_round_slice_or_kind_is_refused() -> None:
    frame = SparseFrames(LAYOUT, "fp16", 0, 900).encode(
        np.ones(900, dtype=np.float32), np.arange(9), round=1
    )
    with pytest.raises(WireError, match="round"):
        SparseFrames(LAYOUT, "fp16", 0, 900).decode(frame, round=2)
    for other in (SparseFrames(LAYOUT, "fp16", 0, 901), SparseFrames(LAYOUT, "bf16", 0, 900)):
        with pytest.raises(WireError, match="names or shapes"):
            other.decode(frame, round=1)


def test_infinite_values_are_refused() -> None:
    frames = SparseFrames(LAYOUT, "fp16")
    frame = frames.encode(np.ones(LAYOUT.numel, dtype=np.float32), np.arange(1), round=1)
    body = frame[8:-4].replace(np.array([1], "<f2").tobytes(), np.array([np.inf], "<f2").tobytes())

    with pytest.raises(WireError, match="NaN or Inf"):
        frames.decode(_resealed(frame, body), round=1)
