"""Fed-SB: B and A are fixed, and the small square R between them is trained and averaged.

Singhal, Ponkshe, Vartak, Varshney, Vepakomma, "Fed-SB: A Silver Bullet for Extreme Communication
Efficiency and Performance in (Private) Federated LoRA Fine-Tuning", 2025,
https://arxiv.org/abs/2502.15436; the adapter is LoRA-SB of Ponkshe et al., "Initialization using
Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning", 2024,
https://arxiv.org/abs/2411.19557.

The change of a weight is B R A. B and A are the leading singular vectors of an estimate of the
first step of full tuning, and R begins with its singular values. Sites train and send R alone, r x
r values of a module, whose mean is the exact mean of the changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from fluvial.codecs import CodecSettings
from fluvial.data import Example
from fluvial.exchange import PUBLIC_TGAP, STALE, Exchange, LocalUpdate, Terms, shared
from fluvial.federation.aggregate import Aggregate
from fluvial.federation.cohort import sample
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import nothing
from fluvial.federation.sites import (
    Site,
    adapter_message,
    factor_layout,
    read_adapter_message,
    refuse_learned,
)
from fluvial.federation.talk import Talk
from fluvial.methods.aggregating import check_products
from fluvial.methods.interface import (
    Context,
    Given,
    Method,
    Metrics,
    Plan,
    SampledSettings,
    Traits,
)
from fluvial.methods.planning import shared_plan
from fluvial.methods.shared import SharedModelServer
from fluvial.models.pool import ModelPool
from fluvial.models.square import (
    factors_of_step,
    gradients_of_weights,
    multiplied,
    squares_trained,
)
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.seeds import generator
from fluvial.training.train import collate, predictions, summed_loss
from fluvial.training.train import train as train_model
from fluvial.wire.payload import Payload, Value, join, split
from fluvial.wire.tensors import Layout, Named, add, moved, subtract

BASIS = "basis"
"""Task, and slot of a site, for the fixed factors and the start of R."""
_PARTS = ("fixed", "start")


class FedSbConfig(SampledSettings):
    """Fed-SB; `lora.r` is the side of R, for which the authors take 25 to 200."""

    name: Literal["fedsb"] = "fedsb"
    samples: int = Field(50, ge=1, le=10**6)
    """Public sequences whose gradients estimate the first step; the authors take 50 of the training
    data for arithmetic, and 170 for common sense."""
    first_step: float = Field(3e-7, ge=1e-12, le=1)
    """Size of the estimated first step of Adam, which R begins with. The authors take the first
    step of their warm-up: a learning rate of 1e-4 over 333 steps is 3e-7."""


def terms(config: FedSbConfig, codec: CodecSettings) -> Terms:  # noqa: ARG001
    """Return what server and sites agree on: R goes both ways."""
    return Terms(factors="R")


class Basis:
    """The fixed factors and the start of R, which every site must hold; see `Handout`."""

    def __init__(self) -> None:
        self.fixed: Named = {}
        self.start: Named = {}
        self.held: set[str] = set()

    def message(self) -> Payload:
        """Return the message that a site keeps."""
        parts = {"fixed": adapter_message(self.fixed), "start": adapter_message(self.start)}
        return join(parts)

    def ready(self, fleet: Fleet, round: int, sites: Sequence[str]) -> list[str]:
        """Send it to those of `sites` that lack it; return those that hold it then."""
        lacking = [site for site in sites if site not in self.held]
        if lacking:
            messages = dict.fromkeys(lacking, self.message())
            for reply in fleet.ask(BASIS, messages, round=round, read=nothing, alone=False):
                self.held.add(reply.site)

        return [site for site in sites if site in self.held]

    def values(self, site: str) -> Mapping[str, Value]:  # noqa: ARG002
        """Return nothing: there is one basis in a run."""
        return {}

    def forget(self, sites: Sequence[str]) -> None:
        """Note that these sites must be sent it again."""
        self.held.difference_update(sites)

    def state(self) -> Payload:
        """Return all that `restore` needs."""
        parts = {"fixed": Payload(self.fixed), "start": Payload(self.start)}
        held: list[Value] = [*sorted(self.held)]
        return join(parts | {"held": Payload(values={"sites": held})})

    def restore(self, state: Payload) -> None:
        """Become the basis whose `state` this was."""
        parts = split(state, (*_PARTS, "held"))
        self.fixed = parts["fixed"].tensors
        self.start = parts["start"].tensors
        self.held = set(parts["held"].value("sites", list))


class FedSbServer(SharedModelServer):
    """Server half: the basis, and the change of R since the start."""

    def __init__(self, config: FedSbConfig, context: Context) -> None:
        self.config = config
        self.context = context
        self.basis = Basis()
        self.change = initial_state(factor_layout(context.layout, "R"), context.seed)
        self.exchange = Exchange(
            context, self.change, terms(config, context.codec), handout=self.basis
        )

    def setup(self, fleet: Fleet) -> Metrics:
        """Estimate the first step on public text, and send the sites its leading factors."""
        pool = self.context.open_pool()
        public = [example for some in self.context.public().values() for example in some]
        order = torch.randperm(len(public), generator=generator(self.context.seed, "fedsb"))
        examples = [public[place] for place in order[: self.config.samples].tolist()]
        layout = self.context.layout
        self.basis.fixed, self.basis.start = first_step(
            pool, layout, examples, self.config.first_step
        )
        ready = self.basis.ready(fleet, 0, fleet.sites)
        fleet.require_quorum(BASIS, 0, answered=len(ready), asked=len(fleet.sites))
        return self.exchange.setup(fleet)

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Run one round: cohort, local training of R, weighted mean of its changes."""
        cohort = sample(fleet.sites, self.config.fraction, seed=self.context.seed, round=number)
        aggregate = Aggregate()
        for update in self.exchange.updates(fleet, cohort, self.change, round=number):
            aggregate.add(update)

        mean = aggregate.mean()
        self.change = moved(self.change, mean)
        return {**aggregate.metrics(mean), **self.exchange.close(mean, number)}

    def model(self) -> Named:
        """Return the LoRA adapter A and `B R`."""
        return multiplied(self.basis.fixed, add(self.basis.start, self.change))

    def state(self) -> Payload:
        """Return the basis, the change of R, and what the exchange remembers."""
        return join(
            {
                "basis": self.basis.state(),
                "change": Payload(self.change),
                "exchange": self.exchange.state(),
            }
        )

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        parts = split(state, ("basis", "change", "exchange"))
        factor_layout(self.context.layout, "R").check(parts["change"].tensors, "checkpoint, R")
        self.basis.restore(parts["basis"])
        self.change = parts["change"].tensors
        self.exchange.restore(parts["exchange"])


def first_step(
    pool: ModelPool, layout: Layout, examples: Sequence[Example], step: float
) -> tuple[Named, Named]:
    """Return the fixed factors and the start of R from the gradients of the base on `examples`.

    PEFT scales the adapter, so R begins with the singular values over that scale.
    """
    lora = pool.tuning
    assert isinstance(lora, LoraSettings), "a plan has checked that an adapter is tuned"
    scale = lora.alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
    with (
        pool.model(pool.base_state(), trainable="A and B") as model,
        gradients_of_weights(model) as gradients,
    ):
        for example in examples:
            batch = collate([example], pool.tokenizer.pad_token_id, pool.device)
            summed_loss(*predictions(model, batch)).backward()  # type: ignore[no-untyped-call]

    return factors_of_step(gradients, layout, step / scale)


def keep_basis(site: Site, message: Payload) -> Payload:
    """Keep the fixed factors and the start of R; a task."""
    read_basis(site, message)
    site.keep(BASIS, message)
    return Payload()


def read_basis(site: Site, message: Payload) -> tuple[Named, Named]:
    """Return the fixed factors and the start of R in a message; raises `WireError`."""
    parts = split(message, _PARTS)
    fixed = read_adapter_message(parts["fixed"], site.layout)
    return fixed, read_adapter_message(parts["start"], factor_layout(site.layout, "R"))


def train(site: Site, received: Named, round: int, examples: Sequence[Example]) -> LocalUpdate:
    """Tune R from its start and the received change."""
    fixed, start = read_basis(site, site.recall(BASIS))
    squares = add(start, received)
    pool = site.pool
    with (
        pool.model(
            multiplied(fixed, squares), checkpointing=site.train.gradient_checkpointing
        ) as model,
        squares_trained(model, fixed, squares),
        site.stopwatch.time("training"),
    ):
        report = train_model(
            model,
            examples,
            site.train.in_round(round, site.rounds),
            pad_token_id=pool.tokenizer.pad_token_id,
            generator=generator(site.seed, "train", round, site.name),
            start=squares,
        )

    return LocalUpdate(subtract(report.weights, squares), len(examples), report.loss)


_train = shared(train, terms)


def train_with_basis(site: Site, message: Payload) -> Payload | Talk:
    """Train, or answer `STALE` where the site has lost the basis."""
    return _train(site, message) if site.recall(BASIS).values else STALE


def plan(config: FedSbConfig, given: Given) -> Plan:
    """Refuse a codec that learns and modules without a product, and return the plan."""
    refuse_learned(given.codec, config.name)
    check_products(given, f"method.name={config.name!r}")
    sent = factor_layout(given.layout, "R")
    shared = shared_plan(
        config, given, sent, PUBLIC_TGAP, download=(sent, {}), measured=given.layout
    )
    basis = given.layout.raw_bytes + sent.raw_bytes
    note = f"before round 1 each site downloads B, A and the start of R, {basis:,} B"
    return replace(shared, reads_public=True, notes=(note,))


METHOD = Method(
    FedSbConfig,
    FedSbServer,
    {"train": train_with_basis, BASIS: keep_basis},
    paper="Singhal, Ponkshe, Vartak, Varshney, Vepakomma, Fed-SB: A Silver Bullet for Extreme "
    "Communication Efficiency and Performance in (Private) Federated LoRA Fine-Tuning, 2025, "
    "https://arxiv.org/abs/2502.15436",
    plan=plan,
    traits=Traits("Fed-SB", receives="downlink", shares_steps=False),
)
