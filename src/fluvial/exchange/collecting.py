"""Collection at TGAP: updates or their moments, over sites and rounds (the temporal ensemble)."""

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fluvial.codecs.base import Snapshot
from fluvial.codecs.klt.moments import Moments, MomentsSum
from fluvial.codecs.quantise import Identity
from fluvial.data import SiteData
from fluvial.errors import ConfigError
from fluvial.exchange.ensemble import Ensemble, Progress
from fluvial.exchange.gathering import Gathering, Readable, ask_stale_again, to_all
from fluvial.exchange.start import Starts
from fluvial.exchange.terms import Terms
from fluvial.exchange.tgap import TgapConfig
from fluvial.exchange.tgap_tasks import snapshot
from fluvial.federation.context import Context
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import local_fleet
from fluvial.federation.replies import nothing, read_update
from fluvial.federation.sites import Site, adapter_message
from fluvial.federation.store import StateStore
from fluvial.models.states import initial_state
from fluvial.seeds import derive
from fluvial.wire.payload import Payload, Value
from fluvial.wire.tensors import Layout, WeightedMean, moved, norm

logger = logging.getLogger(__name__)


def collect_moments(
    config: TgapConfig, fleet: Fleet, layout: Layout, seed: int, *, sent: Layout
) -> Moments:
    """Return the second moments of the updates of all sites; held-out updates stay there.

    `layout` is the adapter's, `sent` the updates'. Every site starts from the same initial adapter
    as FAF and goes its own way.
    """
    starts = Starts(initial_state(layout, seed))
    for number in range(1, config.rounds + 1):
        logger.info("TGAP round %d of %d", number, config.rounds)
        answers = ask_stale_again(
            fleet,
            "snapshot",
            fleet.sites,
            round=0,
            messages=partial(starts.messages, round=number),
            read=nothing,
            forget=starts.others.update,
        )
        answered = len(list(answers))
        fleet.require_quorum("snapshot", 0, answered=answered, asked=len(fleet.sites))

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
    config: TgapConfig,
    fleet: Fleet,
    layout: Layout,
    seed: int,
    *,
    sent: Layout | None = None,
    folder: Path | None = None,
    same_seed: bool = True,
) -> list[Snapshot]:
    """Return raw updates of all sites over `config.rounds` rounds.

    All start from the same initial adapter as FAF, which sites of the `same_seed` make themselves.
    `layout` is the adapter's, `sent` the updates' where sites send some factors only. With `folder`
    the snapshots lie there, and rounds that an earlier process has finished are not run again.
    """
    sent = sent or layout
    start = initial_state(layout, seed)
    starts = Starts(start)
    ensemble = Ensemble(folder, _made_of(config, seed, sent), start, sent)
    progress = ensemble.progress()
    alone = config.reading == "local"
    own = dict.fromkeys(fleet.sites, progress.shared)
    if alone:
        own |= {taken.site: moved(taken.received, taken.update) for taken in ensemble.snapshots()}

    if progress.round > 0:
        logger.info("TGAP: %d of %d rounds are on the disk", progress.round, config.rounds)
        fleet.meter.totals = dict(progress.traffic)

    shared = progress.shared
    codec = Identity.of(sent)

    def read(site: str, reply: Payload, *, number: int) -> Readable[Snapshot]:
        update, weight = read_update(site, reply, codec=codec, round=number)
        return Readable(Snapshot(site, number, own[site], update), norm(update), weight)

    def messages(sites: Sequence[str], *, number: int) -> dict[str, Payload]:
        if number == 1 and same_seed:
            return starts.messages(sites, round=number)
        return {site: adapter_message(own[site], round=number) for site in sites}

    for number in range(progress.round + 1, config.rounds + 1):
        logger.info("TGAP round %d of %d", number, config.rounds)
        gathering = Gathering(
            fleet,
            "snapshot",
            0,
            partial(messages, number=number),
            partial(read, number=number),
            forget=starts.others.update,
        )
        mean = WeightedMean()
        answered = []

        for reply in gathering.of(fleet.sites):
            taken = reply.content
            ensemble.keep(taken, alone=alone)
            answered.append(taken.site)
            mean.add(taken.update, reply.weight)
            if alone:
                own[taken.site] = moved(taken.received, taken.update)

        if not alone:
            shared = moved(shared, mean.mean())
            own = dict.fromkeys(fleet.sites, shared)

        ensemble.close(Progress(number, shared, fleet.meter.totals), answered)

    return ensemble.snapshots()


def _made_of(config: TgapConfig, seed: int, sent: Layout) -> dict[str, Value]:
    """Return what the updates of TGAP depend on, beside what a run never changes."""
    shapes: list[Value] = [[name, list(shape)] for name, shape in sent.shapes]
    return {"tgap": config.model_dump(mode="json"), "seed": seed, "shapes": shapes}


def simulated_fleet(terms: Terms, context: Context) -> Fleet:
    """Return sites that the server simulates on public text.

    Raises `ConfigError` where there are fewer than two records.
    """
    config = terms.tgap
    examples = context.public()
    names = sorted(examples)[: config.simulated_sites]

    if len(names) < 2:
        raise ConfigError(
            "data.public_source: at least two records are needed to simulate two sites"
        )

    pool = context.open_pool()
    store = StateStore(None)

    def open_site(name: str) -> Site:
        return Site(
            name=name,
            seed=derive(context.seed, "tgap"),
            pool=pool,
            load=lambda: SiteData(examples[name], examples[name], [], 0, 0, 0),
            train=context.train,
            codec=context.codec,
            method=None,
            downlink=None,
            store=store,
            rounds=config.rounds,
        )

    task = partial(snapshot, terms=terms)
    return local_fleet(names, open_site, {"snapshot": task})
