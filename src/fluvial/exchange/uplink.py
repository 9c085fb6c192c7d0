"""The uplink: choice, training, gate and later changes of the codec that sends updates.

Before the first round a codec that learns is fitted to updates collected at TGAP, measured on later
ones (the gate) and installed at the sites. Later it may be fitted again, its rate may follow the
noise that sites report, and under `codec.name = "auto"` another codec may take its place.
"""

import logging
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from fluvial.codecs import CODECS, CodecSettings, build, must_learn, read_settings
from fluvial.codecs.auto import PATIENCE, AutoSettings, Use, Watch, candidates
from fluvial.codecs.base import AdaptiveCodec, Codec, LearnedCodec, RatedCodec
from fluvial.codecs.quantise import Int8Settings
from fluvial.exchange import fitting
from fluvial.exchange.coding import Coder
from fluvial.exchange.feedback import MOST_ERROR, Feedback, ResizedFeedback
from fluvial.exchange.fitting import OnRefusal
from fluvial.exchange.moving import MovingFeedback
from fluvial.exchange.rates import RateControl
from fluvial.exchange.refit import Refits
from fluvial.exchange.terms import Basis, Terms
from fluvial.exchange.versions import INSTALL, Versions
from fluvial.exchange.weighting import weighted
from fluvial.federation.context import Context, Metrics
from fluvial.federation.fleet import Fleet
from fluvial.wire.payload import Payload, Value, join, payload_frame, split
from fluvial.wire.tensors import Layout, Named

logger = logging.getLogger(__name__)


def coder_of(
    codec: Codec,
    received: Named,
    *,
    basis: Basis = "fixed",
) -> Coder:
    """Return the chain that both ends put around `codec`, as its settings say.

    `received` is the adapter that updates start from; `basis` is that of the terms.
    """
    settings = codec.settings
    coder: Coder = weighted(codec, received)
    if settings.error_feedback and basis == "moving":
        coder = MovingFeedback(coder, received, decay=settings.feedback_decay)
    elif settings.error_feedback:
        feedback = ResizedFeedback if basis == "resized" else Feedback
        coder = feedback(coder, decay=settings.feedback_decay)

    return coder


def error_metrics(errors: Sequence[float]) -> Metrics:
    """Return the mean of relative squared errors, and the ratio of signal to noise in dB."""
    if not errors:
        return {}
    error = math.fsum(errors) / len(errors)
    return {"codec_error": error, "snr_db": -10 * math.log10(max(error, 1e-30))}


def reports_error(settings: CodecSettings) -> bool:
    """Return whether sites report the codec's error: under error feedback, which knows it anyway,
    and where the rate follows it."""
    return settings.error_feedback or settings.snr_driven


@dataclass(frozen=True)
class Decoded:
    """Content of the frame of one site."""

    update: Named
    """Object that was coded: an update, or a whole adapter under representation "state"."""
    error: float | None
    """Relative squared error of the codec, where the site reports it (see `reports_error`)."""


class Uplink:
    """Server half of the uplink."""

    def __init__(self, context: Context, terms: Terms, *, on_refusal: OnRefusal = "refuse") -> None:
        self.context = context
        self.terms = terms
        self.on_refusal = on_refusal
        self.layout = terms.sent(context.layout)
        self.settings: CodecSettings = context.codec
        """Settings of the codec in use; those of the run until `auto` chooses."""
        self.codec: Codec | None = None
        """The codec in use; None until one that learns is fitted."""
        if not must_learn(self.settings):
            self.codec = build(self.settings, self.layout)

        self.versions = Versions(self.settings)
        self.refits = Refits(terms.tgap, self.layout, context.rounds)
        self.control = RateControl.of(self.settings, self.layout)
        self.watch: Watch | None = None
        self._coder: Coder | None = None
        """Chain that decodes the updates of this round."""
        self.errors: list[float] = []
        """Relative squared errors of this round, as the sites report them (see `reports_error`)."""

    def _code_by(self, settings: CodecSettings) -> None:
        """Take other settings, and the rate control that they ask for."""
        self.settings = settings
        self.control = RateControl.of(settings, self.layout)

    # -- before the first round --------------------------------------------------------------------

    def setup(self, fleet: Fleet) -> Metrics:
        """Collect updates, fit or choose the codec, pass it through the gate, install it.

        Return no metrics where the terms have no pre-training, so that nothing is measured.
        """
        if self.terms.tgap.source == "none":
            return {}

        updates = fitting.collect(self.context, self.terms, fleet)
        metrics: Metrics = {}
        if isinstance(self.settings, AutoSettings):
            chosen = fitting.choose_codec(self.settings, updates, self.layout, self._use)
            self.codec = chosen.codec
            self._code_by(chosen.codec.settings)
            self.watch = chosen.watch
            report = chosen.report
            metrics["choice"] = chosen.values
        else:
            self.codec = updates.fit(self.settings)
            report = updates.measure(self.codec)

        metrics["snapshots"] = updates.count + report.snapshots
        metrics["loss_curve"] = [list(point) for point in self.codec.loss_curve]
        fitting.judge(self.settings, report, self.on_refusal)

        if self.versions.needed:
            self.versions.current = 1
            self.versions.held = dict.fromkeys(updates.holders(self.settings), 1)
            ready = self.versions.install(fleet, fleet.sites, self.codec, round=0)
            fleet.require_quorum(INSTALL, 0, answered=len(ready), asked=len(fleet.sites))

        return {**metrics, "gate": report.values()}

    @property
    def _use(self) -> Use:
        """Return the use of a codec in the run, with a byte's price by its time on the line."""
        line = self.context.line
        byte_down = 1.0 if line is None else line.up_mbit_s / line.down_mbit_s
        return Use(self.context.rounds, byte_down)

    # -- rounds -----------------------------------------------------------------------------------

    def begin(self, received: Named, round: int) -> None:
        """Begin a round in which sites receive the adapter `received`."""
        self.errors = []
        self._take(self.refits.begin(self.codec, received, round))
        assert self.codec is not None, "setup comes first"
        codec = self.codec
        if self.control is not None:
            assert isinstance(codec, RatedCodec), "only codecs with a rate have these settings"
            codec = codec.at_rate(self.control.rate)
        self._coder = coder_of(codec, received)

    def install(self, fleet: Fleet, sites: Sequence[str], round: int) -> list[str]:
        """Send the codec to those of `sites` that lack it; return those that hold it then."""
        assert self.codec is not None, "setup comes first"
        can_follow = self.refits.due(round) and isinstance(self.codec, AdaptiveCodec)
        return self.versions.install(fleet, sites, self.codec, round=round, can_follow=can_follow)

    def values(self) -> dict[str, Value]:
        """Return what goes with a round's message: codec version and rate, where needed."""
        values: dict[str, Value] = {}
        if self.versions.needed and self.terms.tgap.refit == "broadcast":
            values["codec"] = self.versions.current
        if self.control is not None:
            values["rate"] = self.control.rate

        return values

    def acknowledge(self, site: str) -> None:
        """Note that `site` has answered with the current codec."""
        self.versions.acknowledge(site)

    def forget(self, sites: Iterable[str]) -> None:
        """Note that these sites must be sent the codec again."""
        self.versions.forget(sites)

    def decode(self, reply: Payload, round: int) -> Decoded:
        """Return what a site coded in `round`; raise `WireError`."""
        assert self._coder is not None, "the round was begun"
        frame = payload_frame(reply)
        error = None
        if reports_error(self.settings):
            error = reply.number("e", 0.0, MOST_ERROR)

        update = self._coder.decode(frame, round=round)
        return Decoded(update, error)

    def decode_components(self, reply: Payload, layout: Layout, round: int) -> Decoded:
        """Return the components of `layout` that a site coded in `round`; raise `WireError`.

        No wrapper is around their codec.
        """
        codec = build(self.settings, layout)
        return Decoded(codec.decode(payload_frame(reply), round=round), None)

    def fold(self, site: str, decoded: Decoded) -> None:
        """Take note of a reply that counts."""
        self.refits.fold(site, decoded.update)
        if decoded.error is not None:
            self.errors.append(decoded.error)
            if self.control is not None:
                self.control.fold(decoded.error, decoded.update)

    def close(self, mean: Named, round: int) -> Metrics:
        """End a round whose updates have this `mean`; return what was seen of the codec."""
        metrics = error_metrics(self.errors)
        if self.control is not None:
            metrics |= self.control.close(mean)

        # The median: one site does not change the codec of all.
        if self.errors and self.watch is not None:
            metrics |= self._follow(self.watch, statistics.median_low(self.errors), round)

        if self._take(self.refits.end(self.codec)):
            metrics["refit"] = self.versions.current

        return metrics

    def _take(self, refitted: Codec | None) -> bool:
        """Use a refitted codec from now on; return whether there is one."""
        if refitted is None:
            return False
        self.codec = refitted
        self.versions.current += 1
        return True

    def _follow(self, watch: Watch, error: float, round: int) -> Metrics:
        """Let the guard of `auto` see the error of a round, and change the codec as it says."""
        verdict = watch.see(error)
        if verdict == "keep":
            return {}

        was = self.settings.name
        if verdict == "plain":
            assert isinstance(self.context.codec, AutoSettings), "only auto watches"
            settings = candidates(self.context.codec, self.layout, self._use)
            plain = next(one for one in settings if not CODECS[str(one["name"])].learned)
            self._code_by(read_settings(plain))
            why = (
                f"for {PATIENCE} rounds its error ({error:.3f}) was above the "
                f"{watch.expected:.3f} of {self.settings.name}"
            )
        else:
            self._code_by(Int8Settings(error_feedback=True))
            why = f"for {PATIENCE} rounds its error ({error:.3f}) was at the bound"
            logger.warning(
                "round %d: the codec no longer carries updates; falling back to int8", round
            )

        self.codec = build(self.settings, self.layout)
        self.versions.current += 1
        self.watch = Watch(watch.expected, learned=False)
        logger.info("auto, round %d: %s instead of %s: %s", round, self.settings.name, was, why)
        return {"choice": f"{self.settings.name} instead of {was}: {why}"}

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> Payload:
        """Return the codec as it is, who holds it, and what the policy remembers."""
        codec = Payload()
        if isinstance(self.codec, LearnedCodec):
            codec = self.codec.published(decoder=True)

        values: dict[str, Value] = {
            "settings": self.settings.model_dump(mode="json"),
            "version": self.versions.current,
            "installed": dict(self.versions.held),
            "rate": None if self.control is None else self.control.rate,
            "watch": None if self.watch is None else asdict(self.watch),
            "seen": [round for round, _ in self.refits.seen],
        }
        seen = join({str(round): Payload(adapter) for round, adapter in self.refits.seen})
        return join(
            {"codec": codec, "seen": Payload(seen.tensors), "policy": Payload(values=values)}
        )

    def restore(self, state: Payload) -> None:
        """Become the uplink whose `state` this was."""
        halves = split(state, ("codec", "seen", "policy"))
        policy = halves["policy"]
        self._code_by(read_settings(policy.value("settings", dict)))
        if self.control is not None:
            self.control.rate = policy.value("rate", float)
        self.versions.current = policy.value("version", int)
        self.versions.held = policy.value("installed", dict)
        watch = policy.values["watch"]
        self.watch = Watch(**watch) if isinstance(watch, dict) else None  # type: ignore[arg-type]

        adapters = halves["seen"].tensors
        self.refits.seen = [
            (round, {name: adapters[f"{round}/{name}"] for name in self.context.layout.names})
            for round in policy.value("seen", list)
        ]
        if isinstance(self.settings, AutoSettings):
            return  # a checkpoint of a run whose set-up did not choose

        kind = CODECS[self.settings.name]
        if not issubclass(kind, LearnedCodec):
            self.codec = build(self.settings, self.layout)
            return

        self.codec = None
        if self.versions.current:
            self.codec = kind.from_published(self.settings, self.layout, halves["codec"])
