"""How updates come up: which codec carries them, how it was learned, and whether it still does.

Before the first round a codec that learns is fitted to updates collected at TGAP, measured on later
ones (the gate) and installed at the sites. Later it may be fitted again, its rate may follow the
noise between sites, and under `codec.name = "auto"` another codec may take its place.
"""

import itertools
import logging
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from fluvial.codecs import CODECS, CodecSettings, build, must_learn, read_settings
from fluvial.codecs.auto import PATIENCE, AutoSettings, Measured, Watch, candidates, choose
from fluvial.codecs.base import AdaptiveCodec, Codec, LearnedCodec, Snapshot, SteppedCodec
from fluvial.codecs.klt.moments import MomentCodec, Moments, num_bytes
from fluvial.codecs.klt.settings import KltSettings
from fluvial.codecs.quantise import Int8Settings
from fluvial.codecs.weighted import scales, weigh, weighted
from fluvial.errors import ConfigError, GateError, WireError
from fluvial.exchange import gate, tgap
from fluvial.exchange.gate import GateReport, Representation
from fluvial.exchange.tgap import TgapConfig
from fluvial.federation.bounds import too_long
from fluvial.federation.context import Context, Metrics
from fluvial.federation.fleet import Failure, Fleet, Reply
from fluvial.federation.replies import nothing
from fluvial.federation.sites import Site, code, round_of, site_codec
from fluvial.models.states import no_change
from fluvial.seeds import derive
from fluvial.wire.payload import Limits, Payload, Value, frame_payload, join, payload_frame, split
from fluvial.wire.tensors import Layout, Named, energy, subtract

logger = logging.getLogger(__name__)

OnRefusal = Literal["refuse", "report"]
_STEP_OFF = 1 / 64
"""Octaves by which a frame's step may differ from the server's: it is rounded to 1/256 of one."""
_MOST_ERROR = 1e4
"""Relative squared error that a site can report; an unbiased codec at a low rate exceeds 1."""


@dataclass(frozen=True)
class Decoded:
    """One reply of a site."""

    update: Named
    """What was coded: an update, or a whole adapter under representation "state"."""
    error: float | None
    """Relative squared error of the codec, as the site reports it under error feedback."""
    noise: float | None
    """Expected squared error of the codec, from the frame, where the server sets the step."""
    step: float | None


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
        """Updates that a fit sees."""
        return len(self.training)

    def fit(self, settings: CodecSettings) -> Codec:
        """A codec with these settings; raises `ConfigError` if it cannot code the layout."""
        kind = CODECS[settings.name]
        if not issubclass(kind, LearnedCodec):
            return build(settings, self.layout)

        objects = [
            gate.coded_object(each.received, each.update, self.representation)
            for each in self.training
        ]
        if settings.weighted:
            pairs = zip(objects, self.training, strict=True)
            objects = [weigh(update, scales(each.received, self.layout)) for update, each in pairs]

        return kind.fit(settings, self.layout, objects, seed=self.seed)

    def measure(self, codec: Codec) -> GateReport:
        """What the codec does to held-out updates."""
        return gate.measure(codec, self.training, self.heldout, self.representation)

    def holders(self, settings: CodecSettings) -> Sequence[str]:  # noqa: ARG002 - nothing was sent
        """Sites to which measuring has brought the codec with these settings."""
        return ()


@dataclass(frozen=True)
class Sums:
    """The same where updates stay at the sites: moments to fit by, and sites that measure."""

    layout: Layout
    representation: Representation
    moments: Moments
    fleet: Fleet
    num_heldout: int
    """Snapshots that each site holds back."""
    held: dict[str, CodecSettings] = field(default_factory=dict)
    """Which codec each site was sent last."""

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
            raise ConfigError(_needs_updates(settings))
        return kind.fit_moments(settings, self.layout, self.moments)

    def measure(self, codec: Codec) -> GateReport:
        """See `Snapshots`; a site that decodes must hold the decoder."""
        messages = dict.fromkeys(self.fleet.sites, published(codec, 1, decoder=True))

        def read(_site: str, reply: Payload) -> gate.Probe:
            return gate.Probe.read(reply, most=self.num_heldout)

        replies = list(self.fleet.ask("probe", messages, round=0, read=read, alone=False))
        replies = self._plausible(replies)
        self.fleet.require_quorum("probe", 0, answered=len(replies), asked=len(messages))
        self.held.update((reply.site, codec.settings) for reply in replies)

        return gate.fold([reply.content for reply in replies], self.layout, self.representation)

    def _plausible(self, replies: list[Reply[gate.Probe]]) -> list[Reply[gate.Probe]]:
        """Leave out sites whose sums are far beyond those of the others."""
        sizes = {reply.site: reply.content.sizes for reply in replies}
        growth = self.fleet.config.max_update_growth

        for index in range(len(gate.Probe.SIZES)):
            others = [each[index] for each in sizes.values()]
            for site, found in sorted(sizes.items()):
                if too_long(found[index], others, growth) is not None:
                    reason = f"its {gate.Probe.SIZES[index]} is {found[index]:.4g}, far beyond the other sites'"
                    self.fleet.reject(Failure(site, 0, "probe", reason, 0))
                    del sizes[site]

        return [reply for reply in replies if reply.site in sizes]

    def holders(self, settings: CodecSettings) -> Sequence[str]:
        """See `Snapshots`."""
        return [site for site, held in self.held.items() if held == settings]


class Uplink:
    """The server's half."""

    def __init__(
        self,
        context: Context,
        layout: Layout,
        config: TgapConfig,
        representation: Representation = "delta",
        on_refusal: OnRefusal = "refuse",
    ) -> None:
        self.context = context
        self.layout = layout
        self.config = config
        self.representation = representation
        self.on_refusal = on_refusal
        self.settings: CodecSettings = context.codec
        self.codec: Codec | None = (
            None if must_learn(self.settings) else build(self.settings, layout)
        )
        self.version = 0
        """Of what is installed; a site that holds another is installed anew."""
        self.installed: dict[str, int] = {}
        self.watch: Watch | None = None
        self.step: float | None = None
        self._sent: Named = {}  # what the sites of this round received
        self._seen: list[
            tuple[int, Named]
        ] = []  # adapters as sites received them, for a refit without bytes
        self._refits = False  # after this round, from its decoded updates; only then are they kept
        self._decoded: list[tuple[str, Named]] = []
        self._errors: list[float] = []
        self._noise: list[
            tuple[float, float, float]
        ] = []  # codec noise, energy and step of every reply

    @property
    def noise_ratio(self) -> float | None:
        """Codec noise to allow, against the sampling noise between sites; None for a fixed rate."""
        return getattr(self.settings, "noise_ratio", None)

    # -- before the first round -------------------------------------------------------------------

    def setup(self, fleet: Fleet, method: Any) -> Metrics:
        """Collect updates, fit or choose the codec, pass it through the gate, send each site its
        half."""
        if self.config.source == "none":
            return {"gate": None}

        found = self._collect(fleet, method)
        metrics: Metrics = {}
        if isinstance(self.settings, AutoSettings):
            report, metrics["choice"] = self._choose(self.settings, found)
        else:
            self.codec = found.fit(self.settings)
            report = found.measure(self.codec)

        metrics["snapshots"] = found.count + report.snapshots
        metrics["loss_curve"] = [list(point) for point in getattr(self.codec, "loss_curve", [])]
        self._judge(report)

        if must_learn(self.context.codec):
            self.version = 1
            self.installed = dict.fromkeys(found.holders(self.settings), 1)
            ready = self.install(fleet, fleet.sites, 0)
            fleet.require_quorum("install", 0, answered=len(ready), asked=len(fleet.sites))

        return {**metrics, "gate": report.values()}

    def _collect(self, fleet: Fleet, method: Any) -> "Snapshots | Sums":
        """What the sites have learned of their updates, or a simulation of it."""
        config = self.config
        whole = self.context.layout
        seed = self.context.seed

        if config.source == "sites-covariance":
            moments = tgap.collect_moments(config, fleet, whole, seed, sent=self.layout)
            return Sums(
                self.layout,
                self.representation,
                moments,
                fleet,
                config.rounds - config.training_rounds,
            )

        ensemble = (
            tgap.simulated_fleet(config, self.context, method)
            if config.source == "public"
            else fleet
        )
        snapshots = tgap.collect(config, ensemble, whole, seed, sent=self.layout)
        training, heldout = tgap.split_by_time(snapshots, config.holdout)

        return Snapshots(
            self.layout, self.representation, training, heldout, derive(seed, "codec fit")
        )

    def _choose(
        self, settings: AutoSettings, found: "Snapshots | Sums"
    ) -> tuple[GateReport, dict[str, Value]]:
        """The choice among the candidates that could be fitted, and what was measured of it."""
        measured: dict[str, Measured] = {}
        fitted: dict[str, tuple[Codec, GateReport]] = {}

        for table in candidates(settings, self.layout):
            try:
                candidate: CodecSettings = read_settings(table)
                codec = found.fit(candidate)
            except ConfigError as error:
                logger.info("auto: %s is no candidate: %s", table["name"], error)
                continue

            report = found.measure(codec)
            fitted[candidate.name] = codec, report
            measured[candidate.name] = _measured(codec, report)

        if not measured:
            raise ConfigError(
                f"codec: no codec reaches rate {settings.target(self.layout):g} on this layout"
            )

        choice = choose(settings, measured, self.layout, self.context.rounds)
        logger.info("auto: %s", choice.reason)
        self.settings = choice.codec
        self.codec, report = fitted[choice.codec.name]
        plain = [each.error for name, each in measured.items() if not CODECS[name].learned]

        if choice.codec.error_feedback:
            self.watch = Watch(min(plain, default=1.0), isinstance(self.codec, LearnedCodec))

        return report, {"codec": choice.codec.model_dump(mode="json"), "why": choice.reason}

    def _judge(self, report: GateReport) -> None:
        name = self.settings.name
        if self.settings.error_feedback and not report.contraction < 1:
            raise GateError(
                f"codec {name!r} with error feedback: the error is up to {report.contraction:.3f} of the update's norm "
                "on held-out snapshots, so residuals would grow without bound; set codec.error_feedback=false",
                report.values(),
            )

        # An unbiased codec may enlarge an update: its error is repaid by the mean over sites, not
        # by a smaller error.
        if report.failed and self.on_refusal == "refuse" and not self.settings.without_bias:
            raise GateError(gate.explain(report, name), report.values())

    # -- rounds -----------------------------------------------------------------------------------

    def advance(self, sent: Named, round: int) -> None:
        """Called before a round's messages: `sent` is what sites of this round will receive."""
        self._sent = sent
        self._decoded = []
        self._errors = []
        self._noise = []
        adaptive = self.config.refit == "decoded" and isinstance(self.codec, AdaptiveCodec)
        self._refits = (
            adaptive and round % self.config.refit_every == 0 and round < self.context.rounds
        )

        if self.config.refit != "broadcast":
            return

        self._seen = [*self._seen, (round, sent)][-(self.config.refit_every + 1) :]
        if self._due(round):
            updates = window(self._seen, round, self.config.refit_every, self.layout)
            if updates is not None:
                self._refit(updates)

    def _due(self, round: int) -> bool:
        """Whether a refit from broadcast adapters happens before `round`."""
        every = self.config.refit_every
        return round > every and (round - 1) % every == 0

    def _refit(self, updates: Sequence[Named]) -> None:
        if isinstance(self.codec, AdaptiveCodec):
            self.codec = self.codec.refit(updates, weight=self.config.refit_weight)
            self.version += 1

    def install(self, fleet: Fleet, sites: Sequence[str], round: int) -> list[str]:
        """Send the codec to those of `sites` that do not hold the present one; returns those that
        do now."""
        if not must_learn(self.context.codec):
            return list(sites)

        assert self.codec is not None, "setup comes first"
        lacking = [site for site in sites if not self._holds(site, round)]
        if lacking:
            messages = dict.fromkeys(lacking, self._published())
            for reply in fleet.ask("install", messages, round=round, read=nothing, alone=False):
                self.installed[reply.site] = self.version

        return [site for site in sites if self._holds(site, round)]

    def _holds(self, site: str, round: int) -> bool:
        return self.installed.get(site, 0) in self._accepted(round)

    def _accepted(self, round: int) -> set[int]:
        """Versions from which a site can come to the present one by itself."""
        zero_bytes = (
            self.config.refit == "broadcast"
            and self._due(round)
            and isinstance(self.codec, AdaptiveCodec)
        )
        return {self.version, self.version - 1} if zero_bytes else {self.version}

    def _published(self) -> Payload:
        """Only error feedback makes a site decode, so only then does it download the decoder."""
        assert self.codec is not None
        return published(self.codec, self.version, decoder=self.settings.error_feedback)

    def values(self) -> dict[str, Value]:
        """What goes with a round's message: the version of the codec, and the step where the server
        sets it."""
        found: dict[str, Value] = {}
        if must_learn(self.context.codec) and self.config.refit == "broadcast":
            found["codec"] = self.version
        if self.step is not None:
            found["step"] = self.step
        return found

    def acknowledge(self, site: str) -> None:
        """`site` has answered with the present codec."""
        if must_learn(self.context.codec):
            self.installed[site] = self.version

    def forget(self, sites: Iterable[str]) -> None:
        """These sites must be installed anew."""
        for site in sites:
            self.installed.pop(site, None)

    def decode(self, reply: Payload, round: int) -> Decoded:
        """What a site coded in `round`; raises `WireError`."""
        assert self.codec is not None, "setup comes first"
        frame = payload_frame(reply)
        noise = step = None

        if self.noise_ratio is not None and isinstance(self.codec, SteppedCodec):
            noise = self.codec.noise_of(frame)
            step = self.codec.step_of(frame)
            if self.step is not None and not abs(math.log2(step / self.step)) <= _STEP_OFF:
                raise WireError(
                    f"frame: quantised by a step of {step:.4g}, the server asked for {self.step:.4g}"
                )

        error = reply.number("e", 0.0, _MOST_ERROR) if self.settings.error_feedback else None
        return Decoded(
            weighted(self.codec, self._sent).decode(frame, round=round), error, noise, step
        )

    def fold(self, site: str, decoded: Decoded) -> None:
        """Take note of a reply that counts."""
        if decoded.error is not None:
            self._errors.append(decoded.error)
        if self._refits:
            self._decoded.append((site, decoded.update))
        if decoded.noise is not None and decoded.step is not None:
            self._noise.append((decoded.noise, energy(decoded.update), decoded.step))

    def close(self, mean: Named, round: int) -> Metrics:
        """After a round's replies were folded into `mean`: what was seen, and what changes before
        the next round."""
        metrics: Metrics = {}
        if self._errors:
            error = math.fsum(self._errors) / len(self._errors)
            metrics |= {"codec_error": error, "snr_db": -10 * math.log10(max(error, 1e-30))}
            if self.watch is not None:  # by the median: one site does not change the codec of all
                metrics |= self._follow(self.watch, statistics.median_low(self._errors), round)

        if len(self._noise) > 1:
            metrics |= self._next_step(energy(mean))
        if self._refits and isinstance(
            self.codec, AdaptiveCodec
        ):  # the policy may just have changed it
            self._refit([update for _, update in sorted(self._decoded, key=lambda each: each[0])])
            metrics["refit"] = self.version

        return metrics

    def _follow(self, watch: Watch, error: float, round: int) -> Metrics:
        verdict = watch.see(error)
        if verdict == "keep":
            return {}
        if verdict == "plain":
            assert isinstance(self.context.codec, AutoSettings), "only auto watches"
            tables = candidates(self.context.codec, self.layout)
            self.settings = read_settings(
                next(each for each in tables if not CODECS[str(each["name"])].learned)
            )
            name = self.settings.name
            why = f"for {PATIENCE} rounds its error ({error:.3f}) was above the {watch.expected:.3f} of {name}"
        else:
            self.settings = Int8Settings(error_feedback=True)
            why = f"for {PATIENCE} rounds its error ({error:.3f}) was at the bound"
            logger.warning(
                "round %d: the codec no longer carries updates; falling back to int8", round
            )

        was = type(self.codec).__name__.lower()
        self.codec = build(self.settings, self.layout)
        self.version += 1
        self.watch = Watch(watch.expected, learned=False)
        logger.info("auto, round %d: %s instead of %s: %s", round, self.settings.name, was, why)

        return {"choice": f"{self.settings.name} instead of {was}: {why}"}

    def _next_step(self, mean_energy: float) -> Metrics:
        """Steer the step so that codec noise is `noise_ratio` times the sampling noise between
        sites.

        With N sites, energies e_i of decoded updates and codec noises q_i: within = (sum e_i - N
        |mean|^2) / (N - 1) is the variance between sites as decoded; the mean carries signal max(0,
        |mean|^2 - within / N). Noise goes with the square of the step while most coefficients are
        live, so the correction is a square root, damped.
        """
        ratio = self.noise_ratio
        assert ratio is not None
        count = len(self._noise)
        noise = math.fsum(each[0] for each in self._noise) / count
        within = max(
            (math.fsum(each[1] for each in self._noise) - count * mean_energy) / (count - 1), 1e-30
        )
        step = math.exp(math.fsum(math.log(each[2]) for each in self._noise) / count)
        change = math.sqrt(ratio * within / max(noise, 1e-30))
        self.step = step * min(max(change, 2**-0.5), 2**0.5)
        signal = max(0.0, mean_energy - within / count)

        return {
            "codec_noise": noise,
            "sampling_noise": within,
            "aggregate_snr_db": 10 * math.log10(max(signal, 1e-30) / max(noise / count, 1e-30)),
            "step": step,
        }

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> Payload:
        """The codec as it is, who holds it, and what the policy remembers."""
        codec = (
            self.codec.published(decoder=True)
            if isinstance(self.codec, LearnedCodec)
            else Payload()
        )
        values: dict[str, Value] = {
            "settings": self.settings.model_dump(mode="json"),
            "version": self.version,
            "installed": dict(self.installed),
            "step": self.step,
            "watch": None if self.watch is None else asdict(self.watch),
            "seen": [round for round, _ in self._seen],
        }
        seen = join({str(round): Payload(adapter) for round, adapter in self._seen})

        return join(
            {"codec": codec, "seen": Payload(seen.tensors), "policy": Payload(values=values)}
        )

    def restore(self, state: Payload) -> None:
        """See `state`."""
        parts = split(state, ("codec", "seen", "policy"))
        policy = parts["policy"]
        self.settings = read_settings(policy.value("settings", dict))
        self.version, self.installed = policy.value("version", int), policy.value("installed", dict)
        self.step = policy.values["step"]  # type: ignore[assignment]
        watch = policy.values["watch"]
        self.watch = Watch(**watch) if isinstance(watch, dict) else None  # type: ignore[arg-type]
        rounds = policy.value("seen", list)
        self._seen = [
            (
                round,
                {
                    name: parts["seen"].tensors[f"{round}/{name}"]
                    for name in self.context.layout.names
                },
            )
            for round in rounds
        ]

        if isinstance(self.settings, AutoSettings):
            return  # a checkpoint of a run whose set-up did not choose

        kind = CODECS[self.settings.name]
        if issubclass(kind, LearnedCodec):
            self.codec = (
                kind.from_published(self.settings, self.layout, parts["codec"])
                if self.version
                else None
            )
        else:
            self.codec = build(self.settings, self.layout)


def check_codec(codec: CodecSettings, config: TgapConfig, layout: Layout) -> None:
    """Raise `ConfigError` if the codec cannot code `layout`, or has nothing to learn from."""
    name: str = codec.name
    if codec.weighted:
        if (
            isinstance(codec, AutoSettings)
            or config.refit != "no"
            or config.source == "sites-covariance"
        ):
            raise ConfigError(
                "codec.weighted: not with codec 'auto', a refit, or tgap.source='sites-covariance'"
            )

        if isinstance(codec, KltSettings) and codec.noise_ratio is not None:
            raise ConfigError(
                "codec.weighted: noise_ratio compares with unweighted noise; set one of the two"
            )

        scales(
            {each: no_change(shape) for each, shape in layout.shapes} | _partners(layout), layout
        )

    if must_learn(codec) and config.source == "none":
        raise ConfigError(
            f"method.tgap.source='none': codec {name!r} must be trained; choose 'public' or 'sites'"
        )

    if config.source == "sites-covariance":
        _check_moments(codec, layout)
    if isinstance(codec, AutoSettings):
        return

    CODECS[name].frame_size(codec, layout)


def _check_moments(codec: CodecSettings, layout: Layout) -> None:
    """Raise `ConfigError` if second moments cannot fit the codec, or are too many for a message."""
    name: str = codec.name
    if not must_learn(codec):
        raise ConfigError(
            f"method.tgap.source='sites-covariance': codec {name!r} learns nothing, so no moments are needed; choose "
            "'none', or 'sites' to have it measured"
        )

    if not isinstance(codec, AutoSettings) and not issubclass(CODECS[name], MomentCodec):
        raise ConfigError(_needs_updates(codec))

    need = num_bytes(layout)
    most = Limits().max_bytes
    if need > most:
        raise ConfigError(
            f"method.tgap.source='sites-covariance': the moments of one site take {need:,} bytes, over the {most:,} of "
            "a message, because they grow with the square of the layers' width; choose fewer lora.target_modules, or "
            "source 'public' or 'sites'"
        )


def _needs_updates(codec: CodecSettings) -> str:
    able = ", ".join(repr(name) for name, kind in CODECS.items() if issubclass(kind, MomentCodec))
    return (
        f"method.tgap.source='sites-covariance': codec {codec.name!r} learns from updates themselves, which no site "
        f"sends; choose codec.name={able} or 'auto', or source 'public' or 'sites'"
    )


def _partners(layout: Layout) -> Named:
    """Zeros for the factors that sites receive and do not send."""
    swap = {".lora_A.": ".lora_B.", ".lora_B.": ".lora_A."}
    names = [
        name.replace(mark, swap[mark]) for name in layout.names for mark in swap if mark in name
    ]

    return {name: torch.zeros(1) for name in names if name not in layout.names}


def coded_reply(
    site: Site, codec: Codec, update: Named, message: Payload, **values: Value
) -> Payload:
    """A site's answer: the frame of `update`, plain values, and under error feedback the codec's
    error."""
    step = message.number("step", 2.0**-200, 2.0**200) if "step" in message.values else None
    frame = code(site, codec, update, round_of(site, message), step=step)

    if "residual" in site.kept:
        values["e"] = site.recall("residual").value("error", float)

    short = {
        key: float(f"{value:.6g}") if isinstance(value, float) else value
        for key, value in values.items()
    }
    return frame_payload(frame, **short)


def published(codec: Codec, version: int, *, decoder: bool) -> Payload:
    """What a site keeps of its codec: settings, version, and for a learned one what was learned."""
    half = codec.published(decoder=decoder) if isinstance(codec, LearnedCodec) else Payload()
    settings = codec.settings.model_dump(mode="json")
    return Payload(half.tensors, {"settings": settings, "version": version, "learned": half.values})


def window(
    seen: Sequence[tuple[int, Named]], round: int, every: int, layout: Layout
) -> list[Named] | None:
    """Differences of the adapters broadcast in the `every` rounds before `round`; None unless all
    were seen."""
    if [number for number, _ in seen] != list(range(round - every, round + 1)):
        return None
    pairs = itertools.pairwise(
        [{name: adapter[name] for name in layout.names} for _, adapter in seen]
    )
    return [subtract(after, before) for before, after in pairs]


def follow(site: Site, received: Named, message: Payload, layout: Layout) -> Codec | None:
    """The site's half: the codec to answer with; None if the site cannot come to the server's
    version by itself."""
    config: TgapConfig | None = getattr(site.method, "tgap", None)
    codec = site_codec(site, layout)

    if not must_learn(site.codec) or config is None or config.refit != "broadcast":
        return codec

    round = round_of(site, message)
    kept = site.recall("seen")
    adapters = split(kept, tuple(map(str, kept.values)))
    seen = [(int(number), each.tensors) for number, each in adapters.items()]
    seen = [*sorted(seen, key=lambda each: each[0]), (round, received)][-(config.refit_every + 1) :]
    site.keep("seen", join({str(number): Payload(adapter) for number, adapter in seen}))
    wanted = message.whole("codec", 0, 2**31)
    held = site.recall("codec").value("version", int)

    if wanted == held:
        return codec

    updates = window(seen, round, config.refit_every, layout)
    if wanted != held + 1 or updates is None or not isinstance(codec, AdaptiveCodec):
        return None

    refitted: Codec = codec.refit(updates, weight=config.refit_weight)
    site.keep("codec", published(refitted, wanted, decoder=True))
    return refitted


def _measured(codec: Codec, report: GateReport) -> Measured:
    """Errors of a candidate, and what it sends."""
    learned = isinstance(codec, LearnedCodec)
    return Measured(
        codec=codec.settings,
        error=report.errors.all,
        frame_bytes=report.bytes_per_update,
        published_bytes=len(published(codec, 1, decoder=codec.settings.error_feedback).to_bytes())
        if learned
        else 0,
        aggregate_error=report.errors.aggregate,
    )
