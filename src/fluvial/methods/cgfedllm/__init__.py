"""CG-FedLLM: a client-side encoder and a server-side decoder compress LoRA updates.

Wu, Xu, Zhang, Li, Wu, Liu, "CG-FedLLM: How to Compress Gradients in Federated Fine-tuning for LLMs", ECAI 2025,
https://arxiv.org/abs/2405.13746.

Two stages. TGAP trains an autoencoder on updates collected over sites and rounds. FAF is federated LoRA with the frozen
autoencoder in the uplink: a site sends Enc(update), the server decodes, averages, and broadcasts the adapter. Any codec
can take the autoencoder's place; a gate measures on held-out snapshots whether it carries updates at all.
"""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fluvial.codecs import CODECS, CodecSettings, build
from fluvial.codecs.base import Codec, LatentCodec, LearnedCodec
from fluvial.codecs.resnet import ResNetSettings
from fluvial.errors import ConfigError, DivergenceError, GateError
from fluvial.fleet import Fleet, sample
from fluvial.methods.cgfedllm import gate, privacy, tgap
from fluvial.methods.cgfedllm.gate import GateReport, Representation
from fluvial.methods.cgfedllm.privacy import PrivacyConfig
from fluvial.methods.cgfedllm.tgap import TgapConfig
from fluvial.methods.fedavg import WeightedLoss
from fluvial.methods.interface import Context, Method, Metrics
from fluvial.models import initial_adapter
from fluvial.payload import Payload, frame_payload, payload_frame
from fluvial.seeds import derive, generator
from fluvial.sites import (
    Site,
    adapter_message,
    code,
    read_adapter_message,
    site_codec,
    train_locally,
    weight_of,
)
from fluvial.tensors import Layout, Named, WeightedMean, add, norm


class CgFedLlmConfig(BaseModel):
    """Defaults are the paper's where it gives them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["cgfedllm"] = "cgfedllm"
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort; 0.05 of 100 with Dolly, 1 of 3 with C-Eval and MMLU."""
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
    """Keeps the global adapter and the decoder."""

    def __init__(self, config: CgFedLlmConfig, context: Context) -> None:
        self.config, self.context = config, context
        self.adapter = initial_adapter(context.layout, context.seed)
        self.kind = CODECS[context.codec.name]
        self.codec: Codec | None = None if self.kind.learned else build(context.codec, context.layout)
        self.longest = 0.0
        self.rounds_done = 0

    # -- TGAP ---------------------------------------------------------------------------------------------------

    def setup(self, fleet: Fleet) -> Metrics:
        """Collect snapshots, fit the codec, pass it through the gate, send each site its half."""
        config = self.config.tgap
        if config.source == "none":
            return {"gate": None}
        ensemble = tgap.simulated_fleet(config, self.context, self.config) if config.source == "public" else fleet
        snapshots = tgap.collect(config, ensemble, self.context.layout, self.context.seed)
        training, heldout = tgap.split_by_time(snapshots, config.holdout)
        metrics: Metrics = {"snapshots": len(snapshots)}
        if issubclass(self.kind, LearnedCodec):
            objects = [gate.coded_object(s.received, s.update, self.config.representation) for s in training]
            seed = derive(self.context.seed, "codec fit")
            self.codec = self.kind.fit(self.context.codec, self.context.layout, objects, seed=seed)
            metrics["loss_curve"] = [list(point) for point in getattr(self.codec, "loss_curve", [])]
        assert self.codec is not None
        report = gate.measure(self.codec, training, heldout, self.config.representation)
        self._judge(report)
        if isinstance(self.codec, LearnedCodec):
            # Only error feedback makes a site decode, so only then does it download the decoder.
            half = self.codec.published(decoder=self.context.codec.error_feedback)
            for _ in fleet.ask("install", dict.fromkeys(fleet.sites, half), round=0, read=lambda reply: reply):
                pass
        return {**metrics, "gate": report.values()}

    def _judge(self, report: GateReport) -> None:
        name: str = self.context.codec.name
        if self.context.codec.error_feedback and not report.contraction < 1:
            raise GateError(
                f"codec {name!r} with error feedback: the error is up to {report.contraction:.3f} of the update's norm "
                "on held-out snapshots, so residuals would grow without bound; set codec.error_feedback=false",
                report.values(),
            )
        if report.failed and self.config.gate == "refuse":
            raise GateError(gate.explain(report, name), report.values())

    # -- FAF ----------------------------------------------------------------------------------------------------

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """C1: cohort, local training, encode; decode, weighted mean, new global adapter."""
        assert self.codec is not None, "setup comes first"
        cohort = sample(fleet.sites, self.config.fraction, seed=self.context.seed, round=number)
        message = adapter_message(self.adapter, round=number)
        mean, loss = WeightedMean(), WeightedLoss()
        weights, errors = [], {}
        messages = dict.fromkeys(cohort, message)
        for reply in fleet.ask("train", messages, round=number, read=lambda reply: self._read(reply, number)):
            update, weight, site_loss, error = reply.content
            mean.add(update, weight)
            loss.add(site_loss, weight)
            weights.append(weight)
            if error is not None:
                errors[reply.site] = error
        update = self._private(mean.mean(), max(weights) / sum(weights), number)
        self._guard(norm(update), number)
        self.adapter = add(self.adapter, update)
        self.rounds_done += 1
        metrics: Metrics = {"loss": loss.mean(), "sites": mean.count, "update_norm": norm(update)}
        if errors:
            error = math.fsum(errors.values()) / len(errors)
            metrics |= {"codec_error": error, "snr_db": -10 * math.log10(max(error, 1e-30))}
        if self.config.privacy:
            multiplier = self.config.privacy.multiplier(self.context.rounds)
            delta = self.config.privacy.delta
            metrics |= {"epsilon": privacy.spent(multiplier, self.rounds_done, delta), "delta": delta}
        return metrics

    def _read(self, reply: Payload, round: int) -> tuple[Named, int, float, float | None]:
        assert self.codec is not None
        weight = weight_of(reply)
        decoded = self.codec.decode(payload_frame(reply), round=round)
        update = gate.innovation(self.adapter, decoded, self.config.representation)
        if self.config.privacy and self.config.privacy.placement == "aggregate":
            update = privacy.clip(update, self.config.privacy.clip_norm)  # decoding may have made it longer
        WeightedMean.check(update, weight)
        error = reply.value("e", float) if "e" in reply.values else None
        return update, weight, reply.value("loss", float), error

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

    # -- state --------------------------------------------------------------------------------------------------

    def model(self) -> Named:
        """The global adapter."""
        return self.adapter

    def state(self) -> Payload:
        """Adapter, codec, and what the guard and the accountant remember."""
        tensors = {f"adapter/{name}": tensor for name, tensor in self.adapter.items()}
        values: dict[str, Any] = {"longest": self.longest, "rounds_done": self.rounds_done, "codec": {}}
        if isinstance(self.codec, LearnedCodec):
            published = self.codec.published(decoder=True)
            tensors |= {f"codec/{name}": tensor for name, tensor in published.tensors.items()}
            values["codec"] = published.values
        return Payload(tensors, values)

    def restore(self, state: Payload) -> None:
        """See `state`."""
        adapter = {name.removeprefix("adapter/"): t for name, t in state.tensors.items() if name.startswith("adapter/")}
        self.context.layout.check(adapter, "checkpoint")
        self.adapter = adapter
        self.longest, self.rounds_done = state.value("longest", float), state.value("rounds_done", int)
        if issubclass(self.kind, LearnedCodec):
            published = {
                name.removeprefix("codec/"): t for name, t in state.tensors.items() if name.startswith("codec/")
            }
            payload = Payload(published, state.value("codec", dict))
            self.codec = self.kind.from_published(self.context.codec, self.context.layout, payload)


def train(site: Site, message: Payload) -> Payload:
    """Task: tune the received adapter on D2, encode the update (or the state), send the frame."""
    config: CgFedLlmConfig = site.method
    round = message.value("round", int)
    received = read_adapter_message(message, site.layout)
    data = site.load().train
    examples = second_part_of(data, config.tgap)
    update, report = train_locally(site, received, round, examples=examples)
    codec = site_codec(site, site.layout)
    values: dict[str, Any] = {"n": len(examples), "loss": report.loss}
    if config.privacy:
        frame = _private_frame(site, config, codec, update, round)
    else:
        frame = code(site, codec, gate.coded_object(received, update, config.representation), round)
        if "residual" in site.kept:
            values["e"] = site.kept["residual"].value("error", float)
    return frame_payload(frame, **values)


def second_part_of(examples: Any, config: TgapConfig) -> Any:
    """What FAF trains on: D2 where TGAP took D1 from the sites, else everything."""
    return tgap.second_part(examples, config.share) if config.source == "sites" else examples


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
    kind = CODECS[name]
    if kind.learned and config.tgap.source == "none":
        raise ConfigError(f"method.tgap.source='none': codec {name!r} must be trained; choose 'public' or 'sites'")
    if config.representation == "state" and codec.error_feedback:
        raise ConfigError(
            "codec.error_feedback: the residual of a whole adapter means nothing; use representation='delta'"
        )
    if config.privacy:
        if codec.error_feedback:
            raise ConfigError(
                "codec.error_feedback: it would send later what clipping and noise took away; switch one off"
            )
        if config.representation == "state":
            raise ConfigError("method.privacy: clipping a whole adapter would destroy it; use representation='delta'")
        if config.privacy.placement == "latent" and not issubclass(kind, LatentCodec):
            raise ConfigError(
                f"method.privacy.placement='latent': codec {name!r} has no latent; use 'resnet' or 'linear'"
            )
    if issubclass(kind, LearnedCodec):
        kind.frame_size(codec, layout)
    else:
        build(codec, layout)


METHOD = Method(
    CgFedLlmConfig,
    CgFedLlmServer,
    {"train": train, "snapshot": tgap.snapshot},
    paper="Wu et al., CG-FedLLM: How to Compress Gradients in Federated Fine-tuning for LLMs, ECAI 2025, "
    "https://arxiv.org/abs/2405.13746",
    codec=ResNetSettings(),
    reads_public=lambda config: config.tgap.source == "public",
    check=check,
)
