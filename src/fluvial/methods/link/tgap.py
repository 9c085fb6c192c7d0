"""TGAP: collect updates over sites and rounds (the temporal ensemble), and fit the codec to them (section C4).

The paper says that the encoder is pre-trained on gradients of D1, a share of every site's data; version 1 describes
training without federation, version 3 a pre-training of the federated model. Both readings are here, and a third source
that costs the sites neither bytes nor privacy: the server trains simulated sites on public text.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fluvial.codecs.base import Snapshot
from fluvial.codecs.quantise import Identity
from fluvial.data import Example, SiteData
from fluvial.errors import ConfigError
from fluvial.fleet import Fleet, FleetConfig, LocalFleet
from fluvial.methods.interface import Context
from fluvial.models import initial_adapter
from fluvial.payload import Payload, frame_payload
from fluvial.seeds import derive
from fluvial.sites import Factors, Site, StateStore, adapter_message, read_adapter_message, read_update, train_locally
from fluvial.tensors import Layout, WeightedMean, moved

logger = logging.getLogger(__name__)


class TgapConfig(BaseModel):
    """How the codec is pre-trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["sites", "public", "none"] = "sites"
    """"sites": each site sends raw updates of D1 once (the paper). "public": simulated sites on public text, at no
    byte from the sites (ours). "none": no pre-training and no gate, for codecs that do not learn."""
    reading: Literal["federated", "local"] = "federated"
    """"federated": sites share an averaged adapter between rounds (v3). "local": each goes its own way (v1)."""
    rounds: int = Field(10, ge=2)
    """Ours: the paper gives no value."""
    share: float = Field(0.3, gt=0, lt=1)
    """D1 : D2 = 3 : 7 of every site's training data, with source "sites"; FAF then trains on D2 only."""
    holdout: float = Field(0.2, gt=0, lt=1)
    """Share of the rounds, the last ones, that the fit never sees (a random split leaks neighbours)."""
    simulated_sites: int = Field(8, ge=2)
    """Sites that the server simulates with source "public"."""
    refit: Literal["no", "decoded", "broadcast"] = "no"
    """Whether a klt follows the updates of FAF (ours). "decoded": the server refits from the updates of a round and
    sends the transform again. "broadcast": server and sites refit alike from the adapters they saw, at no byte."""
    refit_every: int = Field(5, ge=1)
    """Rounds between refits."""
    refit_weight: float = Field(0.5, gt=0, lt=1)
    """Share of the new updates in the refitted covariance."""

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> Self:
        fields = type(self).model_fields
        if self.refit == "no" and any(
            getattr(self, name) != fields[name].default for name in ("refit_every", "refit_weight")
        ):
            raise ValueError("refit_every, refit_weight: without effect under refit='no'; set refit='decoded'")
        return self


def first_part(examples: Sequence[Example], share: float) -> Sequence[Example]:
    """D1: the first `share` of a site's examples, at least one."""
    return examples[: max(1, round(share * len(examples)))]


def second_part(examples: Sequence[Example], share: float) -> Sequence[Example]:
    """D2: the rest; raises `ConfigError` if nothing is left."""
    rest = examples[max(1, round(share * len(examples))) :]
    if not rest:
        raise ConfigError(f"method.tgap.share={share}: {len(examples)} examples of a site cannot be split in two")
    return rest


NO_TGAP = TgapConfig(source="none")


def after_tgap(examples: Sequence[Example], config: TgapConfig) -> Sequence[Example]:
    """What the rounds train on: D2 where TGAP takes D1 from the sites, else everything."""
    return examples if config.source in ("public", "none") else second_part(examples, config.share)


def snapshot(site: Site, message: Payload) -> Payload:
    """Task: train on D1 and send the raw update. With reading "local" the site goes on from its own adapter."""
    tgap: TgapConfig = site.method.tgap
    round = message.value("round", int)
    received = read_adapter_message(message, site.layout)
    if tgap.reading == "local":
        received = site.recall("tgap").tensors or received
    data = site.load().train
    examples = data if tgap.source == "public" else first_part(data, tgap.share)
    factors: Factors = getattr(site.method, "factors", "A and B")
    update, report = train_locally(site, received, round, examples=examples, factors=factors, purpose="tgap")
    if tgap.reading == "local":
        site.keep("tgap", Payload(moved(received, update)))
    raw = Identity.of(Layout.of(update)).encode(update, round=round)
    return frame_payload(raw, n=len(examples), loss=report.loss)


def collect(
    config: TgapConfig, fleet: Fleet, layout: Layout, seed: int, *, sent: Layout | None = None
) -> list[Snapshot]:
    """Raw updates of all sites over `config.rounds` rounds, from the same initial adapter as FAF.

    `layout` is the adapter's, `sent` the updates' where sites send only a part.
    """
    shared = initial_adapter(layout, seed)
    own = dict.fromkeys(fleet.sites, shared)
    codec = Identity.of(sent or layout)

    snapshots: list[Snapshot] = []
    for number in range(1, config.rounds + 1):
        logger.info("TGAP round %d of %d", number, config.rounds)
        mean = WeightedMean()
        messages = dict.fromkeys(fleet.sites, adapter_message(shared, round=number))
        read = partial(read_update, codec=codec, round=number)
        for reply in fleet.ask("snapshot", messages, round=0, read=read):
            update, weight = reply.content
            snapshots.append(Snapshot(reply.site, number, own[reply.site], update))
            mean.add(update, weight)
            if config.reading == "local":
                own[reply.site] = moved(own[reply.site], update)
        if config.reading == "federated":
            shared = moved(shared, mean.mean())
            own = dict.fromkeys(fleet.sites, shared)
    return sorted(snapshots, key=lambda snapshot: (snapshot.round, snapshot.site))


def split_by_time(snapshots: Sequence[Snapshot], holdout: float) -> tuple[list[Snapshot], list[Snapshot]]:
    """Training and held-out snapshots: the last rounds are held out, at least one and not all."""
    rounds = sorted({snapshot.round for snapshot in snapshots})
    kept = min(len(rounds) - 1, max(1, round(holdout * len(rounds))))
    first_heldout = rounds[-kept]
    return (
        [snapshot for snapshot in snapshots if snapshot.round < first_heldout],
        [snapshot for snapshot in snapshots if snapshot.round >= first_heldout],
    )


def simulated_fleet(config: TgapConfig, context: Context, method: BaseModel) -> LocalFleet:
    """Sites that the server plays itself, on public text."""
    parts = context.public()
    names = sorted(parts)[: config.simulated_sites]
    if len(names) < 2:
        raise ConfigError("data.public_source: at least two records are needed to simulate two sites")
    bench, store = context.open_bench(), StateStore(None)

    def open_site(name: str) -> Site:
        return Site(
            name=name,
            seed=derive(context.seed, "tgap"),
            workbench=bench,
            load=lambda: SiteData(parts[name], parts[name], [], 0, 0, 0),
            train=context.train,
            codec=context.codec,
            method=method,
            downlink=None,
            store=store,
            rounds=config.rounds,
        )

    return LocalFleet(names, open_site, {"snapshot": snapshot}, FleetConfig())
