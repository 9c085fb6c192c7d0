"""What every activation codec does: predicted bytes, finite values, no trust in the other end."""

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fluvial.codecs.activations import (
    ACTIVATION_CODECS,
    ActivationCodec,
    ActivationConfig,
    ActivationSettings,
    build_activation,
)
from fluvial.codecs.activations.floats import BFloat16RowsSettings, ExactRowsSettings
from fluvial.codecs.activations.largest import TopKRowsSettings
from fluvial.codecs.activations.levels import Int4RowsSettings, Int8RowsSettings
from fluvial.errors import ConfigError, DivergenceError, WireError
from tests.support.activations import DTYPES, VARIANTS, generator, some_rows

WIDTH = 71
"""Odd, and no multiple of a group."""
EVERY = pytest.mark.parametrize("name", VARIANTS)
ROUNDED = [name for name in VARIANTS if name != "exact"]


def codec_of(name: str, dtype: torch.dtype = torch.float32) -> ActivationCodec:
    return build_activation(VARIANTS[name], dtype)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(0, WIDTH), (1, 4), (5, WIDTH), (300, 128)])
def test_bytes_are_predicted_and_nothing_is_drawn_twice(
    name: str, dtype: torch.dtype, unbiased: bool, tokens: int, width: int
) -> None:
    codec = codec_of(name, dtype)
    rows = some_rows(tokens, width, dtype)
    data, again = (
        codec.encode(rows, generator=generator() if unbiased else None) for _ in range(2)
    )
    decoded = codec.decode(data, tokens, width)

    assert data == again
    assert len(data) == codec.size(tokens, width)
    assert decoded.shape == rows.shape
    assert decoded.dtype == dtype
    assert bool(decoded.isfinite().all())
    assert codec.size(0, width) == 0


def test_bytes_by_formula() -> None:
    """Written out for 10 tokens of width 100."""
    sizes = {
        "exact": 10 * 100 * 4,
        "bf16": 10 * 100 * 2,
        "int8": 10 * (100 + 2),
        "int4": 10 * (50 + 2 * 2),
        "int4, groups of 7": 10 * (50 + 15 * 2),
        "int4, outliers": 10 * (50 + 2 * 2) + 3 * (4 + 10 * 4),
        "top_k, bitmap": 10 * (20 * 2 + 13),
        "top_k, numbers": 10 * (3 * 2 + 3 * 2),
        "top_k, all": 10 * (100 * 2 + 13),
    }
    assert {name: codec_of(name).size(10, 100) for name in VARIANTS} == sizes
    assert codec_of("exact", torch.bfloat16).size(10, 100) == 10 * 100 * 2
    assert codec_of("int4, outliers", torch.float16).size(10, 100) == 540 + 3 * (4 + 10 * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_is_exact(dtype: torch.dtype) -> None:
    """Every finite bit pattern of the 16-bit types, and of fp32 signs, subnormals and extremes."""
    if dtype == torch.float32:
        limits = torch.finfo(dtype)
        values = torch.tensor([0.0, -0.0, 1e-45, -1e-40, limits.max, limits.min, limits.tiny, 1.5])
    else:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[values.isfinite()]

    rows = values.view(-1, 8)
    codec = build_activation(ExactRowsSettings(), dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    decoded = codec.decode(codec.encode(rows, generator=generator()), *rows.shape)
    assert torch.equal(decoded.view(bits), rows.view(bits))


@pytest.mark.parametrize("unbiased", [False, True])
def test_bf16_is_exact_where_the_model_is_in_bf16(unbiased: bool) -> None:
    rows = some_rows(7, WIDTH, torch.bfloat16)
    codec = build_activation(BFloat16RowsSettings(), torch.bfloat16)
    draws = generator() if unbiased else None
    assert torch.equal(codec.decode(codec.encode(rows, generator=draws), 7, WIDTH), rows)


@pytest.mark.parametrize("name", ROUNDED)
def test_unbiased_rounding_has_the_rows_as_its_mean(name: str) -> None:
    """The mean of 4,000 draws is within five standard errors, and 40 draws of the largest step for
    what is seldom drawn."""
    rows = some_rows(1, WIDTH) * torch.tensor([[1.0], [1e-3]])
    codec = codec_of(name)
    draws = generator()
    count = 4000
    decoded = torch.stack(
        [codec.decode(codec.encode(rows, generator=draws), *rows.shape) for _ in range(count)]
    )

    difference = (decoded - rows).double()
    largest = difference.abs().amax((0, 2))[:, None]
    bound = 5 * difference.std(0) / count**0.5 + 40 / count * largest
    assert bool((difference.mean(0).abs() <= bound).all())
    assert bool((difference.std(0) > 0).any(1).all())


@pytest.mark.parametrize("scale", [1.0, 2.0**-130, 2.0**120])
def test_unbiased_bf16_rounds_up_as_often_as_it_must(scale: float) -> None:
    """A value a quarter of a step from one bf16 number, subnormal ones included."""
    values = torch.tensor([1 + 2**-9, -1 - 2**-9]) * scale
    codec = build_activation(BFloat16RowsSettings(), torch.float32)
    rows = values.repeat(20_000, 1)
    decoded = codec.decode(codec.encode(rows, generator=generator()), *rows.shape) / scale
    step = 2**-7 if scale > 2**-126 else 2**-3
    share = (decoded.abs() > 1).double().mean(0)
    # Five standard errors.
    assert share.tolist() == pytest.approx([2**-9 / step] * 2, abs=5 * (0.25 / 20_000) ** 0.5)
    assert torch.unique(decoded.abs()).tolist() == [1, 1 + step]


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_to_nearest_loses_less_than_unbiased(name: str) -> None:
    rows = some_rows(50, WIDTH)
    codec = codec_of(name)
    nearest, unbiased = (
        codec.decode(codec.encode(rows, generator=draws), *rows.shape) - rows
        for draws in (None, generator())
    )
    assert nearest.norm() < unbiased.norm()


@EVERY
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_subnormals_and_extremes(name: str, unbiased: bool, dtype: torch.dtype) -> None:
    """Zero rows stay zero, and no value becomes NaN, infinite or of the other sign."""
    limits = torch.finfo(dtype)
    rows = torch.zeros(6, WIDTH, dtype=dtype)
    rows[1] = limits.smallest_normal / 8
    rows[2] = -limits.max
    rows[3, 5] = limits.max
    rows[4] = some_rows(1, WIDTH, dtype)[0] * limits.smallest_normal
    rows[5] = 1e-3
    rows[5, 0] = limits.max
    codec = codec_of(name, dtype)
    decoded = codec.decode(
        codec.encode(rows, generator=generator() if unbiased else None), *rows.shape
    )

    assert not decoded[0].any()
    assert bool(decoded.isfinite().all())
    assert bool((decoded.double() * rows.double() >= 0).all())
    # One step of int4, where rounding is unbiased.
    assert decoded[3, 5].item() == pytest.approx(limits.max, rel=0.15)
    assert decoded[5, 0].item() == pytest.approx(limits.max, rel=0.15)


def test_an_outlier_costs_its_group_only_or_nothing() -> None:
    """One huge channel: int8 loses the token, int4 its group of 64, int4 with outliers nothing."""
    rows = some_rows(20, 256)
    plain = rows.clone()
    rows[:, 70] = 1e4
    others = torch.arange(256) != 70

    def error(settings: ActivationSettings, rows: torch.Tensor) -> torch.Tensor:
        codec = build_activation(settings, torch.float32)
        return (codec.decode(codec.encode(rows), *rows.shape) - rows).abs().amax(0)

    lost = error(Int8RowsSettings(), rows)
    assert torch.equal(lost[others], rows.abs().amax(0)[others])

    grouped = error(Int4RowsSettings(), rows)
    assert torch.equal(grouped[:64], error(Int4RowsSettings(), plain)[:64])
    assert torch.equal(grouped[128:], error(Int4RowsSettings(), plain)[128:])
    assert torch.equal(grouped[64:128][others[64:128]], rows.abs().amax(0)[64:128][others[64:128]])

    kept = error(Int4RowsSettings(outlier_channels=1), rows)
    assert kept[70] == 0
    assert kept[others].max() <= error(Int4RowsSettings(), plain).max()


@EVERY
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_not_sent(
    name: str, wrong: float, dtype: torch.dtype
) -> None:
    rows = some_rows(4, WIDTH, dtype)
    rows[2, 9] = wrong
    rows[3, 1] = wrong
    with pytest.raises(DivergenceError, match=r"2 of 284 values .* token 2, channel 9"):
        codec_of(name, dtype).encode(rows)


@EVERY
@pytest.mark.parametrize(("tokens", "width"), [(0, WIDTH), (4, WIDTH), (5, WIDTH), (4, WIDTH + 16)])
def test_a_wrong_number_of_bytes_is_refused(name: str, tokens: int, width: int) -> None:
    codec = codec_of(name)
    data = codec.encode(some_rows(4, WIDTH))
    for wrong in (data[:-1], data + b"\0", b""):
        if len(wrong) != codec.size(tokens, width):
            with pytest.raises(WireError, match=f"expected {codec.size(tokens, width)} for"):
                codec.decode(wrong, tokens, width)
    if codec.size(tokens, width) != len(data):
        with pytest.raises(WireError, match="both ends need the same codec settings"):
            codec.decode(data, tokens, width)


@EVERY
def test_nothing_is_allocated_for_bytes_that_do_not_match(name: str) -> None:
    """A tensor of 2^62 values could not be."""
    with pytest.raises(WireError, match="bytes, expected"):
        codec_of(name).decode(b"\1" * 64, 2**31, 2**16)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_bytes_decode_to_finite_rows_or_are_refused(name: str, dtype: torch.dtype) -> None:
    codec = codec_of(name, dtype)
    data = codec.encode(some_rows(3, WIDTH, dtype))
    draw = np.random.default_rng(0)

    for _ in range(60):
        damaged = np.frombuffer(data, dtype=np.uint8).copy()
        places = draw.integers(len(damaged), size=int(draw.integers(1, len(damaged))))
        damaged[places] = draw.integers(256, size=len(places), dtype=np.uint8)
        try:
            rows = codec.decode(damaged.tobytes(), 3, WIDTH)
        except WireError:
            continue
        assert bool(rows.isfinite().all())


NAN = np.array([0x7FC0], dtype="<u2").tobytes()
INF = np.array([0x7F80], dtype="<u2").tobytes()
NEGATIVE = np.array([0xBF80], dtype="<u2").tobytes()
LAST = WIDTH - 1
HOSTILE: list[tuple[str, int, bytes, str]] = [
    ("exact", 0, b"\0\0\xc0\x7f", "NaN or infinite"),
    ("bf16", 0, INF, "NaN or infinite"),
    ("int8", 0, NAN, "scales are NaN"),
    ("int8", 0, INF, "scales are NaN"),
    ("int8", 0, NEGATIVE, "negative"),
    ("int8", -1, b"\x80", "below -127"),
    ("int4", 2, NAN, "scales are NaN"),
    ("int4", 0, NEGATIVE, "negative"),
    ("int4", -2, b"\x80", "below -7"),
    ("int4", -2, b"\x08", "below -7"),
    ("int4", -1, b"\x98", "beyond the width"),
    ("int4, outliers", 0, (2**31 - 1).to_bytes(4, "little"), "do not ascend"),
    ("int4, outliers", 8, WIDTH.to_bytes(4, "little"), "do not ascend"),
    ("int4, outliers", 0, (-1).to_bytes(4, "little", signed=True), "do not ascend"),
    ("int4, outliers", 12, b"\0\0\xc0\x7f", "outlier channels are NaN"),
    ("top_k, bitmap", 0, NAN, "values are NaN"),
    ("top_k, bitmap", -1, b"\xff", "entries below"),
    ("top_k, bitmap", -9, b"\0" * 9, "entries below"),
    ("top_k, numbers", 0, INF, "values are NaN"),
    ("top_k, numbers", -2, WIDTH.to_bytes(2, "little"), "do not ascend"),
    ("top_k, numbers", -4, LAST.to_bytes(2, "little") * 2, "do not ascend"),
    ("top_k, numbers", -2, b"\xff\xff", "do not ascend"),
]


@pytest.mark.parametrize(("name", "place", "written", "message"), HOSTILE)
def test_values_out_of_range_are_refused(
    name: str, place: int, written: bytes, message: str
) -> None:
    codec = codec_of(name)
    data = bytearray(codec.encode(some_rows(2, WIDTH)))
    start = place % len(data)
    data[start : start + len(written)] = written
    with pytest.raises(WireError, match=message):
        codec.decode(bytes(data), 2, WIDTH)


def test_settings_that_do_not_fit_the_width() -> None:
    outliers = build_activation(Int4RowsSettings(outlier_channels=8), torch.float32)
    with pytest.raises(ConfigError, match="outlier_channels=8 leaves no channel of 8"):
        outliers.size(1, 8)
    with pytest.raises(ConfigError, match="at most 65536 channels"):
        build_activation(TopKRowsSettings(), torch.float32).size(1, 70_000)

    widest = build_activation(TopKRowsSettings(share=0.0001), torch.float32)
    rows = some_rows(2, 65536)
    decoded = widest.decode(widest.encode(rows), 2, 65536)
    assert torch.equal(decoded.nonzero(), (decoded != 0).nonzero())
    assert (decoded != 0).sum(1).tolist() == [6, 6]


def test_tables_choose_codecs() -> None:
    read: TypeAdapter[ActivationSettings] = TypeAdapter(ActivationConfig)
    for name, codec in ACTIVATION_CODECS.items():
        settings = read.validate_python({"name": name})
        assert type(build_activation(settings, torch.float32)) is codec

    assert read.validate_python({"name": "int4", "outlier_channels": 2}) == Int4RowsSettings(
        outlier_channels=2
    )
    for wrong in (
        {"name": "zip"},
        {"name": "int8", "group_size": 64},
        {"name": "top_k", "share": 0},
    ):
        with pytest.raises(ValidationError):
            read.validate_python(wrong)
