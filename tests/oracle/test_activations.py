"""int8, int4 and top_k of activations equal plain NumPy, and NumPy reads their bytes."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fluvial.codecs.activations import build_activation
from fluvial.codecs.activations.largest import TopKRowsSettings
from fluvial.codecs.activations.levels import Int4RowsSettings, Int8RowsSettings
from tests.support.activations import some_rows

Floats = NDArray[np.float32]


def step_of(values: Floats, levels: int) -> np.float32:
    """Return the largest magnitude over `levels`, as the next bf16 number from it on."""
    wanted = np.float32(np.float64(np.abs(values).max()) / levels)
    bits = int(wanted.view(np.uint32))
    bits = bits if bits % 65536 == 0 else (bits // 65536 + 1) * 65536
    return np.uint32(bits).view(np.float32)


def level(value: np.float32, step: np.float32) -> int:
    return round(float(value / step)) if step > 0 else 0


def by_numpy(rows: Floats, levels: int, group: int) -> tuple[list[float], list[list[int]], Floats]:
    """Return steps, levels and decoded rows, value by value."""
    scales = []
    coded = []
    decoded = np.zeros_like(rows)

    for token, row in enumerate(rows):
        line = []
        for start in range(0, len(row), group):
            values = row[start : start + group]
            step = step_of(values, levels)
            scales.append(float(step))
            for place, value in enumerate(values, start=start):
                line.append(level(value, step))
                decoded[token, place] = np.float32(line[-1]) * step
        coded.append(line)

    return scales, coded, decoded


def bf16_list(data: bytes) -> list[float]:
    bits = np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16
    return [float(value) for value in bits.view(np.float32)]


def rows_of(tokens: int, width: int) -> Floats:
    """Return rows with a zero row, subnormal values and an outlier."""
    rows: Floats = some_rows(tokens, width).numpy()
    rows[1] = 0
    rows[2] *= np.float32(1e-39)
    rows[3, width // 2] = 3e4
    return rows


@pytest.mark.parametrize("width", [128, 71, 1])
def test_int8(width: int) -> None:
    rows = rows_of(6, width)
    codec = build_activation(Int8RowsSettings(), torch.float32)
    scales, coded, decoded = by_numpy(rows, 127, width)

    data = codec.encode(torch.from_numpy(rows))

    assert bf16_list(data[:12]) == scales
    assert np.frombuffer(data[12:], dtype=np.int8).reshape(6, width).tolist() == coded
    assert np.array_equal(codec.decode(data, 6, width).numpy(), decoded)


@pytest.mark.parametrize(("width", "group"), [(128, 64), (71, 64), (70, 64), (33, 8), (5, 64)])
def test_int4(width: int, group: int) -> None:
    rows = rows_of(6, width)
    codec = build_activation(Int4RowsSettings(group_size=group), torch.float32)
    scales, coded, decoded = by_numpy(rows, 7, group)

    data = codec.encode(torch.from_numpy(rows))

    assert bf16_list(data[: 2 * len(scales)]) == scales
    packed = np.frombuffer(data[2 * len(scales) :], dtype=np.uint8).reshape(6, -1).astype(int)
    halves = np.stack([packed & 15, packed >> 4], axis=2).reshape(6, -1) - 8
    assert halves[:, :width].tolist() == coded
    assert np.array_equal(codec.decode(data, 6, width).numpy(), decoded)


def test_int4_with_outliers() -> None:
    """Outlier channels are those with the largest values, exact; the others as if they were 0."""
    rows = rows_of(6, 100)
    codec = build_activation(Int4RowsSettings(outlier_channels=4), torch.float32)
    channels = np.sort(np.abs(rows).max(0).argsort()[-4:])
    rest = rows.copy()
    rest[:, channels] = 0
    _, _, expected = by_numpy(rest, 7, 64)
    expected[:, channels] = rows[:, channels]

    data = codec.encode(torch.from_numpy(rows))

    assert np.frombuffer(data[:16], dtype="<i4").tolist() == channels.tolist()
    assert np.array_equal(codec.decode(data, 6, 100).numpy(), expected)


@pytest.mark.parametrize("share", [0.02, 0.25])
def test_top_k(share: float) -> None:
    rows: Floats = some_rows(6, 100).numpy()
    codec = build_activation(TopKRowsSettings(share=share), torch.float32)
    entries = int(share * 100)
    expected = np.zeros_like(rows)
    for token, row in enumerate(rows):
        largest = np.abs(row).argsort()[-entries:]
        expected[token, largest] = torch.from_numpy(row[largest]).bfloat16().float().numpy()

    decoded = codec.decode(codec.encode(torch.from_numpy(rows)), 6, 100)

    assert np.array_equal(decoded.numpy(), expected)
