"""Sites of this process that have nothing but a name and a store, for the tests of fleets."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from fluvial.codecs.quantise import IdentitySettings
from fluvial.federation.config import FleetConfig
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import local_fleet
from fluvial.federation.sites import Site
from fluvial.federation.store import StateStore
from fluvial.federation.talk import Talk
from fluvial.methods.interface import MethodSettings
from fluvial.models.pool import ModelPool
from fluvial.training.config import TrainConfig
from fluvial.wire.payload import Limits, Payload

NAMES = ("a", "b", "c", "d")


def bare_site(name: str, store: StateStore) -> Site:
    """Return a site without model and data, in a run of one round."""
    return Site(
        name=name,
        seed=0,
        pool=cast(ModelPool, None),
        load=cast(Any, None),
        train=TrainConfig(),
        codec=IdentitySettings(),
        method=MethodSettings(name="bare"),
        downlink=None,
        store=store,
        rounds=1,
    )


def site_fleet(
    task: Callable[[Site, Payload], Payload | Talk],
    store: StateStore | None = None,
    limits: Limits | None = None,
    **settings: Any,
) -> Fleet:
    """Return a fleet of `NAMES` that runs `task` as "work", by default with two workers."""
    open_site = partial(bare_site, store=store or StateStore(None))
    config = FleetConfig.model_validate({"workers": 2} | settings)
    return local_fleet(NAMES, open_site, {"work": task}, config, limits=limits)
