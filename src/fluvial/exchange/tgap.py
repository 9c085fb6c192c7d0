"""TGAP: collect updates over sites and rounds (the temporal ensemble), and fit the codec to them
(section C4).

The paper says that the encoder is pre-trained on gradients of D1, a share of every site's data;
version 1 describes training without federation, version 3 a pre-training of the federated model.
Both readings are here, and two further sources. One costs the sites neither bytes nor privacy: the
server trains simulated sites on public text. In the other they train on D1 and keep their updates:
only sums of second moments go up, once, and later what a codec does to their held-out updates, in a
few numbers.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

from pydantic import Field

from fluvial.codecs import must_learn
from fluvial.codecs.base import Snapshot
from fluvial.codecs.klt.moments import Moments, MomentsSum
from fluvial.codecs.quantise import Identity
from fluvial.data import Example, SiteData
from fluvial.errors import ConfigError, WireError
from fluvial.exchange import gate
from fluvial.exchange.gathering import Gathering, Readable, to_all
from fluvial.exchange.versions import install_codec, site_codec
from fluvial.federation.context import Context
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import local_fleet
from fluvial.federation.replies import nothing, read_update
from fluvial.federation.sites import (
    Factors,
    Site,
    adapter_message,
    read_adapter_message,
    train_locally,
)
from fluvial.federation.store import StateStore
from fluvial.models.states import initial_state
from fluvial.seeds import derive
from fluvial.settings import Settings
from fluvial.wire.payload import Payload, frame_payload, join, split
from fluvial.wire.tensors import Layout, WeightedMean, moved, norm

logger = logging.getLogger(__name__)


class TgapConfig(Settings):
    """How the codec is pre-trained."""

    source: Literal["sites", "sites-covariance", "public", "none"] = "sites"
    """"sites": each site sends raw updates of D1 once (the paper). "sites-covariance": sites keep
    them and send sums of their second moments, for klt and klt_trellis (ours). "public": simulated
    sites on public text, at no byte from the sites (ours). "none": no pre-training and no gate, for
    codecs that do not learn."""
    reading: Literal["federated", "local"] = "federated"
    """"federated": sites share an averaged adapter between rounds (v3). "local": each goes its own
    way (v1); source "sites-covariance" needs that."""
    rounds: int = Field(10, ge=2, le=10**6)
    """Ours: the paper gives no value."""
    share: float = Field(0.3, gt=0, lt=1)
    """D1 : D2 = 3 : 7 of every site's training data, with source "sites"; FAF then trains on D2
    only."""
    holdout: float = Field(0.2, gt=0, lt=1)
    """Share of the rounds, the last ones, that the fit never sees (a random split leaks
    neighbours)."""
    simulated_sites: int = Field(8, ge=2, le=10**4)
    """Sites that the server simulates with source "public"."""
    refit: Literal["no", "decoded", "broadcast"] = "no"
    """Whether a klt follows the updates of FAF (ours). "decoded": the server refits from the
    updates of a round and sends the transform again. "broadcast": server and sites refit alike from
    the adapters they saw, at no byte."""
    refit_every: int = Field(5, ge=1, le=10**6)
    """Rounds between refits."""
    refit_weight: float = Field(0.5, gt=0, lt=1)
    """Share of the new updates in the refitted covariance."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        fields = type(self).model_fields
        if self.refit == "no" and any(
            getattr(self, name) != fields[name].default for name in ("refit_every", "refit_weight")
        ):
            yield "refit_every, refit_weight: without effect under refit='no'; set refit='decoded'"

        if self.source == "sites-covariance" and self.reading == "federated":
            yield (
                "reading='federated' averages updates, which source='sites-covariance' keeps at the sites; set "
                "reading='local'"
            )

    @property
    def training_rounds(self) -> int:
        """Rounds that the fit sees; those after them are held out, at least one and not all."""
        return self.rounds - _num_heldout(self.rounds, self.holdout)


def first_part(examples: Sequence[Example], share: float) -> Sequence[Example]:
    """D1: the first `share` of a site's examples, at least one."""
    return examples[: max(1, round(share * len(examples)))]


def second_part(examples: Sequence[Example], share: float) -> Sequence[Example]:
    """D2: the rest; raises `ConfigError` if nothing is left."""
    rest = examples[max(1, round(share * len(examples))) :]
    if not rest:
        raise ConfigError(
            f"method.tgap.share={share}: {len(examples)} examples of a site cannot be split in two"
        )

    return rest


NO_TGAP = TgapConfig(source="none")
PUBLIC_TGAP = TgapConfig(source="public")


def after_tgap(examples: Sequence[Example], config: TgapConfig) -> Sequence[Example]:
    """What the rounds train on: D2 where TGAP takes D1 from the sites, else everything."""
    return examples if config.source in ("public", "none") else second_part(examples, config.share)


def snapshot(
    site: Site,
    message: Payload,
    *,
    tgap: TgapConfig,
    factors: Factors,
    representation: gate.Representation,
) -> Payload:
    """Task: train on D1 and send the raw update, or keep what is asked for later.

    With reading "local" the site goes on from its own adapter.
    """
    round = message.whole("round", 1, tgap.rounds)
    received = read_adapter_message(message, site.layout)

    if tgap.reading == "local":
        received = site.recall("tgap").tensors or received

    data = site.load().train
    examples = data if tgap.source == "public" else first_part(data, tgap.share)
    update, report = train_locally(
        site, received, round, examples=examples, factors=factors, purpose="tgap"
    )

    if tgap.reading == "local":
        site.keep("tgap", Payload(moved(received, update)))
    if tgap.source == "sites-covariance":
        _remember(site, Snapshot(site.name, round, received, update), tgap, representation)
        return Payload()

    raw = Identity.of(Layout.of(update)).encode(update, round=round)
    return frame_payload(raw, n=len(examples), loss=report.loss)


def _remember(
    site: Site, seen: Snapshot, tgap: TgapConfig, representation: gate.Representation
) -> None:
    """Keep the moments of a snapshot that the fit sees, or a held-out one as it is."""
    if seen.round > tgap.training_rounds:
        kept = split_snapshots(site.recall("heldout"), site.name)
        site.keep("heldout", join_snapshots([*kept, seen]))
        return

    layout = Layout.of(seen.update)
    moments = Moments.of(layout, gate.coded_object(seen.received, seen.update, representation))
    before = site.recall("moments")

    if before.values:
        moments = Moments.read(layout, before, most=tgap.training_rounds) + moments

    site.keep("moments", moments.payload())


def send_moments(site: Site, message: Payload) -> Payload:  # noqa: ARG001 - nothing is asked but that
    """Task: what was summed up over the rounds; the site need not keep it longer."""
    moments = site.recall("moments")
    if not moments.values:
        raise WireError(f"site {site.name!r} has seen no update that it could sum up")
    site.keep("moments", Payload())
    return moments


def probe(site: Site, message: Payload, *, representation: gate.Representation) -> Payload:
    """Task: install a codec, and measure it on the held-out snapshots, which stay here."""
    if must_learn(site.codec):
        install_codec(site, message)

    heldout = split_snapshots(site.recall("heldout"), site.name)
    if not heldout:
        raise WireError(f"site {site.name!r} holds no snapshots to measure a codec on")

    codec = site_codec(site, Layout.of(heldout[0].update))
    return gate.Probe.of(codec, heldout, representation).payload()


def join_snapshots(snapshots: Sequence[Snapshot]) -> Payload:
    """Snapshots of one site, as it keeps them."""
    rounds = {
        str(each.round): join({"from": Payload(each.received), "by": Payload(each.update)})
        for each in snapshots
    }
    return join(rounds)


def split_snapshots(kept: Payload, site: str) -> list[Snapshot]:
    """Inverse of `join_snapshots`, by round; tensors by name, because sums depend on the order."""
    found = []
    for number in sorted(map(int, kept.values)):
        halves = split(split(kept, (str(number),))[str(number)], ("from", "by"))
        received, update = (dict(sorted(halves[half].tensors.items())) for half in ("from", "by"))
        found.append(Snapshot(site, number, received, update))

    return found


def collect_moments(
    config: TgapConfig, fleet: Fleet, layout: Layout, seed: int, *, sent: Layout
) -> Moments:
    """Second moments of the updates of all sites; held-out updates stay there, for `probe`.

    `layout` is the adapter's, `sent` the updates'. Every site starts from the same initial adapter
    as FAF and goes its own way.
    """
    start = initial_state(layout, seed)
    for number in range(1, config.rounds + 1):
        logger.info("TGAP round %d of %d", number, config.rounds)
        messages = dict.fromkeys(fleet.sites, adapter_message(start, round=number))
        for _ in fleet.ask("snapshot", messages, round=0, read=nothing):
            pass

    def read(_site: str, reply: Payload) -> Readable[Moments]:
        moments = Moments.read(sent, reply, most=config.training_rounds)
        length = math.sqrt(math.fsum(moments.energy) / moments.count)
        return Readable(moments, length, 1)

    total = MomentsSum()
    nothing_asked = partial(to_all, message=Payload())
    for reply in Gathering(fleet, "moments", 0, nothing_asked, read).of(fleet.sites):
        total.add(reply.content)

    return total.total()


def collect(
    config: TgapConfig, fleet: Fleet, layout: Layout, seed: int, *, sent: Layout | None = None
) -> list[Snapshot]:
    """Raw updates of all sites over `config.rounds` rounds, from the same initial adapter as FAF.

    `layout` is the adapter's, `sent` the updates' where sites send only a part.
    """
    shared = initial_state(layout, seed)
    own = dict.fromkeys(fleet.sites, shared)
    codec = Identity.of(sent or layout)

    def read(site: str, reply: Payload, *, number: int) -> Readable[Snapshot]:
        update, weight = read_update(site, reply, codec=codec, round=number)
        return Readable(Snapshot(site, number, own[site], update), norm(update), weight)

    snapshots: list[Snapshot] = []
    for number in range(1, config.rounds + 1):
        logger.info("TGAP round %d of %d", number, config.rounds)
        message = adapter_message(shared, round=number)
        gathering = Gathering(
            fleet,
            "snapshot",
            0,
            partial(to_all, message=message),
            partial(read, number=number),
        )
        mean = WeightedMean()

        for reply in gathering.of(fleet.sites):
            snapshots.append(reply.content)
            mean.add(reply.content.update, reply.weight)

        if config.reading == "federated":
            shared = moved(shared, mean.mean())
            own = dict.fromkeys(fleet.sites, shared)
        else:
            own |= {
                each.site: moved(each.received, each.update)
                for each in snapshots
                if each.round == number
            }

    return sorted(snapshots, key=lambda snapshot: (snapshot.round, snapshot.site))


def split_by_time(
    snapshots: Sequence[Snapshot], holdout: float
) -> tuple[list[Snapshot], list[Snapshot]]:
    """Training and held-out snapshots: the last rounds are held out, at least one and not all."""
    rounds = sorted({snapshot.round for snapshot in snapshots})
    first_heldout = rounds[-_num_heldout(len(rounds), holdout)]

    return (
        [snapshot for snapshot in snapshots if snapshot.round < first_heldout],
        [snapshot for snapshot in snapshots if snapshot.round >= first_heldout],
    )


def _num_heldout(rounds: int, holdout: float) -> int:
    return min(rounds - 1, max(1, round(holdout * rounds)))


def simulated_fleet(
    config: TgapConfig,
    context: Context,
    *,
    factors: Factors = "A and B",
    representation: gate.Representation = "delta",
) -> Fleet:
    """Sites that the server plays itself, on public text."""
    parts = context.public()
    names = sorted(parts)[: config.simulated_sites]

    if len(names) < 2:
        raise ConfigError(
            "data.public_source: at least two records are needed to simulate two sites"
        )

    bench = context.open_bench()
    store = StateStore(None)

    def open_site(name: str) -> Site:
        return Site(
            name=name,
            seed=derive(context.seed, "tgap"),
            pool=bench,
            load=lambda: SiteData(parts[name], parts[name], [], 0, 0, 0),
            train=context.train,
            codec=context.codec,
            method=None,
            downlink=None,
            store=store,
            rounds=config.rounds,
        )

    task = partial(snapshot, tgap=config, factors=factors, representation=representation)
    return local_fleet(names, open_site, {"snapshot": task})
