"""FedAvg over LoRA adapters (FedIT), and FFA-LoRA.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
https://arxiv.org/abs/2305.05644; Sun et al., "Improving LoRA in Privacy-preserving Federated
Learning" (FFA-LoRA), ICLR 2024, https://arxiv.org/abs/2403.12313.

In every round a cohort of sites receives the global adapter, tunes it on its own data and sends
back the difference. The server adds the sample-weighted mean of the differences. FedIT averages A
and B apart, which is not the mean of their products; FFA-LoRA freezes A at its shared random start,
so that the mean is exact and half the bytes are sent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from pydantic import Field

from fluvial.codecs import CodecSettings, must_learn
from fluvial.data import Example
from fluvial.errors import ConfigError
from fluvial.exchange import (
    NO_TGAP,
    PUBLIC_TGAP,
    LocalUpdate,
    Terms,
    TgapConfig,
    shared,
    shared_tasks,
)
from fluvial.federation.aggregate import Aggregate
from fluvial.federation.cohort import sample
from fluvial.federation.config import Bound
from fluvial.federation.fleet import Fleet
from fluvial.federation.sites import Factors, Site, factor_layout, train_locally
from fluvial.methods.aggregating import (
    AveragingSettings,
    SharedAdapter,
    check_aggregation,
    frozen_factor,
    side_download,
)
from fluvial.methods.interface import (
    Context,
    Given,
    Method,
    MethodSettings,
    Metrics,
    Plan,
    Traits,
)
from fluvial.methods.planning import shared_plan, shared_traffic, uncoded
from fluvial.methods.shared import SharedModelServer
from fluvial.methods.traffic import Measured
from fluvial.models.assignment import Assignment
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named


class FedAvgConfig(AveragingSettings):
    """FedIT; FFA-LoRA with `factors = "B"`."""

    name: Literal["fedavg"] = "fedavg"
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort; FedIT uses 0.05 of 100."""
    factors: Factors = "A and B"
    """Factors that are tuned and sent: both (FedIT), or B with A frozen (FFA-LoRA)."""
    tgap: TgapConfig = PUBLIC_TGAP
    """Pre-training of a codec that learns; without effect for the others."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        yield from super().conflicts()
        yield from frozen_factor(self.aggregation, self.factors)


class CentralConfig(MethodSettings):
    """All data at one place: what federated training would be without its constraint.

    `train.max_steps`, if set, is multiplied by the number of sites, so that as many sequences are
    seen.
    """

    name: Literal["central"] = "central"
    factors: Factors = "A and B"
    """Factors that are tuned: both, or B with A frozen."""

    @property
    def bounds(self) -> frozenset[Bound]:
        """Return nothing: a round has one update."""
        return frozenset()


def terms(config: FedAvgConfig | CentralConfig, codec: CodecSettings) -> Terms:
    """Return what server and sites agree on."""
    if isinstance(config, CentralConfig):
        return Terms(factors=config.factors)
    tgap = config.tgap if must_learn(codec) else NO_TGAP
    return Terms(tgap, config.factors, basis=config.aggregation.basis)


class FedAvgServer(SharedModelServer):
    """Server half: the global adapter."""

    def __init__(self, config: FedAvgConfig | CentralConfig, context: Context) -> None:
        self.config = config
        self.context = context
        moving = FedAvgConfig() if isinstance(config, CentralConfig) else config
        self.learning_rate = moving.server_learning_rate
        """Mean updates that the server moves by; 1 where all data is at one place."""
        self.shared = SharedAdapter(
            moving.aggregation,
            context,
            terms(config, context.codec),
            momentum=moving.server_momentum,
            ema_decay=moving.ema_decay,
        )

    @property
    def adapter(self) -> Named:
        """The factors that sites begin from."""
        return self.shared.whole.adapter

    @adapter.setter
    def adapter(self, adapter: Named) -> None:
        self.shared.whole = replace(self.shared.whole, adapter=adapter)

    def setup(self, fleet: Fleet) -> Metrics:
        """Fit and install a codec that learns; the initial adapter follows from the seed."""
        return self.shared.exchange.setup(fleet)

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Run one round: cohort, local training, aggregation of the differences."""
        cohort = sample(fleet.sites, self.config.cohort_share, seed=self.context.seed, round=number)
        aggregate = Aggregate()
        for update in self.shared.updates(fleet, cohort, round=number):
            aggregate.add(update)

        mean = aggregate.mean()
        measures = self.shared.step(mean, self.learning_rate, round=number)
        return {**aggregate.metrics(mean), **measures}

    def model(self) -> Named:
        """Return the global adapter."""
        return self.shared.model()

    @property
    def assigned(self) -> Assignment | None:
        """See `SharedModelServer`."""
        return self.shared.exported

    def state(self) -> Payload:
        """Return the adapter, and what the exchange remembers."""
        return self.shared.state()

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        self.shared.restore(state)


def train(site: Site, received: Named, round: int, examples: Sequence[Example]) -> LocalUpdate:
    """Tune the received adapter on the site's data."""
    config: FedAvgConfig | CentralConfig = site.method
    update, report = train_locally(site, received, round, examples=examples, factors=config.factors)
    return LocalUpdate(update, len(examples), report.loss)


def plan(config: FedAvgConfig, given: Given) -> Plan:
    """Refuse a codec that cannot code this layout, a pre-training that no codec needs, and an
    aggregation that the model does not allow."""
    check_aggregation(config.aggregation, given, broadcast=config.tgap.refit == "broadcast")
    download = side_download(config.aggregation, given)
    return shared_plan(
        config,
        given,
        _sent(config, given.layout),
        config.tgap,
        download=download,
        measured=given.layout if download is None else None,
    )


def plan_central(config: CentralConfig, given: Given) -> Plan:
    """Return the plan of a run whose pooled data trains at one place; no update is sent."""
    sent = _sent(config, given.layout)
    traffic = partial(shared_traffic, config, given, sent)
    return Plan(
        sent, partial(uncoded, config, given, traffic, sent, "none", Measured.of(given.layout))
    )


def _sent(config: FedAvgConfig | CentralConfig, layout: Layout) -> Layout:
    """Return the layout of the tuned factors; raises `ConfigError` where weights have none."""
    sent = factor_layout(layout, config.factors)
    if not sent.shapes:
        raise ConfigError(
            f"method.factors={config.factors!r}: all weights are tuned, and none is a factor; "
            "remove it"
        )

    return sent


METHOD = Method(
    FedAvgConfig,
    FedAvgServer,
    shared_tasks(shared(train, terms), terms),
    paper="Zhang et al., Towards Building the Federated GPT (FedIT), ICASSP 2024, "
    "https://arxiv.org/abs/2305.05644",
    plan=plan,
    traits=Traits(
        "FedAvg",
        tunes=("lora", "full"),
        receives="downlink",
        weighted=True,
        budget=True,
        uncompressed="federated, uncompressed",
    ),
)
CENTRAL = Method(
    CentralConfig,
    FedAvgServer,
    {"train": shared(train, terms)},
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
