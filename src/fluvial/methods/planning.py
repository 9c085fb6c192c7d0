"""Plans and forecasts of methods whose sites send one update in a round."""

from collections.abc import Callable, Mapping
from functools import partial

from fluvial.codecs import CODECS, CodecSettings, must_learn
from fluvial.codecs.forecast import frame_size
from fluvial.codecs.naming import configured_in
from fluvial.codecs.quantise import IdentitySettings
from fluvial.errors import ConfigError
from fluvial.exchange import PUBLIC_TGAP, TgapConfig, check_codec, check_refit
from fluvial.exchange.downlink import coded_layout
from fluvial.federation.line import round_s
from fluvial.formatting import human_seconds
from fluvial.methods.idle import idle_bounds, idle_feedback, idle_fraction, idle_targets
from fluvial.methods.interface import CheckRow, Forecast, Given, MethodSettings, Plan
from fluvial.methods.traffic import (
    CODED,
    Bytes,
    Measured,
    Traffic,
    coded_frame,
    shared_down,
    shared_up,
    starts,
)
from fluvial.models.quantised import quantised_bytes
from fluvial.wire.payload import Value
from fluvial.wire.tensors import Layout, factor

UNCOUNTED = "headers, measures apart"
"""Traffic that the predicted bytes of a whole run leave out."""

OPTIMIZER_BYTES = 16
"""Bytes for each trained value: fp32 weight, gradient and two moments of AdamW."""
OWN_CODE = "the method's own code: see the bytes of a site in a round"
"""Words of `fluvial check` in the place of a frame size that no codec determines."""


Download = tuple[Layout, Mapping[str, Value]]
"""The layout of what a site receives, and the further values of its message."""


def shared_plan(
    config: MethodSettings,
    given: Given,
    sent: Layout,
    tgap: TgapConfig,
    *,
    download: Download | None = None,
    measured: Layout | None = None,
) -> Plan:
    """Return the plan of a method that shares one adapter and pre-trains by default on public text.

    `sent` is the layout of an update, `download` what sites receive where it is not the adapter
    alone, `measured` the layout of what they are sent in a held-out measure, None where that is not
    predicted. Raises `ConfigError` for a codec that cannot code it, and for a `tgap` that no codec
    needs.
    """
    learns = must_learn(given.codec)
    if tgap != PUBLIC_TGAP and not learns:
        name: str = given.codec.name
        raise ConfigError(
            f"method.tgap: without effect, because codec {name!r} learns nothing; remove it"
        )

    check_codec(given.codec, tgap, sent)
    check_refit(given.codec, tgap, given.rounds)
    version = learns and tgap.refit == "broadcast"
    forecast = partial(
        coded, config, given, sent, version=version, download=download, measured=measured
    )
    return Plan(
        sent,
        forecast,
        reads_public=learns and tgap.source == "public",
        idle=shared_idle(config, given, collects=learns and tgap.from_sites),
    )


def shared_idle(config: MethodSettings, given: Given, *, collects: bool) -> dict[str, str]:
    """Return the settings that cannot change a run through `fluvial.exchange`, and why.

    `collects` says that the set-up compares and averages updates of all sites.
    """
    cohort = config.cohort(given.sites)
    steady = cohort == given.sites and given.on_failure == "stop"
    return {
        **idle_bounds(given.sites if collects else cohort),
        **idle_feedback(given, steady=steady),
        **idle_targets(given, cohort),
        **idle_fraction(config, given.sites),
    }


def coded(
    config: MethodSettings,
    given: Given,
    sent: Layout,
    *,
    frame_only: bool = False,
    version: bool = False,
    download: Download | None = None,
    measured: Layout | None = None,
) -> Forecast:
    """Return the forecast of a method that sends `sent` by the codec and receives the adapter.

    `frame_only` says that a site sends a frame and no values, `version` that each message has the
    version of the codec, and `download` and `measured` are those of `shared_plan`.
    """
    traffic = partial(
        shared_traffic,
        config,
        given,
        sent,
        frame_only=frame_only,
        version=version,
        download=download,
    )
    frame = frame_size(given.codec, sent)
    with configured_in("downlink"):
        received = given.layout if download is None else download[0]
        down = frame_size(*_carried(given, received, sent))
    cohort = config.cohort(given.sites)
    # In round 1 the sites make the adapter from the seed, but not an exact side path.
    downloads = given.rounds - (given.downlink is not None or starts(received))
    rows = [
        *frame_rows(config, given, frame, likely=coded_frame(given.codec, sent)),
        ("down, whole run", f"{down * cohort * downloads:,} B to all sites, {UNCOUNTED}"),
        *memory_rows(given, sent),
    ]
    model = None if measured is None else Measured.of(measured)
    if given.line is None:
        return Forecast(frame, down, traffic, rows, measured=model)

    seconds = round_s(down, frame, sites=cohort, line=given.line)
    rows.append(line_row(seconds))
    return Forecast(frame, down, traffic, rows, seconds, model)


def uncoded(
    config: MethodSettings,
    given: Given,
    traffic: Callable[[int], Traffic],
    sent: Layout,
    absent: str,
    measured: Measured | None = None,
) -> Forecast:
    """Return the forecast of a method without the configuration's codec; `absent` says why.

    `measured` is the model in a held-out measure.
    """
    down = frame_size(IdentitySettings(), given.layout)
    rows = [*absent_rows(absent), ("down, whole run", absent), *memory_rows(given, sent)]
    usual = traffic(given.rounds)
    if given.line is None or usual.down.unknown or usual.up.unknown:
        return Forecast(0, down, traffic, rows, measured=measured)

    seconds = round_s(
        usual.down.most, usual.up.most, sites=config.cohort(given.sites), line=given.line
    )
    rows.append(line_row(seconds))
    return Forecast(0, down, traffic, rows, seconds, measured)


def line_row(seconds: float) -> CheckRow:
    """Return the row about a round over the line."""
    return (
        "a round over fleet.line, over Flower",
        f"{human_seconds(seconds)} and the time of training",
    )


def frame_rows(
    config: MethodSettings, given: Given, frame: int, *, likely: Bytes | None = None
) -> list[CheckRow]:
    """Return the rows about updates of `frame` bytes, which are `likely`, see `coded_frame`."""
    total = frame * config.cohort(given.sites) * given.rounds
    kind = CODECS.get(given.codec.name)
    differs = likely is not None and 0 < likely.least < likely.most
    up_to = "about " if differs else "" if kind is None or kind.fills else "up to about "
    size = f"{up_to}{frame:,} B, 1/{given.layout.raw_bytes / frame:.1f}"
    size += f", {100 * CODED:.0f} % more or less" if differs else ""
    if given.codec.snr_driven:
        return [
            ("frame of an update in round 1", size),
            ("up, whole run", "not predicted: the rate of each round follows the noise"),
        ]
    return [
        ("frame of an update", size),
        ("up, whole run", f"{up_to}{total:,} B from all sites, {UNCOUNTED}"),
    ]


def absent_rows(absent: str) -> list[CheckRow]:
    """Return the same rows where no codec of the configuration carries updates."""
    return [("frame of an update", absent), ("up, whole run", absent)]


def memory_rows(given: Given, sent: Layout) -> list[CheckRow]:
    """Return the rows about the memory of a site that holds the base and tunes `sent`."""
    parameters = sum(parameter.numel() for parameter in given.base.parameters())
    return [
        ("base in memory", _base_memory(given, parameters * given.width_bytes)),
        ("what is tuned and optimizer in memory", f"{sent.numel * OPTIMIZER_BYTES:,} B"),
    ]


def shared_traffic(
    config: MethodSettings,
    given: Given,
    sent: Layout,
    round: int,
    *,
    frame_only: bool = False,
    version: bool = False,
    download: Download | None = None,
) -> Traffic:
    """Predict the bytes of a site in a round that goes through `fluvial.exchange`; see `coded`."""
    received, values = download or (given.layout, {})
    _, layout = _carried(given, received, sent)
    all_sites = config.cohort(given.sites) == given.sites
    return Traffic(
        down=shared_down(
            given.downlink,
            layout,
            round,
            all_sites=all_sites,
            version=version,
            assigned=values,
            rated=given.codec.snr_driven,
        ),
        up=shared_up(given.codec, sent, frame_only=frame_only),
    )


def _carried(given: Given, received: Layout, sent: Layout) -> tuple[CodecSettings, Layout]:
    """Return the codec of the downlink, and the layout that it codes of what sites receive."""
    if given.downlink is None:
        return IdentitySettings(), received
    trains_a = any(factor(name) == "A" for name in sent.names)
    return given.downlink, coded_layout(received, "A and B" if trains_a else "B")


def _base_memory(given: Given, float_bytes: int) -> str:
    """Return the bytes of the base in words, for a quantised one those of the float base too."""
    if not given.quantisation:
        return f"{float_bytes:,} B"
    size = quantised_bytes(given.base, given.quantisation, given.correction_rank)
    return f"{size:,} B; {float_bytes:,} B not quantised"
