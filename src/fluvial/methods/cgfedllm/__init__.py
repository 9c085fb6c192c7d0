"""CG-FedLLM: a client-side encoder and a server-side decoder compress LoRA updates.

Wu, Xu, Zhang, Li, Wu, Liu, "CG-FedLLM: How to Compress Gradients in Federated Fine-tuning for LLMs", ECAI 2025,
https://arxiv.org/abs/2405.13746.

Two stages. TGAP trains an autoencoder on updates collected over sites and rounds. FAF is federated LoRA with the frozen
autoencoder in the uplink: a site sends Enc(update), the server decodes, averages, and broadcasts the adapter. Any codec
can take the autoencoder's place; a gate measures on held-out snapshots whether it carries updates at all.
"""

import math
from functools import partial
from typing import Literal

from pydantic import Field

from fluvial.codecs import CODECS, CodecSettings
from fluvial.codecs.base import Codec, LatentCodec
from fluvial.codecs.resnet import ResNetSettings
from fluvial.errors import ConfigError, DivergenceError
from fluvial.fleet import Fleet, sample
from fluvial.methods.cgfedllm import privacy
from fluvial.methods.cgfedllm.privacy import PrivacyConfig
from fluvial.methods.fedavg import WeightedLoss, step
from fluvial.methods.interface import Context, Method, Metrics
from fluvial.methods.link import STALE, Decoded, Link, check_codec, coded_reply, gate, open_link
from fluvial.methods.link.gate import Representation
from fluvial.methods.link.tgap import TASKS, TgapConfig, after_tgap
from fluvial.models import initial_state
from fluvial.payload import Payload, Value, frame_payload, join, split
from fluvial.replies import weight_of
from fluvial.seeds import generator
from fluvial.settings import Settings
from fluvial.sites import Site, code, train_locally
from fluvial.tensors import Layout, Named, WeightedMean, add, norm


class CgFedLlmConfig(Settings):
    """Defaults are the paper's where it gives them."""

    name: Literal["cgfedllm"] = "cgfedllm"
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort; 0.05 of 100 with Dolly, 1 of 3 with C-Eval and MMLU."""
    server_learning_rate: float = Field(1.0, gt=0, le=4)
    """The server moves by so many mean updates; 1 is FedAvg. Error feedback delays what it repairs, and a little more
    than 1 makes up for that (ours; measured in docs/methods/cgfedllm.md)."""
    representation: Representation = "delta"
    """What is coded: the update, or the whole adapter ("state", the letter of Algorithm 1). Ours: delta, because the
    update is 0.04 % of the state's energy and drowns in the codec's error."""
    tgap: TgapConfig = TgapConfig()
    gate: Literal["refuse", "report"] = "refuse"
    """What happens when the codec fails the gate: stop before the first round, or write it down and go on."""
    privacy: PrivacyConfig | None = None
    max_growth: float = Field(10.0, gt=1)
    """Stop when an aggregate update is this many times longer than the longest before it (spec g.12)."""


class CgFedLlmServer:
    """Keeps the global adapter; the decoder lies in the link's uplink."""

    def __init__(self, config: CgFedLlmConfig, context: Context) -> None:
        self.config, self.context = config, context
        self.adapter = initial_state(context.layout, context.seed)
        self.link = Link(
            context,
            context.layout,
            self.adapter,
            config.tgap,
            representation=config.representation,
            on_refusal=config.gate,
        )
        self.longest = 0.0
        self.rounds_done = 0

    def setup(self, fleet: Fleet) -> Metrics:
        """TGAP: collect snapshots, fit the codec, pass it through the gate, send each site its half."""
        return self.link.setup(fleet, self.config)

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """FAF (C1): cohort, local training, encode; decode, weighted mean, new global adapter."""
        cohort = sample(fleet.sites, self.config.fraction, seed=self.context.seed, round=number)
        mean, loss, weights = WeightedMean(), WeightedLoss(), []
        read = partial(self._read, round=number)
        for reply in self.link.ask(fleet, "train", cohort, self.adapter, round=number, read=read):
            decoded, update, weight, site_loss = reply.content
            mean.add(update, weight)
            loss.add(site_loss, weight)
            weights.append(weight)
            self.link.uplink.fold(reply.site, decoded)
        update = self._private(mean.mean(), max(weights) / sum(weights), number)
        self._guard(norm(update), number)
        self.adapter = add(self.adapter, step(update, self.config))
        self.rounds_done += 1
        metrics: Metrics = {"loss": loss.mean(), "sites": mean.count, "update_norm": norm(update)}
        metrics |= self.link.uplink.close(update, number)
        if self.config.privacy:
            multiplier = self.config.privacy.multiplier(self.context.rounds)
            delta = self.config.privacy.delta
            metrics |= {"epsilon": privacy.spent(multiplier, self.rounds_done, delta), "delta": delta}
        return metrics

    def _read(self, reply: Payload, round: int) -> tuple[Decoded, Named, int, float]:
        weight = weight_of(reply)
        decoded = self.link.uplink.decode(reply, round)
        update = gate.innovation(self.link.sent, decoded.update, self.config.representation)
        if self.config.privacy and self.config.privacy.placement == "aggregate":
            update = privacy.clip(update, self.config.privacy.clip_norm)  # decoding may have made it longer
        WeightedMean.check(update, weight)
        return decoded, update, weight, reply.value("loss", float)

    def _private(self, update: Named, largest_share: float, number: int) -> Named:
        config = self.config.privacy
        if config is None or config.placement != "aggregate":
            return update
        std = privacy.noise_std(config, config.multiplier(self.context.rounds), largest_share)
        return privacy.disturb(update, std, generator(self.context.seed, "privacy", number))

    def _guard(self, length: float, number: int) -> None:
        if not math.isfinite(length) or (self.longest > 0 and length > self.config.max_growth * self.longest):
            raise DivergenceError(
                f"round {number}: the aggregate update has norm {length:.4g}, over method.max_growth="
                f"{self.config.max_growth:g} times the longest before ({self.longest:.4g}); the codec or the learning "
                "rate makes training diverge. The last checkpoint is intact"
            )
        self.longest = max(self.longest, length)

    def model(self) -> Named:
        """The global adapter."""
        return self.adapter

    def state(self) -> Payload:
        """Adapter, codec and downlink, and what the guard and the accountant remember."""
        values: dict[str, Value] = {"longest": self.longest, "rounds_done": self.rounds_done}
        return join({"adapter": Payload(self.adapter, values), "link": self.link.state()})

    def restore(self, state: Payload) -> None:
        """See `state`."""
        parts = split(state, ("adapter", "link"))
        adapter = parts["adapter"]
        self.context.layout.check(adapter.tensors, "checkpoint")
        self.adapter = adapter.tensors
        self.longest, self.rounds_done = adapter.value("longest", float), adapter.value("rounds_done", int)
        self.link.restore(parts["link"])


def train(site: Site, message: Payload) -> Payload:
    """Task: tune the received adapter on D2, encode the update (or the state), send the frame."""
    config: CgFedLlmConfig = site.method
    opened = open_link(site, message, site.layout)
    if opened is None:
        return STALE
    received, codec = opened
    examples, round = after_tgap(site.load().train, config.tgap), message.value("round", int)
    update, report = train_locally(site, received, round, examples=examples)
    if config.privacy:
        frame = _private_frame(site, config, codec, update, round)
        return frame_payload(frame, n=len(examples), loss=report.loss)
    coded = gate.coded_object(received, update, config.representation)
    return coded_reply(site, codec, coded, message, n=len(examples), loss=report.loss)


def _private_frame(site: Site, config: CgFedLlmConfig, codec: Codec, update: Named, round: int) -> bytes:
    """The frame of a clipped update, with noise where the site is to add it."""
    assert config.privacy is not None
    clip_norm, random = config.privacy.clip_norm, generator(site.seed, "privacy", round, site.name)
    multiplier = config.privacy.multiplier(site.rounds)
    if config.privacy.placement == "latent":
        assert isinstance(codec, LatentCodec)
        vector = codec.layout.flatten(update)
        latent = privacy.release_latent(codec.analyse(vector), clip_norm, multiplier, random)
        return codec.seal(codec.pack(latent, vector), round=round)
    update = privacy.clip(update, clip_norm)
    if config.privacy.placement == "update":
        update = privacy.disturb(update, privacy.noise_std(config.privacy, multiplier), random)
    return code(site, codec, update, round)


def check(config: CgFedLlmConfig, codec: CodecSettings, layout: Layout) -> None:
    """Refuse settings that cannot work together."""
    name: str = codec.name
    check_codec(codec, config.tgap, layout)
    if config.representation == "state" and codec.error_feedback:
        raise ConfigError(
            "codec.error_feedback: the residual of a whole adapter means nothing; use representation='delta'"
        )
    if codec.weighted and (config.privacy or config.representation == "state"):
        raise ConfigError("codec.weighted: scales updates only, and not where they are clipped; remove it")
    if config.privacy:
        if codec.error_feedback:
            raise ConfigError(
                "codec.error_feedback: it would send later what clipping and noise took away; switch one off"
            )
        if config.representation == "state":
            raise ConfigError("method.privacy: clipping a whole adapter would destroy it; use representation='delta'")
        if config.privacy.placement == "latent" and not issubclass(CODECS.get(name, Codec), LatentCodec):
            raise ConfigError(f"method.privacy.placement='latent': codec {name!r} has no latent; use 'resnet' or 'klt'")


METHOD = Method(
    CgFedLlmConfig,
    CgFedLlmServer,
    {"train": train, **TASKS},
    paper="Wu et al., CG-FedLLM: How to Compress Gradients in Federated Fine-tuning for LLMs, ECAI 2025, "
    "https://arxiv.org/abs/2405.13746",
    codec=ResNetSettings(),
    reads_public=lambda config, _codec: config.tgap.source == "public",
    check=check,
)
