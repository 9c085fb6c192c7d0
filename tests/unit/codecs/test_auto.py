"""The policy behind `codec.name = "auto"`, rule by rule, on measured errors made up for the
purpose."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from fluvial.codecs import build, read_settings
from fluvial.codecs.auto import (
    GAIN_DB,
    PATIENCE,
    AutoSettings,
    Measured,
    Plain,
    Use,
    Watch,
    candidates,
    choose,
)
from fluvial.codecs.coding_time import coding_s
from fluvial.codecs.klt.trellis import KltTrellis, KltTrellisSettings
from fluvial.exchange.uplink import Uplink
from fluvial.wire.tensors import Layout

LAYOUT = Layout(
    tuple(
        (f"layers.{n}.q_proj.lora_{w}.weight", (8, 512) if w == "A" else (512, 8))
        for n in range(16)
        for w in ("A", "B")
    )
)
FRAME = LAYOUT.raw_bytes / 64


def measured(
    published: int = 100_000, feedback: bool = True, **errors: float
) -> dict[str, Measured]:
    found = {}
    for name, error in errors.items():
        mode = {"mode": "dithered"} if name == "klt" else {}
        settings = read_settings({"name": name, "error_feedback": feedback, **mode})
        found[name] = Measured(
            settings, error, FRAME, published if name.startswith("klt") else 0, error / 4
        )

    return found


def names(settings: AutoSettings) -> list[str]:
    return [str(each["name"]) for each in candidates(settings, LAYOUT, Use(10_000))]


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        (AutoSettings(), 64),
        (AutoSettings(rate=128), 128),
        (AutoSettings(uplink_mbps=0.1, upload_s=0.25), LAYOUT.raw_bytes / 3125),
        (AutoSettings(uplink_mbps=1000), 4),
        (AutoSettings(uplink_mbps=1e-6), 256),
    ],
    ids=str,
)
def test_the_rate_follows_from_the_link(settings: AutoSettings, rate: float) -> None:
    assert settings.target(LAYOUT) == pytest.approx(rate)


def test_candidates_depend_on_the_rate_and_on_state() -> None:
    assert names(AutoSettings(rate=6)) == ["trellis", "int4"]
    assert names(AutoSettings(rate=16)) == ["trellis", "sign"]
    assert names(AutoSettings(rate=64)) == ["trellis", "klt_trellis"]
    assert names(AutoSettings(rate=64, error_feedback=False)) == ["eden", "klt"]

    for settings in (AutoSettings(rate=6), AutoSettings(rate=64)):
        assert all(
            each["error_feedback"] is True for each in candidates(settings, LAYOUT, Use(10_000))
        )
    for table in candidates(AutoSettings(error_feedback=False), LAYOUT, Use(10_000)):
        assert read_settings(table).error_feedback is False


def test_the_transform_wins_by_a_decibel_and_not_by_less() -> None:
    enough = measured(klt_trellis=0.62 / 10 ** ((GAIN_DB + 0.01) / 10), trellis=0.62)
    close = measured(klt_trellis=0.62 / 10 ** ((GAIN_DB - 0.01) / 10), trellis=0.62)
    assert choose(AutoSettings(), enough, LAYOUT, Use(100)).codec.name == "klt_trellis"
    other = choose(AutoSettings(), close, LAYOUT, Use(100))
    assert other.codec.name == "trellis"
    assert f"{GAIN_DB - 0.01:.2f} dB" in other.reason


def test_a_short_run_does_not_pay_for_a_large_transform() -> None:
    found = measured(published=1_000_000, klt_trellis=0.45, trellis=0.62)
    short, long = (choose(AutoSettings(), found, LAYOUT, Use(rounds)) for rounds in (2, 200))
    assert (short.codec.name, long.codec.name) == ("trellis", "klt_trellis")
    assert "less than its download of 1,000,000 B" in short.reason


def test_a_byte_down_costs_its_time_on_the_line() -> None:
    found = measured(published=200_000, klt_trellis=0.45, trellis=0.62)
    even, faster = (choose(AutoSettings(), found, LAYOUT, Use(20, price)) for price in (1.0, 0.1))
    assert (even.codec.name, faster.codec.name) == ("trellis", "klt_trellis")
    assert "200,000 B, of which each counts 0.1 on this line" in faster.reason


def test_a_transform_that_cannot_repay_its_download_is_not_fitted() -> None:
    """Its download is known by the layout, and it saves less than all that is sent."""
    settings = AutoSettings(rate=64)
    codec = KltTrellis.fit(
        KltTrellisSettings(), LAYOUT, [LAYOUT.unflatten(torch.randn(LAYOUT.numel))], seed=0
    )
    tensors = codec.published(decoder=True).tensors.values()
    download = sum(tensor.element_size() * tensor.numel() for tensor in tensors)
    rounds = math.ceil(download / FRAME)
    tried = [
        [str(table["name"]) for table in candidates(settings, LAYOUT, Use(count))]
        for count in (rounds - 1, rounds + 1)
    ]
    assert tried == [["trellis"], ["trellis", "klt_trellis"]]


def test_richer_rates_take_the_smallest_error() -> None:
    found = measured(trellis=0.1, sign=0.35)
    assert choose(AutoSettings(rate=16), found, LAYOUT, Use(20)).codec.name == "trellis"
    found = measured(trellis=0.02, int4=0.006)
    assert choose(AutoSettings(rate=6), found, LAYOUT, Use(20)).codec.name == "int4"


def test_sites_without_state_get_what_is_unbiased() -> None:
    found = measured(feedback=False, eden=2.0, klt=1.5)
    choice = choose(AutoSettings(error_feedback=False), found, LAYOUT, Use(20))
    assert choice.codec.name == "klt"
    assert "unbiased" in choice.reason


UPLINK = AutoSettings(uplink_mbps=8.0)
"""A megabyte a second."""


def at(coding_s: float, frame_bytes: float, name: str = "trellis", error: float = 0.5) -> Measured:
    one = measured(**{name: error})[name]  # type: ignore[arg-type]
    return replace(one, coding_s=coding_s, frame_bytes=frame_bytes)


def int8(coding_s: float, frame_bytes: float) -> Plain:
    return Plain(read_settings({"name": "int8", "error_feedback": True}), frame_bytes, coding_s)


def test_a_codec_that_takes_longer_than_the_upload_that_it_saves_is_not_chosen() -> None:
    """It saves 0.9 MB, which take 0.9 s."""
    plain = int8(0.1, 1e6)
    quick = choose(UPLINK, {"trellis": at(0.9, 1e5)}, LAYOUT, Use(100), plain)
    slow = choose(UPLINK, {"trellis": at(1.1, 1e5)}, LAYOUT, Use(100), plain)
    assert (quick.codec.name, slow.codec.name) == ("trellis", "int8")
    assert slow.codec.error_feedback
    assert "coding + upload at 8 Mbit/s: trellis 1.1 + 0.1 s, int8 0.1 + 1 s" in slow.reason

    other = choose(
        UPLINK,
        {"trellis": at(1.1, 1e5), "int4": at(0.1, 5e5, "int4", 0.6)},
        LAYOUT,
        Use(100),
        plain,
    )
    assert other.codec.name == "int4"
    for reason in (quick.reason, slow.reason, other.reason):
        assert ". " not in reason


def test_without_a_link_no_time_counts() -> None:
    slow = {"trellis": at(1e6, 1e5)}
    assert choose(AutoSettings(), slow, LAYOUT, Use(100), int8(0.1, 1e6)).codec.name == "trellis"
    assert choose(UPLINK, slow, LAYOUT, Use(100)).codec.name == "trellis"


def test_a_transform_that_codes_too_slowly_is_not_chosen() -> None:
    """Its half an error is worth some bytes of every upload, and these some seconds."""
    settings = AutoSettings(uplink_mbps=8e-3, upload_s=LAYOUT.raw_bytes / 64 / 1e3)
    plain = int8(0.0, 1e9)

    for learned_s, name in ((0.01, "klt_trellis"), (1e4, "trellis")):
        found = {
            "trellis": at(0.01, FRAME),
            "klt_trellis": at(learned_s, FRAME, "klt_trellis", 0.3),
        }
        choice = choose(settings, found, LAYOUT, Use(10_000), plain)
        assert choice.codec.name == name
    assert "longer" in choice.reason


def test_the_time_of_a_codec_is_the_fastest_call_after_the_first() -> None:
    codec = build(read_settings({"name": "int8"}), LAYOUT)
    readings = iter([0.0, 0.0, 0.15, 1.0, 1.05, 2.0, 2.5])
    assert coding_s(codec, lambda: next(readings)) == pytest.approx(0.05)
    assert 0 < coding_s(codec) < 60


@pytest.mark.parametrize("rate", [6, 16, 64])
def test_the_reason_is_one_sentence(rate: int) -> None:
    other = {64: "klt_trellis", 16: "sign", 6: "int4"}[rate]
    found = measured(trellis=0.5) | {other: measured(**{other: 0.3})[other]}  # type: ignore[arg-type]
    reason = choose(AutoSettings(rate=rate), found, LAYOUT, Use(100)).reason
    assert 20 < len(reason) < 300
    assert ". " not in reason
    assert not reason.endswith(".")


def test_a_transform_that_is_no_longer_better_is_given_up_after_some_rounds() -> None:
    watch = Watch(expected=0.62, learned=True)
    assert [watch.see(error) for error in (0.5, 0.7, 0.5, 0.7, 0.7)] == ["keep"] * 5
    assert watch.see(0.7) == "plain"
    assert Watch(expected=0.62, learned=False).see(0.9) == "keep"


def test_a_codec_at_the_bound_falls_back_to_int8() -> None:
    watch = Watch(expected=0.62, learned=False)
    assert [watch.see(error) for error in [1.0] * (PATIENCE - 1)] == ["keep"] * (PATIENCE - 1)
    assert watch.see(float("nan")) == "int8"


def test_a_round_names_the_codec_that_it_gives_up_as_settings_do() -> None:
    settings = read_settings({"name": "klt_trellis"})
    uplink = SimpleNamespace(
        settings=settings, codec=None, layout=LAYOUT, versions=SimpleNamespace(current=0)
    )
    uplink._code_by = partial(Uplink._code_by, cast("Uplink", uplink))
    watch = Watch(expected=0.62, learned=False)
    seen = [Uplink._follow(cast("Uplink", uplink), watch, 1.0, round) for round in range(PATIENCE)]
    assert seen[:-1] == [{}] * (PATIENCE - 1)
    assert str(seen[-1]["choice"]).startswith("int8 instead of klt_trellis: ")
