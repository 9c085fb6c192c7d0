"""CG-FedLLM: a client-side encoder and a server-side decoder compress LoRA updates.

Wu, Xu, Zhang, Li, Wu, Liu, "CG-FedLLM: How to Compress Gradients in Federated Fine-tuning for
LLMs", ECAI 2025, https://arxiv.org/abs/2405.13746.

Two stages. TGAP trains an autoencoder on updates collected over sites and rounds. FAF is federated
LoRA with the frozen autoencoder in the uplink: a site sends Enc(update), the server decodes,
averages, and broadcasts the adapter. Any codec can take the autoencoder's place; a gate measures on
held-out snapshots whether it carries updates at all.

Its task `train` sees stale messages and the codec, which `exchange.shared` hides for other methods:
under differential privacy the noise is put on the latent, between the codec's analysis and its
packing, and the site then sends a frame and nothing else.
"""

import logging
import math
from functools import partial

from fluvial.codecs import CODECS, CodecSettings, must_learn
from fluvial.codecs.auto import AutoSettings
from fluvial.codecs.base import Codec, LatentCodec
from fluvial.codecs.learned.resnet import ResNetSettings
from fluvial.errors import ConfigError, DivergenceError, WireError
from fluvial.exchange import (
    LocalUpdate,
    Rule,
    Terms,
    check_codec,
    check_fixed_rate,
    check_refit,
    receive_exchange,
    shared_tasks,
)
from fluvial.federation.aggregate import Aggregate
from fluvial.federation.boundary import outward
from fluvial.federation.cohort import sample
from fluvial.federation.epsilon import epsilon_of
from fluvial.federation.fleet import Fleet
from fluvial.federation.sites import Site, train_locally
from fluvial.methods.aggregating import (
    SharedAdapter,
    check_aggregation,
    side_download,
)
from fluvial.methods.cgfedllm import privacy
from fluvial.methods.cgfedllm.config import CgFedLlmConfig
from fluvial.methods.cgfedllm.privacy import PrivacyConfig
from fluvial.methods.interface import (
    Context,
    Given,
    Method,
    Metrics,
    Plan,
    Traits,
)
from fluvial.methods.planning import coded, shared_idle
from fluvial.methods.shared import SharedModelServer
from fluvial.models.assignment import Assignment
from fluvial.seeds import derive
from fluvial.wire.payload import Payload, Value, frame_payload, join, split
from fluvial.wire.tensors import Layout, Named, norm

logger = logging.getLogger(__name__)


def terms(config: CgFedLlmConfig, codec: CodecSettings) -> Terms:  # noqa: ARG001 - for any codec
    """Return what server and sites agree on."""
    return Terms(config.tgap, representation=config.representation, basis=config.aggregation.basis)


class CgFedLlmServer(SharedModelServer):
    """Server half: the global adapter, a guard against divergence, and the accountant."""

    def __init__(self, config: CgFedLlmConfig, context: Context) -> None:
        self.config = config
        self.context = context
        self.shared = SharedAdapter(
            config.aggregation,
            context,
            terms(config, context.codec),
            on_refusal=config.gate,
            rule=rule(config.privacy),
            momentum=config.server_momentum,
            ema_decay=config.ema_decay,
        )
        self.longest = 0.0
        self.rounds_done = 0

    def setup(self, fleet: Fleet) -> Metrics:
        """Run TGAP: collect snapshots, fit the codec, pass it through the gate, install it."""
        return self.shared.exchange.setup(fleet)

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Run one round of FAF (C1): cohort, local training, encode; decode, weighted mean."""
        config = self.config
        cohort = sample(fleet.sites, config.fraction, seed=self.context.seed, round=number)
        aggregate = Aggregate()
        for update in self.shared.updates(fleet, cohort, round=number):
            aggregate.add(update)

        largest_share = max(aggregate.weights) / sum(aggregate.weights)
        mean = self._private(aggregate.mean(), largest_share, number)
        self._guard(norm(mean), number)
        measures = self.shared.step(mean, config.server_learning_rate, round=number)
        self.rounds_done += 1
        metrics = {**aggregate.metrics(mean), **measures}

        if config.privacy:
            multiplier = config.privacy.multiplier(self.context.rounds)
            delta = config.privacy.delta
            epsilon = epsilon_of(multiplier, self.rounds_done, delta)
            metrics |= {"epsilon": epsilon, "delta": delta}

        return metrics

    def _private(self, update: Named, largest_share: float, number: int) -> Named:
        """Return the mean update, with noise where the server adds it."""
        config = self.config.privacy
        if config is None or config.placement != "aggregate":
            return update
        std = privacy.noise_std(config, config.multiplier(self.context.rounds), largest_share)
        return privacy.disturb_mean(update, std, self.context.secret(), number)

    def _guard(self, length: float, number: int) -> None:
        """Raise `DivergenceError` for an aggregate update that is far longer than those before."""
        most = self.config.max_growth * self.longest
        if not math.isfinite(length) or (self.longest > 0 and length > most):
            raise DivergenceError(
                f"round {number}: the aggregate update has norm {length:.4g}, over "
                f"method.max_growth={self.config.max_growth:g} times the longest before "
                f"({self.longest:.4g}); the codec or the learning rate makes training diverge. The "
                "last checkpoint is intact"
            )

        self.longest = max(self.longest, length)

    def model(self) -> Named:
        """Return the global adapter."""
        return self.shared.model()

    @property
    def assigned(self) -> Assignment | None:
        """See `SharedModelServer`."""
        return self.shared.exported

    def state(self) -> Payload:
        """Return the adapter, and what exchange, guard and accountant remember."""
        values: dict[str, Value] = {"longest": self.longest, "rounds_done": self.rounds_done}
        return join({"shared": self.shared.state(), "seen": Payload(values=values)})

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        halves = split(state, ("shared", "seen"))
        self.shared.restore(halves["shared"])
        self.longest = halves["seen"].value("longest", float)
        self.rounds_done = halves["seen"].value("rounds_done", int)


def rule(config: PrivacyConfig | None) -> Rule:
    """Return how replies are read, so that nothing counts beyond what epsilon counts."""
    if config is None:
        return Rule()
    if config.at_site:
        return Rule(frame_only=True, bounded=False)

    clip = None
    if config.placement == "aggregate":  # decoding may have made an update longer
        clip = partial(privacy.clip, clip_norm=config.clip_norm)
    return Rule(clip=clip, bounded=False, compared=False)


def train(site: Site, message: Payload) -> Payload:
    """Tune the received adapter on D2, encode the update (or the state), send the frame."""
    config: CgFedLlmConfig = site.method
    received = receive_exchange(site, message, terms(config, site.codec))
    if isinstance(received, Payload):
        return received
    if config.privacy and config.privacy.at_site:
        return _train_in_private(
            site, config.privacy, received.round, received.adapter, received.codec
        )

    examples = received.examples(site)
    update, report = train_locally(site, received.adapter, received.round, examples=examples)
    if config.privacy:
        update = privacy.clip(update, config.privacy.clip_norm)

    return received.reply(site, LocalUpdate(update, len(examples), report.loss))


def _train_in_private(
    site: Site,
    config: PrivacyConfig,
    round: int,
    received: Named,
    codec: Codec,
) -> Payload:
    """Return the frame of a clipped and disturbed update or latent, and nothing else."""
    try:
        update, _ = train_locally(site, received, round, examples=site.load().train)
    except Exception as problem:  # settings may fail on some records: a refusal would tell on which
        outward(problem, site.store.errors(site.name), site=site.name, round=round, task="train")
        logger.warning("site %s, round %d: noise alone leaves", site.name, round)
        update = privacy.zero(received)

    vector = site.layout.flatten(update)
    release = partial(privacy.release, site, config, round=round, received=received)
    if config.placement == "update":
        noisy = site.layout.unflatten(release(vector, codec=Payload()))
        seed = derive(site.seed, "codec", round, site.name)
        return frame_payload(codec.encode(noisy, seed=seed, round=round))

    if not isinstance(codec, LatentCodec) or codec.side_size(codec.settings, codec.layout):
        raise WireError("train: the installed codec tells of the update beside its latent")

    latent = release(codec.analyse(vector), codec=site.recall("codec"))
    return frame_payload(codec.seal(codec.pack(latent), round=round))


def plan(config: CgFedLlmConfig, given: Given) -> Plan:
    """Refuse settings that cannot work together; note what epsilon leaves out."""
    _check(config, given.codec, given.layout)
    check_refit(given.codec, config.tgap, given.rounds)
    check_aggregation(config.aggregation, given, broadcast=config.tgap.refit == "broadcast")
    exact = config.privacy is not None and config.privacy.heldout == "exact"

    download = side_download(config.aggregation, given)
    forecast = partial(
        coded,
        config,
        given,
        given.layout,
        frame_only=config.privacy is not None and config.privacy.at_site,
        version=must_learn(given.codec) and config.tgap.refit == "broadcast",
        download=download,
        measured=given.layout if download is None else None,
    )
    return Plan(
        given.layout,
        forecast,
        notes=[f"method.privacy.heldout='exact': {privacy.OUTSIDE}"] if exact else [],
        reads_public=config.tgap.source == "public",
        idle=_idle(config, given),
        later=_later(given),
    )


def _idle(config: CgFedLlmConfig, given: Given) -> dict[str, str]:
    """Return the settings that cannot change this run, and why."""
    idle = shared_idle(config, given, collects=config.tgap.from_sites)
    if given.codec.without_bias and not must_learn(given.codec):
        idle["method.gate"] = (
            f"codec {given.codec.name!r} has no bias, so the gate never refuses it"
        )
    return idle


def _later(given: Given) -> dict[str, str]:
    """Return the settings that act only in later rounds than the run has, and why."""
    if given.rounds > 1:
        return {}
    return {"method.max_growth": "the run has 1 round, and no update is before its update"}


def _check(config: CgFedLlmConfig, codec: CodecSettings, layout: Layout) -> None:
    """Raise `ConfigError` for settings that cannot work together."""
    check_codec(codec, config.tgap, layout)
    if config.representation == "state" and codec.error_feedback:
        raise ConfigError(
            "codec.error_feedback: the residual of a whole adapter means nothing; use "
            "representation='delta'"
        )

    if config.representation == "state":
        check_fixed_rate(codec, "errors of a whole adapter say nothing about those of its change")

    if codec.weighted and (config.privacy or config.representation == "state"):
        raise ConfigError(
            "codec.weighted: scales updates only, and not where they are clipped; remove it"
        )

    if config.privacy:
        _check_privacy(config, config.privacy, codec, layout)


def _check_privacy(
    config: CgFedLlmConfig,
    promised: PrivacyConfig,
    codec: CodecSettings,
    layout: Layout,
) -> None:
    """Refuse whatever would let something leave that epsilon does not count."""
    if codec.error_feedback:
        raise ConfigError(
            "codec.error_feedback: it would send later what clipping and noise took away; switch "
            "one off"
        )

    if config.representation == "state":
        raise ConfigError(
            "method.privacy: clipping a whole adapter would destroy it; use representation='delta'"
        )

    if config.tgap.source not in ("public", "none"):
        raw = config.tgap.source == "sites"
        what = "undisturbed updates" if raw else "moments and measures of undisturbed updates"
        raise ConfigError(
            f"method.tgap.source={config.tgap.source!r}: {what} would leave the sites, which "
            "method.privacy does not count; choose 'public', or 'none' with a codec that learns "
            "nothing"
        )

    check_fixed_rate(codec, "method.privacy lets no error of undisturbed updates leave the sites")

    if promised.placement == "aggregate" and config.tgap.refit == "decoded":
        raise ConfigError(
            "method.tgap.refit='decoded': the codec would be fitted to undisturbed updates and "
            "sent to all sites, which method.privacy does not count; choose 'broadcast' or 'no'"
        )

    if promised.placement == "latent":
        _check_latent(codec, layout)


def _check_latent(codec: CodecSettings, layout: Layout) -> None:
    """Refuse a codec without latent, or with side information that is not of the latent."""
    name: str = codec.name
    kind = None if isinstance(codec, AutoSettings) else CODECS[name]

    if kind is None or not issubclass(kind, LatentCodec):
        raise ConfigError(
            f"method.privacy.placement='latent': codec {name!r} has no latent; use 'resnet' or "
            "'klt'"
        )

    if kind.side_size(codec, layout):
        bare = "set codec.normalise='none', " if name == "resnet" else ""
        raise ConfigError(
            f"method.privacy.placement='latent': codec {name!r} sends scales of the undisturbed "
            f"update beside its latent, which epsilon does not count; {bare}use codec 'klt', or "
            "choose placement='update'"
        )


METHOD = Method(
    CgFedLlmConfig,
    CgFedLlmServer,
    shared_tasks(train, terms),
    paper="Wu et al., CG-FedLLM: How to Compress Gradients in Federated Fine-tuning for LLMs, "
    "ECAI 2025, https://arxiv.org/abs/2405.13746",
    plan=plan,
    traits=Traits(
        "CG-FedLLM", codec=ResNetSettings(), receives="downlink", weighted=True, budget=True
    ),
)
