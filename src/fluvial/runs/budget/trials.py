"""A trial: rounds of a candidate on sites that the server simulates on public text."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NoReturn

from fluvial.codecs.quantise import IdentitySettings
from fluvial.data import Example, SiteData
from fluvial.errors import ConfigError
from fluvial.exchange import NO_TGAP
from fluvial.federation.config import FleetConfig
from fluvial.federation.in_process import local_fleet
from fluvial.federation.store import StateStore
from fluvial.methods.interface import Context
from fluvial.methods.measuring import Texts
from fluvial.methods.shared import SharedModelServer
from fluvial.models.pool import ModelPool
from fluvial.models.states import base_state
from fluvial.runs.config import RunConfig
from fluvial.runs.opening import site_of, tasks_of
from fluvial.runs.result import directed
from fluvial.training.evaluate import heldout
from fluvial.wire.tensors import Named

HELDOUT = 0.2
"""Share of each simulated site's text that is held out: its end."""
MOST_HELDOUT = 32
"""Held-out sequences of a simulated site, at most."""


class PublicSites:
    """Public text as the data of simulated sites, each with a held-out end."""

    def __init__(self, data: Mapping[str, SiteData]) -> None:
        self.data = data
        self.names = tuple(data)
        self.notes: list[str] = []

    @classmethod
    def of(cls, texts: Texts, num_sites: int) -> "PublicSites":
        """Return sites of the first parts of the public text; raises `ConfigError` where there is
        too little for two."""
        public = {name: some for name, some in sorted(texts.public().items()) if len(some) > 1}
        data = {name: _split(public[name]) for name in list(public)[:num_sites]}
        if len(data) < 2:
            raise ConfigError(
                "data.public_source: a budget needs at least four public records, two for each of "
                "two simulated sites; give it more"
            )

        return cls(data)

    def only(self, name: str) -> "PublicSites":
        """Return this one site."""
        return PublicSites({name: self.data[name]})

    def load(self, name: str) -> SiteData:
        """Return the data of one simulated site."""
        return self.data[name]

    def pooled(self) -> SiteData:
        """Return all data together."""
        sites = self.data.values()
        train = [example for site in sites for example in site.train]
        return SiteData(train, [e for site in sites for e in site.heldout], [], len(train), 0, 0)

    sample_from: Literal["site", "public"] | None = "public"
    """All text is public."""

    def sample(self) -> SiteData:
        """Return the data of the first simulated site."""
        return self.data[self.names[0]]

    def public(self) -> dict[str, list[Example]]:
        """Return the training text of the simulated sites."""
        return {name: site.train for name, site in self.data.items()}


def _split(examples: list[Example]) -> SiteData:
    count = max(1, round(HELDOUT * len(examples)))
    train = examples[:-count]
    return SiteData(train, examples[-count:][:MOST_HELDOUT], [], len(examples), 0, 0)


class Trial:
    """The rounds of one configuration on simulated sites; it can go on after it was measured."""

    def __init__(self, config: RunConfig, pool: ModelPool, sites: PublicSites) -> None:
        self.config = _without_sites(config)
        self.pool = pool
        self.sites = sites
        self.rounds = 0
        self.bytes = {"up": 0, "down": 0}
        """Bytes of all simulated sites so far, as they were sent."""
        context = Context(
            seed=config.seed,
            rounds=config.rounds,
            layout=pool.layout,
            codec=config.coding,
            downlink=config.downlink,
            train=config.train,
            open_pool=lambda: pool,
            secret=_no_secret,
            public=sites.public,
        )
        server = config.entry.server(self.config.method, context)
        assert isinstance(server, SharedModelServer), "a method with a budget has one model"
        self._server = server
        open_site = partial(site_of, self.config, pool=pool, texts=sites, store=StateStore(None))
        self._fleet = local_fleet(sites.names, open_site, tasks_of(self.config), self.config.fleet)
        self._fleet.answers_level = logging.DEBUG  # of hundreds of rounds that are not the run's
        server.setup(self._fleet)
        self._fleet.meter.close_round()

    def run_until(self, rounds: int) -> None:
        """Run the rounds up to this one."""
        while self.rounds < rounds:
            self.rounds += 1
            self._server.round(self.rounds, self._fleet)
            for sizes in self._fleet.meter.close_round().values():
                for way in self.bytes:
                    self.bytes[way] += directed(sizes, way)

    @property
    def model(self) -> Named:
        """Return the adapter that all simulated sites have trained."""
        return self._server.model()

    def loss(self) -> float:
        """Return the held-out loss of the present model, the mean over the simulated sites."""
        return heldout_loss(self.pool, self.model, self.sites)

    def close(self) -> None:
        """End the simulated sites."""
        self._fleet.close()


def heldout_loss(pool: ModelPool, state: Named, sites: PublicSites) -> float:
    """Return the mean over the simulated sites of the held-out loss under `state`."""
    pad = pool.tokenizer.pad_token_id
    with pool.model(state) as model:
        losses = [
            heldout(model, sites.load(name).heldout, pad_token_id=pad).loss for name in sites.names
        ]
    return sum(losses) / len(losses)


def base_loss(pool: ModelPool, sites: PublicSites) -> float:
    """Return the held-out loss of the base."""
    return heldout_loss(pool, base_state(pool.layout), sites)


def alone_loss(
    config: RunConfig,
    pool: ModelPool,
    sites: PublicSites,
    rounds: int,
    ran: Callable[[], None] = lambda: None,
) -> float:
    """Return the held-out loss where each simulated site trains alone, without a codec: the mean
    over the sites, each measured on its own text. `ran` is called after each round of a site."""
    alone = config.model_copy(update={"codec": IdentitySettings(), "downlink": None})
    losses = []
    for name in sites.names:
        trial = Trial(alone, pool, sites.only(name))
        for number in range(1, rounds + 1):
            trial.run_until(number)
            ran()
        losses.append(trial.loss())
        trial.close()

    return sum(losses) / len(losses)


def _without_sites(config: RunConfig) -> RunConfig:
    """Return `config` for simulated sites: all take part in a round, and none waits for others."""
    fleet = FleetConfig(workers=config.fleet.workers, threads=config.fleet.threads)
    changes: Mapping[str, object] = {"fraction": 1.0, "tgap": NO_TGAP}
    method = config.method.model_copy(update=dict(changes))
    return config.model_copy(update={"fleet": fleet, "method": method, "compare": ()})


def _no_secret() -> NoReturn:
    raise AssertionError("a budget is refused beside a promise of privacy")
