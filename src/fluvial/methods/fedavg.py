"""FedAvg over LoRA adapters (FedIT), and FFA-LoRA.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
https://arxiv.org/abs/2305.05644; Sun et al., "Improving LoRA in Privacy-preserving Federated Learning" (FFA-LoRA),
ICLR 2024, https://arxiv.org/abs/2403.12313.

In every round a cohort of sites receives the global adapter, tunes it on its own data and sends back the difference.
The server adds the sample-weighted mean of the differences. FedIT averages A and B apart, which is not the mean of
their products; FFA-LoRA freezes A at its shared random start, so that the mean is exact and half the bytes are sent.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fluvial.codecs import CodecSettings, build
from fluvial.fleet import Fleet, sample
from fluvial.methods.interface import Context, Method, Metrics
from fluvial.models import initial_adapter
from fluvial.payload import Payload, frame_payload
from fluvial.sites import (
    Factors,
    Site,
    adapter_message,
    code,
    part,
    read_adapter_message,
    read_update,
    refuse_learned,
    site_codec,
    train_locally,
)
from fluvial.tensors import Layout, Named, WeightedMean, add, norm


class FedAvgConfig(BaseModel):
    """FedIT; FFA-LoRA with `factors = "B"`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["fedavg"] = "fedavg"
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort; FedIT uses 0.05 of 100."""
    factors: Factors = "A and B"
    """What is tuned and sent: both factors (FedIT), or B with A frozen (FFA-LoRA)."""


class CentralConfig(BaseModel):
    """All data at one place: what federated training would be without its constraint.

    `train.max_steps`, if set, is multiplied by the number of sites, so that as many sequences are seen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["central"] = "central"
    factors: Factors = "A and B"


class FedAvgServer:
    """Keeps the global adapter."""

    def __init__(self, config: FedAvgConfig | CentralConfig, context: Context) -> None:
        self.config, self.context = config, context
        self.adapter = initial_adapter(context.layout, context.seed)
        self.codec = build(context.codec, part(context.layout, config.factors))

    def setup(self, fleet: Fleet) -> Metrics:  # noqa: ARG002 - nothing to agree on
        """Nothing: the initial adapter follows from the seed."""
        return {}

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Cohort, local training, weighted mean of the differences."""
        fraction = self.config.fraction if isinstance(self.config, FedAvgConfig) else 1.0
        cohort = sample(fleet.sites, fraction, seed=self.context.seed, round=number)
        message = adapter_message(self.adapter, round=number)
        mean, loss = WeightedMean(), WeightedLoss()
        messages = dict.fromkeys(cohort, message)
        for reply in fleet.ask("train", messages, round=number, read=lambda reply: self._read(reply, number)):
            update, weight, site_loss = reply.content
            mean.add(update, weight)
            loss.add(site_loss, weight)
        update = mean.mean()
        self.adapter = {**self.adapter, **add({name: self.adapter[name] for name in update}, update)}
        return {"loss": loss.mean(), "sites": mean.count, "update_norm": norm(update)}

    def _read(self, reply: Payload, round: int) -> tuple[Named, int, float]:
        update, weight = read_update(reply, self.codec, round)
        return update, weight, reply.value("loss", float)

    def model(self) -> Named:
        """The global adapter."""
        return self.adapter

    def state(self) -> Payload:
        """The adapter is all."""
        return Payload(self.adapter)

    def restore(self, state: Payload) -> None:
        """See `state`."""
        self.context.layout.check(state.tensors, "checkpoint")
        self.adapter = state.tensors


class WeightedLoss:
    """Weighted mean of the sites' losses, the same in any order: terms are rounded to 2^-40 and summed exactly."""

    def __init__(self) -> None:
        self._sum, self._weight = 0, 0

    def add(self, loss: float, weight: int) -> None:
        """Fold one site in."""
        self._sum, self._weight = self._sum + round(loss * 2**40) * weight, self._weight + weight

    def mean(self) -> float:
        """Nats per label token."""
        return self._sum / self._weight / 2**40


def train(site: Site, message: Payload) -> Payload:
    """Task: tune the received adapter on the site's data; the coded difference goes back."""
    config: Any = site.method
    round = message.value("round", int)
    examples = site.load().train
    received = read_adapter_message(message, site.layout)
    update, report = train_locally(site, received, round, examples=examples, factors=config.factors)
    codec = site_codec(site, part(site.layout, config.factors))
    return frame_payload(code(site, codec, update, round), n=len(examples), loss=report.loss)


def check(config: FedAvgConfig, codec: CodecSettings, layout: Layout) -> None:
    """FedAvg has no pre-training stage, so a codec that learns has nothing to learn from."""
    refuse_learned(codec, config.name)
    build(codec, part(layout, config.factors))


METHOD = Method(
    FedAvgConfig,
    FedAvgServer,
    {"train": train},
    paper="Zhang et al., Towards Building the Federated GPT (FedIT), ICASSP 2024, https://arxiv.org/abs/2305.05644",
    check=check,
)
CENTRAL = Method(
    CentralConfig,
    FedAvgServer,
    {"train": train},
    paper="The centralised baseline: the same steps on the union of the data",
    coded=False,
    pooled=True,
)
