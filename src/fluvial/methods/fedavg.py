"""FedAvg over LoRA adapters (FedIT), and FFA-LoRA.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
https://arxiv.org/abs/2305.05644; Sun et al., "Improving LoRA in Privacy-preserving Federated
Learning" (FFA-LoRA), ICLR 2024, https://arxiv.org/abs/2403.12313.

In every round a cohort of sites receives the global adapter, tunes it on its own data and sends
back the difference. The server adds the sample-weighted mean of the differences. FedIT averages A
and B apart, which is not the mean of their products; FFA-LoRA freezes A at its shared random start,
so that the mean is exact and half the bytes are sent.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pydantic import Field

from fluvial.codecs import must_learn
from fluvial.errors import ConfigError
from fluvial.exchange import STALE, Decoded, Link, check_codec, coded_reply, open_link
from fluvial.exchange.tgap import NO_TGAP, TASKS, TgapConfig, after_tgap
from fluvial.federation.bounds import Cohort, check_update
from fluvial.federation.fleet import Fleet, sample
from fluvial.federation.replies import FRAME, fields, loss_of, weight_of
from fluvial.federation.sites import Factors, Site, part, round_of, train_locally
from fluvial.methods.interface import (
    Context,
    Given,
    Method,
    MethodSettings,
    Metrics,
    Plan,
    SampledSettings,
    Traits,
)
from fluvial.methods.planning import coded, uncoded
from fluvial.models.states import initial_state
from fluvial.wire.payload import Payload, join, split
from fluvial.wire.tensors import Layout, Named, WeightedMean, moved, norm, scale


class FedAvgConfig(SampledSettings):
    """FedIT; FFA-LoRA with `factors = "B"`."""

    name: Literal["fedavg"] = "fedavg"
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort; FedIT uses 0.05 of 100."""
    factors: Factors = "A and B"
    """What is tuned and sent: both factors (FedIT), or B with A frozen (FFA-LoRA)."""
    server_learning_rate: float = Field(1.0, gt=0, le=4)
    """The server moves by so many mean updates; 1 is FedAvg. Error feedback delays what it repairs,
    and a little more than 1 makes up for that (ours; measured in docs/methods/cgfedllm.md)."""
    tgap: TgapConfig = TgapConfig(source="public")
    """How a codec that learns is pre-trained; without effect for the others."""


class CentralConfig(MethodSettings):
    """All data at one place: what federated training would be without its constraint.

    `train.max_steps`, if set, is multiplied by the number of sites, so that as many sequences are
    seen.
    """

    name: Literal["central"] = "central"
    factors: Factors = "A and B"


@dataclass(frozen=True)
class Content:
    """One reply of a site, read and checked."""

    decoded: Decoded
    weight: int
    loss: float


class FedAvgServer:
    """Keeps the global adapter."""

    def __init__(self, config: FedAvgConfig | CentralConfig, context: Context) -> None:
        self.config = config
        self.context = context
        self.adapter = initial_state(context.layout, context.seed)
        self.layout = part(context.layout, config.factors)
        tgap = (
            config.tgap
            if isinstance(config, FedAvgConfig) and must_learn(context.codec)
            else NO_TGAP
        )
        self.link = Link(context, self.layout, self.adapter, tgap)

    def setup(self, fleet: Fleet) -> Metrics:
        """The initial adapter follows from the seed; a codec that learns is fitted and
        installed."""
        return self.link.setup(fleet, self.config) if must_learn(self.context.codec) else {}

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Cohort, local training, weighted mean of the differences."""
        fraction = self.config.fraction if isinstance(self.config, FedAvgConfig) else 1.0
        cohort = sample(fleet.sites, fraction, seed=self.context.seed, round=number)
        mean = WeightedMean()
        loss = WeightedLoss()
        replies = Cohort(fleet, "train", number, asked=len(cohort))

        def fold(weight: int, *, site: str, content: Content) -> None:
            mean.add(content.decoded.update, weight)
            loss.add(content.loss, weight)
            self.link.uplink.fold(site, content.decoded)

        read = partial(self._read, round=number)
        for reply in self.link.ask(fleet, "train", cohort, self.adapter, round=number, read=read):
            found = reply.content
            then = partial(fold, site=reply.site, content=found)
            replies.add(reply.site, norm(found.decoded.update), found.weight, then)

        told = replies.close()
        update = mean.mean()
        self.adapter = moved(self.adapter, step(update, self.config))
        metrics = {"loss": loss.mean(), "sites": mean.count, "update_norm": norm(update), **told}

        return {**metrics, **self.link.uplink.close(update, number)}

    def _read(self, _site: str, reply: Payload, round: int) -> "Content":
        fields(reply, ("n", "loss"), FRAME, optional=("e",))
        decoded = self.link.uplink.decode(reply, round)
        weight = weight_of(reply)
        check_update(decoded.update, weight, self.context.train)
        return Content(decoded, weight, loss_of(reply))

    def model(self) -> Named:
        """The global adapter."""
        return self.adapter

    def state(self) -> Payload:
        """The adapter, and what both directions remember."""
        return join({"adapter": Payload(self.adapter), "link": self.link.state()})

    def restore(self, state: Payload) -> None:
        """See `state`."""
        parts = split(state, ("adapter", "link"))
        self.context.layout.check(parts["adapter"].tensors, "checkpoint")
        self.adapter = parts["adapter"].tensors
        self.link.restore(parts["link"])


def step(update: Named, config: Any) -> Named:
    """What the server adds: the mean update, times the server's learning rate where the method has
    one."""
    rate: float = getattr(config, "server_learning_rate", 1.0)
    return update if rate == 1 else scale(update, rate)


class WeightedLoss:
    """Weighted mean of the sites' losses, the same in any order: terms are rounded to 2^-40 and
    summed exactly."""

    def __init__(self) -> None:
        self._sum = 0
        self._weight = 0

    def add(self, loss: float, weight: int) -> None:
        """Fold one site in."""
        self._sum = self._sum + round(loss * 2**40) * weight
        self._weight = self._weight + weight

    def mean(self) -> float:
        """Nats per label token."""
        return self._sum / self._weight / 2**40


def train(site: Site, message: Payload) -> Payload:
    """Task: tune the received adapter on the site's data; the coded difference goes back."""
    config: Any = site.method
    opened = open_link(site, message, part(site.layout, config.factors))

    if opened is None:
        return STALE

    received, codec = opened
    data = site.load().train
    round = round_of(site, message)
    examples = after_tgap(data, config.tgap) if must_learn(site.codec) else data
    update, report = train_locally(site, received, round, examples=examples, factors=config.factors)

    return coded_reply(site, codec, update, message, n=len(examples), loss=report.loss)


def plan(config: FedAvgConfig, given: Given) -> Plan:
    """Refuse a codec that cannot code this layout, and a pre-training that no codec needs."""
    learns = must_learn(given.codec)
    if config.tgap != FedAvgConfig().tgap and not learns:
        name: str = given.codec.name
        raise ConfigError(
            f"method.tgap: without effect, because codec {name!r} learns nothing; remove it"
        )

    sent = _sent(config, given.layout)
    check_codec(given.codec, config.tgap, sent)
    return Plan(
        sent,
        partial(coded, config, given, sent),
        reads_public=learns and config.tgap.source == "public",
    )


def plan_central(config: CentralConfig, given: Given) -> Plan:
    """Nothing is sent."""
    sent = _sent(config, given.layout)
    return Plan(sent, partial(uncoded, given, sent, "none"))


def _sent(config: FedAvgConfig | CentralConfig, layout: Layout) -> Layout:
    """Return the layout of the tuned factors; raises `ConfigError` where weights have none."""
    sent = part(layout, config.factors)
    if not sent.shapes:
        raise ConfigError(
            f"method.factors={config.factors!r}: all weights are tuned, and none is a factor; "
            "remove it"
        )

    return sent


METHOD = Method(
    FedAvgConfig,
    FedAvgServer,
    {"train": train, **TASKS},
    paper="Zhang et al., Towards Building the Federated GPT (FedIT), ICASSP 2024, "
    "https://arxiv.org/abs/2305.05644",
    plan=plan,
    traits=Traits("FedAvg", tunes=("lora", "full"), receives="downlink", weighted=True),
)
CENTRAL = Method(
    CentralConfig,
    FedAvgServer,
    {"train": train},
    paper="The centralised baseline: the same steps on the union of the data",
    plan=plan_central,
    traits=Traits(
        "central, all data at one place",
        tunes=("lora", "full"),
        sends="nothing",
        pooled=True,
        baseline=True,
    ),
)
