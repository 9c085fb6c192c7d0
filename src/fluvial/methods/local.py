"""Local training, the baseline that federation must beat: every site alone.

Data, steps and code are the same. Each site keeps its own adapter between rounds; nothing but the
loss is sent.
"""

from functools import partial
from typing import Literal

from fluvial.federation.aggregate import WeightedLoss
from fluvial.federation.config import Bound
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import fields, loss_of, weight_of
from fluvial.federation.sites import Site, round_of, train_locally
from fluvial.methods.interface import (
    Context,
    Export,
    Given,
    Measures,
    Method,
    MethodSettings,
    Metrics,
    Plan,
    Reporting,
    Traits,
)
from fluvial.methods.measuring import ask_heldout
from fluvial.methods.planning import uncoded
from fluvial.methods.traffic import (
    FULL_LOSS,
    PREDICTED_SAMPLES,
    SHORT_LOSS,
    Measured,
    Traffic,
    envelope,
)
from fluvial.models.states import initial_state
from fluvial.wire.payload import Payload, Value
from fluvial.wire.tensors import add


class LocalConfig(MethodSettings):
    """Local training, which has no settings of its own."""

    name: Literal["local"] = "local"

    @property
    def bounds(self) -> frozenset[Bound]:
        """Return nothing: no update reaches the server."""
        return frozenset()


class LocalServer:
    """Server half: it counts rounds, and the sites hold the rest."""

    def __init__(self, config: LocalConfig, context: Context) -> None:
        pass

    def setup(self, fleet: Fleet) -> Metrics:  # noqa: ARG002
        """Return no metrics: sites and server agree on nothing before round 1."""
        return {}

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Run one round: every site trains from its own adapter."""
        loss = WeightedLoss()
        count = 0
        message = Payload(values={"round": number})

        for reply in fleet.ask(
            "train", dict.fromkeys(fleet.sites, message), round=number, read=_read
        ):
            loss.add(*reply.content)
            count += 1

        return {"loss": loss.mean(), "sites": count}

    def measure(
        self, fleet: Fleet, reporting: Reporting, *, round: int, which: Literal["base", "final"]
    ) -> Measures:
        """Ask every site to measure the base, or its own adapter, on its held-out text."""
        new_tokens = reporting.evaluate.max_new_tokens
        values: dict[str, Value] = {
            "which": "base" if which == "base" else "own",
            "generate": new_tokens,
        }
        return ask_heldout(fleet, Payload(values=values), round=round)

    def export(self, fleet: Fleet, reporting: Reporting, final: Measures) -> Export:  # noqa: ARG002
        """Write nothing: the sites keep their adapters."""
        return Export()

    def state(self) -> Payload:
        """Return nothing: the sites keep everything."""
        return Payload()

    def restore(self, state: Payload) -> None:
        """Restore nothing."""


def _read(_site: str, reply: Payload) -> tuple[float, int]:
    fields(reply, ("n", "loss"))
    return loss_of(reply), weight_of(reply)


def train(site: Site, message: Payload) -> Payload:
    """Train one more round from the site's own adapter."""
    round = round_of(site, message)
    adapter = site.recall("adapter").tensors or initial_state(site.layout, site.seed)
    examples = site.load().train
    update, report = train_locally(site, adapter, round, examples=examples)
    site.keep("adapter", Payload(add(adapter, update)))

    return Payload(values={"n": len(examples), "loss": report.loss})


def plan(config: LocalConfig, given: Given) -> Plan:
    """Return the plan of a run in which sites keep their updates and send counts and losses."""

    def traffic(round: int) -> Traffic:
        values: dict[str, dict[str, Value]] = {
            "down": {"round": round},
            "short": {"n": 1, "loss": SHORT_LOSS},
            "long": {"n": PREDICTED_SAMPLES, "loss": FULL_LOSS},
        }
        return Traffic(
            down=envelope(values["down"], frame=False),
            up=envelope(values["short"], values["long"], frame=False),
        )

    return Plan(
        given.layout, partial(uncoded, config, given, traffic, given.layout, "none", Measured(None))
    )


METHOD = Method(
    LocalConfig,
    LocalServer,
    {"train": train},
    paper="The local baseline: every site alone",
    plan=plan,
    site_model=lambda own, _: own,
    traits=Traits(
        "local only", tunes=("lora", "full"), sends="nothing", exports=False, baseline=True
    ),
)
