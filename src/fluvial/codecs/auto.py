"""The policy behind `codec.name = "auto"`: which codec and which rate, from what was measured at
TGAP.

The rules come from measurements on real updates (docs/methods/cgfedllm.md):

- sites without state cannot repair what a biased codec loses, so they get an unbiased one;
- at one bit per value and above, codecs with error feedback do not differ in the end, so the
  smallest measured error wins and nothing is learned;
- error feedback makes what is coded ever whiter, so what lasts is a good quantiser: among codecs
  that learn nothing the trellis needs the fewest bytes;
- below that, the learned transform wins where it is clearly better than the best codec that learns
  nothing, with what error feedback makes of the updates, and where the bytes that it saves are
  worth the download of the transform;
- a byte down counts as a byte up, unless `fleet.line` says how much faster sites receive;
- where the uplink is known, time to code counts with time to send: a codec that takes longer than
  the upload that it saves is not chosen.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from fluvial.codecs.base import CodecSettings, SnrDrivenSettings
from fluvial.codecs.klt.model import published_bytes
from fluvial.codecs.klt.trellis import KltTrellisSettings
from fluvial.errors import ConfigError
from fluvial.wire.tensors import Layout

GAIN_DB = 0.5
"""The learned transform must be this much better than the best codec that learns nothing, which is
the trellis and so itself 0.6 dB better than a scalar quantiser on rotated values."""
LEARNED = "klt_trellis"
"""The learned transform for sites that keep state."""
PATIENCE = 3
"""Rounds in a row after which a drift is believed."""


class AutoSettings(SnrDrivenSettings):
    """Chosen by measurement, and chosen again when the measurements drift. Ours."""

    name: Literal["auto"] = "auto"
    rate: float | None = Field(None, ge=2, le=1024)
    """Times smaller than fp32; unset, it follows from `uplink_mbps` and `upload_s`, or is 64
    without `uplink_mbps`."""
    uplink_mbps: float | None = Field(None, ge=1e-6, le=1e6)
    """Slowest uplink among the sites, in megabits per second. Without `rate`, the time that a codec
    takes, measured when the run starts, counts with the upload."""
    upload_s: float = Field(10.0, ge=1e-3, le=1e6)
    """Longest upload of one update at `uplink_mbps`, in seconds."""
    error_feedback: bool = True
    """Error feedback: sites keep what the codec lost, and add it to their next update; false for
    sites that cannot keep state between rounds."""

    @property
    def without_bias(self) -> bool:
        """See `CodecSettings.without_bias`; sites without state get a codec without bias."""
        return not self.error_feedback

    def target(self, layout: Layout) -> float:
        """Return the rate to aim at."""
        if self.rate is not None:
            return self.rate
        if self.uplink_mbps is None:
            return 64.0
        room = self.uplink_mbps * 1e6 / 8 * self.upload_s
        return float(min(max(layout.raw_bytes / room, 4.0), 256.0))


@dataclass(frozen=True)
class Choice:
    """The chosen codec, and the reason in one sentence."""

    codec: CodecSettings
    reason: str


@dataclass(frozen=True)
class Measured:
    """One candidate on held-out snapshots."""

    codec: CodecSettings
    error: float
    """Relative squared error of what a site codes: an update, or with error feedback what it makes
    of an update (`recoding.feedback_error`)."""
    frame_bytes: float
    published_bytes: int
    """Bytes that each site downloads once."""
    aggregate_error: float
    """Relative error of the mean over the sites of a round."""
    coding_s: float = 0.0
    """Seconds to encode and decode an update on this machine; 0 where no uplink is known."""


@dataclass(frozen=True)
class Plain:
    """The codec that any other must be worth its time against: `int8`, which costs hardly any."""

    codec: CodecSettings
    frame_bytes: float
    coding_s: float


@dataclass(frozen=True)
class Use:
    """Use of a codec in a run."""

    rounds: int
    """Rounds in which it codes the update of a site."""
    byte_down: float = 1.0
    """Price of a byte down against a byte up, which is the ratio of their times on the line."""


def candidates(settings: AutoSettings, layout: Layout, use: Use) -> list[dict[str, object]]:
    """Return the `[codec]` tables to measure at TGAP."""
    rate: dict[str, object] = {"rate": settings.target(layout), **_targets(settings)}
    if not settings.error_feedback:
        return [{"name": "eden", **rate}, {"name": "klt", **rate, "mode": "dithered"}]

    tables: list[dict[str, object]] = [{"name": "trellis", **rate}]
    if not settings.snr_driven:
        tables += _of_fixed_rate(settings.target(layout))
    if settings.target(layout) > 32 and _may_repay(settings.target(layout), layout, use):
        tables.append({"name": LEARNED, **rate})

    return [{**table, "error_feedback": True} for table in tables]


def _may_repay(rate: float, layout: Layout, use: Use) -> bool:
    """Return whether the learned transform can repay its download, before anything is fitted.

    It saves less than all that is sent without it.
    """
    return use.byte_down * _download(layout) < use.rounds * layout.raw_bytes / rate


def _download(layout: Layout) -> int:
    """Return the bytes of the learned transform; 0 for a layout that it cannot code."""
    share = KltTrellisSettings.model_fields["basis_share"].default
    try:
        return published_bytes(layout, share)
    except ConfigError:
        return 0


def _targets(settings: AutoSettings) -> dict[str, object]:
    """Return the settings by which the rate of a candidate follows its noise, where they are
    set."""
    targets = {"snr_db": settings.snr_db, "noise_ratio": settings.noise_ratio}
    return {name: value for name, value in targets.items() if value is not None}


def _of_fixed_rate(rate: float) -> list[dict[str, object]]:
    """Return the candidates whose rate is their own."""
    if rate <= 7:
        return [{"name": "int4"}]
    return [{"name": "sign"}] if rate <= 30 else []


def choose(
    settings: AutoSettings,
    measured: Mapping[str, Measured],
    layout: Layout,
    use: Use,
    plain: Plain | None = None,
) -> Choice:
    """Return the best of the candidates that could be measured.

    With an uplink and `plain`, candidates that code and send an update more slowly than `plain`
    does are left out; if they all do, `plain` is chosen.
    """
    uplink = settings.uplink_mbps
    if uplink is None or plain is None:
        return _least_error(settings, measured, layout, use)

    worth = {name: each for name, each in measured.items() if worth_its_time(each, plain, uplink)}
    timed: list[Measured | Plain] = [*measured.values(), plain]
    words = [_time_words(each, uplink) for each in timed]
    times = f"coding + upload at {uplink:g} Mbit/s: {', '.join(words)}"

    if not worth.keys() - {LEARNED}:
        return Choice(
            plain.codec,
            f"no candidate saves as much upload as its coding takes, so {plain.codec.name} is the "
            f"fastest ({times})",
        )

    choice = _least_error(settings, worth, layout, use)
    return Choice(choice.codec, f"{choice.reason} ({times})")


def _least_error(
    settings: AutoSettings, measured: Mapping[str, Measured], layout: Layout, use: Use
) -> Choice:
    """Return the candidate of least error, the learned one only where it repays its costs."""
    rate = settings.target(layout)
    if not settings.error_feedback:
        best = min(measured.values(), key=lambda each: each.aggregate_error)
        return Choice(
            best.codec,
            f"sites keep no state, so the codec must be unbiased: {best.codec.name} at 1/{rate:g} "
            "has the smallest error of the mean on held-out snapshots "
            f"({_listed(measured, 'aggregate_error')})",
        )

    plain = {name: each for name, each in measured.items() if name != LEARNED}
    best = min(plain.values(), key=lambda each: each.error)
    learned = measured.get(LEARNED)

    if learned is None:
        why = f"{LEARNED} cannot code this layout"
        if rate <= 32:
            why = "one bit per value or more, where no learned transform is worth its download"
        elif not _may_repay(rate, layout, use):
            why = (
                f"a learned transform has a download of {_download(layout):,} B, more than it can "
                f"save in {use.rounds} rounds"
            )

        return Choice(
            best.codec,
            f"{why}: of the other candidates {best.codec.name} + error feedback has the smallest "
            f"squared relative error ({_listed(plain)})",
        )

    gain = 10 * math.log10(best.error / max(learned.error, 1e-30))
    if gain < GAIN_DB:
        return Choice(
            best.codec,
            f"the learned transform gains only {gain:.2f} dB on held-out snapshots, under "
            f"{GAIN_DB:g} ({_listed(measured)}): {best.codec.name} + error feedback at 1/{rate:g}",
        )

    saved_once = _bytes_for(best, learned.error) - learned.frame_bytes
    longer_s = learned.coding_s - best.coding_s
    if settings.uplink_mbps is not None and longer_s > _upload_s(saved_once, settings.uplink_mbps):
        return Choice(
            best.codec,
            f"the learned transform gains {gain:.2f} dB but codes {longer_s:.2g} s longer, for "
            f"{_upload_s(saved_once, settings.uplink_mbps):.2g} s less upload: {best.codec.name} + "
            f"error feedback at 1/{rate:g}",
        )

    saved = saved_once * use.rounds
    price = "" if use.byte_down == 1 else f", of which each counts {use.byte_down:g} on this line"
    download = f"download of {learned.published_bytes:,} B{price}"
    if saved < use.byte_down * learned.published_bytes:
        return Choice(
            best.codec,
            f"the learned transform gains {gain:.2f} dB but over {use.rounds} rounds saves "
            f"{saved:,.0f} B up, less than its {download}: {best.codec.name} + error feedback at "
            f"1/{rate:g}",
        )

    return Choice(
        learned.codec,
        f"the learned transform gains {gain:.2f} dB on held-out snapshots ({_listed(measured)}) "
        f"and saves {saved:,.0f} B up over {use.rounds} rounds for a {download}: {LEARNED} + error "
        f"feedback at 1/{rate:g}",
    )


@dataclass
class Watch:
    """Follows the error that sites report, and says when the choice no longer holds."""

    expected: float
    """Error of the best codec without a transform; a learned one that is worse has lost its
    reason."""
    learned: bool
    worse: int = 0
    lost: int = 0

    def see(self, error: float) -> Literal["keep", "plain", "int8"]:
        """Return one round's mean error; "plain" after a learned codec was worse for some rounds,
        "int8" near 1."""
        self.worse = self.worse + 1 if self.learned and error > self.expected else 0
        self.lost = self.lost + 1 if not error < 0.98 else 0

        if self.lost >= PATIENCE:
            return "int8"
        return "plain" if self.worse >= PATIENCE else "keep"


def _upload_s(frame_bytes: float, uplink_mbps: float) -> float:
    return 8 * frame_bytes / (1e6 * uplink_mbps)


def worth_its_time(codec: Measured, plain: Plain, uplink_mbps: float) -> bool:
    """Return whether a codec codes and sends an update as soon as `plain` does."""
    return _round_s(codec, uplink_mbps) <= _round_s(plain, uplink_mbps)


def _round_s(codec: Measured | Plain, uplink_mbps: float) -> float:
    """Return the seconds to code and to send an update."""
    return codec.coding_s + _upload_s(codec.frame_bytes, uplink_mbps)


def _time_words(codec: Measured | Plain, uplink_mbps: float) -> str:
    upload_s = _upload_s(codec.frame_bytes, uplink_mbps)
    return f"{codec.codec.name} {codec.coding_s:.2g} + {upload_s:.2g} s"


def _bytes_for(plain: Measured, error: float) -> float:
    """Return the frame bytes that a codec without a transform would need for `error`: bits fall as
    log(1 / error)."""
    return (
        plain.frame_bytes
        * math.log(max(error, 1e-9))
        / math.log(min(max(plain.error, 1e-9), 0.999))
    )


def _listed(measured: Mapping[str, Measured], field: str = "error") -> str:
    return ", ".join(f"{name} {getattr(each, field):.3f}" for name, each in measured.items())
