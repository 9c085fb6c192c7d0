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
from fluvial.federation.adapters import AB_MEAN, AggregationSettings
from fluvial.federation.aggregate import Aggregate
from fluvial.federation.cohort import sample
from fluvial.federation.config import Bound
from fluvial.federation.fleet import Fleet
from fluvial.federation.sites import Factors, Site, factor_layout, train_locally
from fluvial.methods.aggregating import (
    SharedAdapter,
    check_aggregation,
    equal_ranks,
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
    SampledSettings,
    Traits,
)
from fluvial.methods.planning import shared_plan, shared_traffic, uncoded
from fluvial.methods.shared import SharedModelServer
from fluvial.models.assignment import Assignment
from fluvial.wire.payload import Payload, join, split
from fluvial.wire.tensors import Layout, Named, add, scale


class FedAvgConfig(SampledSettings):
    """FedIT; FFA-LoRA with `factors = "B"`."""

    name: Literal["fedavg"] = "fedavg"
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort; FedIT uses 0.05 of 100."""
    factors: Factors = "A and B"
    """Factors that are tuned and sent: both (FedIT), or B with A frozen (FFA-LoRA)."""
    server_learning_rate: float = Field(1.0, gt=0, le=4)
    """Mean updates that the server moves by; 1 is FedAvg. Error feedback delays what it repairs,
    and a little more than 1 makes up for that (ours; measured in docs/methods/cgfedllm.md)."""
    server_momentum: float = Field(0.0, ge=0, lt=1)
    """Nesterov momentum of the server over the mean updates; 0 is FedAvg. The outer optimizer of
    DiLoCo (Douillard et al., 2023, https://arxiv.org/abs/2311.08105) has 0.9 and a
    `server_learning_rate` of 0.7."""
    tgap: TgapConfig = PUBLIC_TGAP
    """Pre-training of a codec that learns; without effect for the others."""
    aggregation: AggregationSettings = AB_MEAN
    """Aggregation of the sites' adapters. By default the means of A and of B, which is FedIT."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        yield from equal_ranks(self.aggregation)
        mode = self.aggregation.mode
        if mode != "ab-mean" and self.server_learning_rate != 1:
            yield f"server_learning_rate: without effect under aggregation.mode={mode!r}; remove it"
        if mode != "ab-mean" and self.server_momentum:
            yield f"server_momentum: without effect under aggregation.mode={mode!r}; remove it"
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
        settings = AB_MEAN if isinstance(config, CentralConfig) else config.aggregation
        self.shared = SharedAdapter(settings, context, terms(config, context.codec))
        self._velocity: Named = {}

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
        measures = self.shared.step(
            mean, self.learning_rate, round=number, move_by=self._ahead(mean)
        )
        return {**aggregate.metrics(mean), **measures}

    def _ahead(self, mean: Named) -> Named:
        """Return the Nesterov step of a mean update, `mean + m v`, with `v` its velocity after it.

        The formula is that of `torch.optim.SGD(nesterov=True)` for a gradient of `-mean`.
        """
        momentum = self._server_momentum
        if not momentum:
            return mean
        kept = scale(self._velocity, momentum)
        self._velocity = add(kept, mean) if kept else mean
        return add(mean, scale(self._velocity, momentum))

    @property
    def _server_momentum(self) -> float:
        """Share of the velocity that a round keeps."""
        return self.config.server_momentum if isinstance(self.config, FedAvgConfig) else 0.0

    @property
    def learning_rate(self) -> float:
        """Mean updates that the server moves by."""
        return self.config.server_learning_rate if isinstance(self.config, FedAvgConfig) else 1.0

    def model(self) -> Named:
        """Return the global adapter."""
        return self.shared.model()

    @property
    def assigned(self) -> Assignment | None:
        """See `SharedModelServer`."""
        return self.shared.exported

    def state(self) -> Payload:
        """Return the adapter, its velocity if there is one, and what the exchange remembers."""
        if not self._server_momentum:
            return self.shared.state()
        return join({"shared": self.shared.state(), "velocity": Payload(self._velocity)})

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        if not self._server_momentum:
            self.shared.restore(state)
            return
        parts = split(state, ("shared", "velocity"))
        self.shared.restore(parts["shared"])
        self._velocity = dict(parts["velocity"].tensors)


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
    return shared_plan(config, given, _sent(config, given.layout), config.tgap, download=download)


def plan_central(config: CentralConfig, given: Given) -> Plan:
    """Return the plan of a run whose pooled data trains at one place; no update is sent."""
    sent = _sent(config, given.layout)
    traffic = partial(shared_traffic, config, given, sent)
    return Plan(sent, partial(uncoded, config, given, traffic, sent, "none"))


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
