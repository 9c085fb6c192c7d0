"""FedSA-LoRA: every site trains both factors, shares A and keeps its own B.

Guo, Zeng, Wang, Fan, Wang, Qu, "Selective Aggregation for Low-Rank Adaptation in Federated
Learning", ICLR 2025, https://arxiv.org/abs/2410.01463.

The authors find that A learns what the sites have in common, and B what is a site's own. So sites
send A alone, the server averages it, and each site continues from the mean with the B that it kept.
The result is a model for each site: there is no global one.
"""

from collections.abc import Sequence
from typing import Literal

from fluvial.codecs import CodecSettings
from fluvial.data import Example
from fluvial.exchange import PUBLIC_TGAP, Exchange, LocalUpdate, Terms, shared
from fluvial.federation import sites
from fluvial.federation.aggregate import Aggregate
from fluvial.federation.cohort import sample
from fluvial.federation.fleet import Fleet
from fluvial.federation.sites import (
    MOST_NEW_TOKENS,
    Site,
    adapter_message,
    factor_layout,
    measure_heldout,
    read_adapter_message,
    refuse_learned,
    train_locally,
)
from fluvial.methods.interface import (
    Context,
    Export,
    Given,
    Measures,
    Method,
    Metrics,
    Plan,
    Reporting,
    SampledSettings,
    Traits,
)
from fluvial.methods.measuring import ask_heldout
from fluvial.methods.planning import shared_plan
from fluvial.models.states import initial_state
from fluvial.wire.payload import Payload, join, split
from fluvial.wire.tensors import Named, add, moved, only

OWN = "adapter"
"""Slot of a site for its own B."""


class FedSaConfig(SampledSettings):
    """FedSA-LoRA, which has no settings of its own; the paper draws all sites in every round."""

    name: Literal["fedsa"] = "fedsa"


def terms(config: FedSaConfig, codec: CodecSettings) -> Terms:  # noqa: ARG001
    """Return what server and sites agree on: A goes both ways."""
    return Terms(factors="A")


class FedSaServer:
    """Server half: the A of all sites."""

    def __init__(self, config: FedSaConfig, context: Context) -> None:
        self.config = config
        self.context = context
        self.shared = only(initial_state(context.layout, context.seed), "A")
        self.exchange = Exchange(context, self.shared, terms(config, context.codec))

    def setup(self, fleet: Fleet) -> Metrics:
        """Return no metrics: A follows from the seed, and B begins at zero."""
        return self.exchange.setup(fleet)

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Run one round: cohort, local training of both factors, weighted mean of the A."""
        cohort = sample(fleet.sites, self.config.fraction, seed=self.context.seed, round=number)
        aggregate = Aggregate()
        for update in self.exchange.updates(fleet, cohort, self.shared, round=number):
            aggregate.add(update)

        mean = aggregate.mean()
        self.shared = moved(self.shared, mean)
        return {**aggregate.metrics(mean), **self.exchange.close(mean, number)}

    def measure(
        self, fleet: Fleet, reporting: Reporting, *, round: int, which: Literal["base", "final"]
    ) -> Measures:
        """Ask every site to measure the base, or the present A with its own B, on its held-out
        text."""
        if not reporting.heldout:
            return Measures()

        new_tokens = reporting.evaluate.max_new_tokens
        if which == "base":
            message = Payload(values={"which": "base", "generate": new_tokens})
        else:
            message = adapter_message(self.shared, which="shared", generate=new_tokens)
        return ask_heldout(fleet, message, round=round)

    def export(self, fleet: Fleet, reporting: Reporting, final: Measures) -> Export:  # noqa: ARG002
        """Write nothing: no model is that of all sites."""
        return Export()

    def state(self) -> Payload:
        """Return A, and what the exchange remembers."""
        return join({"shared": Payload(self.shared), "exchange": self.exchange.state()})

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        halves = split(state, ("shared", "exchange"))
        factor_layout(self.context.layout, "A").check(halves["shared"].tensors, "checkpoint, A")
        self.shared = halves["shared"].tensors
        self.exchange.restore(halves["exchange"])


def personal(site: Site, shared_a: Named) -> Named:
    """Return the site's adapter: the A of all with its own B, which begins at zero."""
    own = site.recall(OWN).tensors or only(initial_state(site.layout, site.seed), "B")
    factor_layout(site.layout, "B").check(own, "the B that the site keeps")
    return {**shared_a, **own}


def site_model(own: Named, server: Payload) -> Named:
    """Return the model of a site: the A of the server's state with the site's own B."""
    return {**split(server, ("shared", "exchange"))["shared"].tensors, **own}


def train(site: Site, received: Named, round: int, examples: Sequence[Example]) -> LocalUpdate:
    """Tune both factors, keep B, and return the change of A."""
    adapter = personal(site, received)
    update, report = train_locally(site, adapter, round, examples=examples)
    site.keep(OWN, Payload(only(add(adapter, update), "B")))
    return LocalUpdate(only(update, "A"), len(examples), report.loss)


def evaluate(site: Site, message: Payload) -> Payload:
    """Measure the A that was sent with the site's own B, or what `sites.evaluate` measures."""
    if message.value("which", str) != "shared":
        return sites.evaluate(site, message)

    new_tokens = message.whole("generate", 0, MOST_NEW_TOKENS)
    sent = read_adapter_message(message, factor_layout(site.layout, "A"))
    return measure_heldout(site, personal(site, sent), new_tokens)


def plan(config: FedSaConfig, given: Given) -> Plan:
    """Refuse a codec that learns, and return the plan of a run that shares A."""
    refuse_learned(given.codec, config.name)
    sent = factor_layout(given.layout, "A")
    return shared_plan(config, given, sent, PUBLIC_TGAP, download=(sent, {}), measured=sent)


METHOD = Method(
    FedSaConfig,
    FedSaServer,
    {"train": shared(train, terms), "evaluate": evaluate},
    paper="Guo, Zeng, Wang, Fan, Wang, Qu, Selective Aggregation for Low-Rank Adaptation in "
    "Federated Learning (FedSA-LoRA), ICLR 2025, https://arxiv.org/abs/2410.01463",
    plan=plan,
    site_model=site_model,
    traits=Traits("FedSA-LoRA", receives="downlink", exports=False),
)
