"""Fit of a codec before the first round: updates to fit it to, a choice, and the gate.

Updates are collected at TGAP (`tgap`), at sites or from public text. A codec is fitted to the
earlier ones and measured on the later ones; under `codec.name = "auto"` each candidate is.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from fluvial.codecs import CODECS, CodecSettings, build, read_settings
from fluvial.codecs.auto import (
    AutoSettings,
    Measured,
    Plain,
    Use,
    Watch,
    candidates,
    choose,
    worth_its_time,
)
from fluvial.codecs.base import Codec, LearnedCodec, Snapshot
from fluvial.codecs.coding_time import coding_s
from fluvial.codecs.klt.moments import MomentCodec, Moments
from fluvial.codecs.quantise import Int8Settings
from fluvial.errors import ConfigError, GateError
from fluvial.exchange import collecting, gate
from fluvial.exchange.checks import needs_updates
from fluvial.exchange.probe import Probe, fold
from fluvial.exchange.recoding import feedback_error
from fluvial.exchange.report import GateReport, explain
from fluvial.exchange.representation import Representation, coded_object
from fluvial.exchange.terms import Terms
from fluvial.exchange.tgap import split_by_time
from fluvial.exchange.versions import published
from fluvial.exchange.weighting import scales, weigh
from fluvial.federation.bounds import too_long
from fluvial.federation.context import Context
from fluvial.federation.failures import Failure
from fluvial.federation.fleet import Fleet
from fluvial.federation.turns import Reply
from fluvial.seeds import derive
from fluvial.wire.payload import Payload, Value
from fluvial.wire.tensors import Layout

logger = logging.getLogger(__name__)

OnRefusal = Literal["refuse", "report"]
"""Action when a codec fails the gate: stop the run, or say so in the report."""


@dataclass(frozen=True)
class Snapshots:
    """Updates at the server, by which codecs are fitted and measured."""

    layout: Layout
    representation: Representation
    training: Sequence[Snapshot]
    heldout: Sequence[Snapshot]
    seed: int

    @property
    def count(self) -> int:
        """Return the number of updates that a fit sees."""
        return len(self.training)

    def fit(self, settings: CodecSettings) -> Codec:
        """Return a codec with these settings; raises `ConfigError` if it cannot code the layout."""
        kind = CODECS[settings.name]
        if not issubclass(kind, LearnedCodec):
            return build(settings, self.layout)

        objects = [
            coded_object(taken.received, taken.update, self.representation)
            for taken in self.training
        ]
        if settings.weighted:
            pairs = zip(objects, self.training, strict=True)
            objects = [
                weigh(update, scales(taken.received, self.layout)) for update, taken in pairs
            ]

        return kind.fit(settings, self.layout, objects, seed=self.seed)

    def measure(self, codec: Codec, *, fed_back: bool = False) -> GateReport:
        """Return what the codec does to held-out updates, and with `fed_back` after feedback."""
        report = gate.measure(codec, self.training, self.heldout, self.representation)
        if not fed_back:
            return report
        error = feedback_error(codec, self.heldout, self.representation)
        return replace(report, feedback_error=error)

    def holders(self, settings: CodecSettings) -> Sequence[str]:  # noqa: ARG002 - nothing was sent
        """Return the sites to which measuring has brought the codec with these settings."""
        return ()


@dataclass(frozen=True)
class Sums:
    """Moments to fit codecs by, and sites that measure them, where updates stay at the sites."""

    layout: Layout
    representation: Representation
    moments: Moments
    fleet: Fleet
    num_heldout: int
    """Snapshots that each site holds back."""
    held: dict[str, CodecSettings] = field(default_factory=dict)
    """Settings of the codec that each site was sent last."""

    @property
    def count(self) -> int:
        """See `Snapshots`."""
        return self.moments.count

    def fit(self, settings: CodecSettings) -> Codec:
        """See `Snapshots`."""
        kind = CODECS[settings.name]
        if not issubclass(kind, LearnedCodec):
            return build(settings, self.layout)
        if not issubclass(kind, MomentCodec):
            raise ConfigError(needs_updates(settings))
        return kind.fit_moments(settings, self.layout, self.moments)

    def measure(self, codec: Codec, *, fed_back: bool = False) -> GateReport:
        """See `Snapshots`; a site that decodes must hold the decoder."""
        messages = dict.fromkeys(self.fleet.sites, published(codec, 1, decoder=True))

        def read(_site: str, reply: Payload) -> Probe:
            return Probe.read(reply, most=self.num_heldout, fed_back=fed_back)

        replies = list(self.fleet.ask("probe", messages, round=0, read=read, alone=False))
        replies = self._plausible(replies)
        self.fleet.require_quorum("probe", 0, answered=len(replies), asked=len(messages))
        self.held.update((reply.site, codec.settings) for reply in replies)

        return fold([reply.content for reply in replies], self.layout, self.representation)

    def _plausible(self, replies: list[Reply[Probe]]) -> list[Reply[Probe]]:
        """Leave out sites whose sums are far beyond those of the others."""
        sizes_of = {reply.site: reply.content.sizes for reply in replies}
        growth = self.fleet.config.max_update_growth

        for index in range(len(Probe.SIZES)):
            others = [sizes[index] for sizes in sizes_of.values()]
            for site, sizes in sorted(sizes_of.items()):
                if too_long(sizes[index], others, growth) is not None:
                    reason = (
                        f"its {Probe.SIZES[index]} is {sizes[index]:.4g}, far beyond the other "
                        "sites'"
                    )
                    self.fleet.reject(Failure(site, 0, "probe", reason, 0))
                    del sizes_of[site]

        return [reply for reply in replies if reply.site in sizes_of]

    def holders(self, settings: CodecSettings) -> Sequence[str]:
        """See `Snapshots`."""
        return [site for site, held in self.held.items() if held == settings]


def collect(context: Context, terms: Terms, fleet: Fleet) -> Snapshots | Sums:
    """Return what sites, or sites simulated on public text, have learned of their updates."""
    config = terms.tgap
    layout = terms.sent(context.layout)

    if config.source == "sites-covariance":
        moments = collecting.collect_moments(
            config, fleet, context.layout, context.seed, sent=layout
        )
        num_heldout = config.rounds - config.training_rounds
        return Sums(layout, terms.representation, moments, fleet, num_heldout)

    ensemble = fleet
    if config.source == "public":
        ensemble = collecting.simulated_fleet(terms, context)

    snapshots = collecting.collect(
        config,
        ensemble,
        context.layout,
        context.seed,
        sent=layout,
        folder=context.ensemble,
        same_seed=ensemble is fleet,
    )
    training, heldout = split_by_time(snapshots, config.holdout)
    seed = derive(context.seed, "codec fit")

    return Snapshots(layout, terms.representation, training, heldout, seed)


@dataclass(frozen=True)
class Chosen:
    """Codec that `auto` chose, and why."""

    codec: Codec
    report: GateReport
    watch: Watch | None
    """Guard of the choice during the run; only error feedback tells the error."""
    values: dict[str, Value]
    """The choice and its reason, for the result."""


def choose_codec(
    settings: AutoSettings, updates: Snapshots | Sums, layout: Layout, use: Use
) -> Chosen:
    """Return the best of the candidates that can be fitted; raise `ConfigError` if none can."""
    measured: dict[str, Measured] = {}
    fitted: dict[str, tuple[Codec, GateReport]] = {}
    uplink = settings.uplink_mbps if settings.rate is None else None
    plain = None if uplink is None else _plain(settings, layout)

    for values in candidates(settings, layout, use):
        try:
            candidate: CodecSettings = read_settings(values)
            codec = updates.fit(candidate)
        except ConfigError as error:
            logger.info("auto: %s is no candidate: %s", values["name"], error)
            continue

        taken_s = 0.0 if plain is None else coding_s(codec)
        if plain is not None and uplink is not None and not CODECS[candidate.name].learned:
            slow = _unmeasured(codec, taken_s)
            if not worth_its_time(slow, plain, uplink):
                measured[candidate.name] = slow  # its errors, which take long, decide nothing
                continue

        report = updates.measure(codec, fed_back=candidate.error_feedback)
        fitted[candidate.name] = codec, report
        measured[candidate.name] = _measured(codec, report, taken_s)

    if not measured:
        rate = settings.target(layout)
        raise ConfigError(f"codec: no codec reaches rate {rate:g} on this layout")

    choice = choose(settings, measured, layout, use, plain)
    logger.info("auto: codec %s is chosen", choice.codec.name)  # the set-up has the reason
    if choice.codec.name not in fitted:
        codec = updates.fit(choice.codec)
        report = updates.measure(codec, fed_back=choice.codec.error_feedback)
        fitted[choice.codec.name] = codec, report

    codec, report = fitted[choice.codec.name]
    reason: dict[str, Value] = {
        "codec": choice.codec.model_dump(mode="json"),
        "why": choice.reason,
    }
    if not choice.codec.error_feedback:
        return Chosen(codec, report, None, reason)

    errors = [measured[name].error for name in fitted.keys() & measured if not CODECS[name].learned]
    # Where the rate follows the error, it says nothing about the codec.
    compared = isinstance(codec, LearnedCodec) and not settings.snr_driven
    watch = Watch(min(errors, default=1.0), compared)
    return Chosen(codec, report, watch, reason)


def judge(codec: CodecSettings, report: GateReport, on_refusal: OnRefusal) -> None:
    """Raise `GateError` for a codec that does not carry held-out updates."""
    name = codec.name
    if codec.error_feedback and not report.contraction < 1:
        raise GateError(
            f"codec {name!r} with error feedback: the error is up to {report.contraction:.3f} of "
            "the update's norm on held-out snapshots, so residuals would grow without bound; set "
            "codec.error_feedback=false",
            report.values(),
        )

    # An unbiased codec may enlarge an update: its error is repaid by the mean over sites, not by a
    # smaller error. What it decodes must still point where the update does.
    repaid = codec.without_bias and report.cosine > 0
    if report.failed and on_refusal == "refuse" and not repaid:
        raise GateError(explain(report, name), report.values())


def _plain(settings: AutoSettings, layout: Layout) -> Plain:
    """Return the codec that candidates must be worth their time against."""
    plain = Int8Settings(error_feedback=settings.error_feedback)
    codec = build(plain, layout)
    return Plain(plain, codec.frame_size(plain, layout), coding_s(codec))


def _unmeasured(codec: Codec, taken_s: float) -> Measured:
    """Return what is known of a candidate before its errors are measured."""
    size = codec.frame_size(codec.settings, codec.layout)
    return Measured(codec.settings, math.inf, size, 0, math.inf, taken_s)


def _measured(codec: Codec, report: GateReport, taken_s: float) -> Measured:
    """Return the errors of a candidate that takes `taken_s` to code, and what it sends."""
    published_bytes = 0
    if isinstance(codec, LearnedCodec):
        half = published(codec, 1, decoder=codec.settings.error_feedback)
        published_bytes = len(half.to_bytes())

    return Measured(
        codec=codec.settings,
        error=report.errors.all if report.feedback_error is None else report.feedback_error,
        frame_bytes=report.bytes_per_update,
        published_bytes=published_bytes,
        aggregate_error=report.errors.aggregate,
        coding_s=taken_s,
    )
