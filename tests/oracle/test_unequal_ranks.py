"""Rounds of sites with adapters of unequal ranks, through fleet, codec and error feedback."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.codecs import CodecSettings, read_settings
from fluvial.codecs.klt.settings import KltSettings
from fluvial.data import IGNORE_INDEX, Example, SiteData
from fluvial.errors import ConfigError
from fluvial.exchange import Exchange
from fluvial.exchange.feedback import RESIDUAL
from fluvial.federation.adapters import (
    AggregationSettings,
    SiteChange,
    WholeAdapter,
    combine,
    redistribute,
    without_side,
)
from fluvial.federation.context import Context, Metrics
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import local_fleet
from fluvial.federation.sites import Site
from fluvial.federation.store import StateStore
from fluvial.methods.fedavg import METHOD, FedAvgConfig, terms
from fluvial.models.assignment import Assignment
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.training.config import TrainConfig
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, digest, moved, norm, subtract

pytestmark = pytest.mark.oracle

LORA = LoraSettings(r=6, lora_dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
TRAIN = TrainConfig(learning_rate=0.01, max_steps=2, per_device_train_batch_size=4)
SEED = 3
V_PROJ = "model.layers.1.self_attn.v_proj"
ROUNDS = 4
METHOD_SETTINGS = FedAvgConfig(aggregation=AggregationSettings(mode="svd"))


@pytest.fixture(scope="module")
def pool(tiny_model: Path) -> ModelPool:
    return ModelPool(ModelConfig(name_or_path=str(tiny_model), device="cpu"), LORA)


def examples(name: str) -> list[Example]:
    draw = torch.Generator().manual_seed(len(name))
    sequences = [torch.randint(3, 300, (10,), generator=draw).tolist() for _ in range(9)]
    return [Example(ids, [IGNORE_INDEX] * 5 + ids[5:]) for ids in sequences]


class Server:
    """A server half as short as can be: the assignments of a round, an exchange, an aggregate."""

    def __init__(self, pool: ModelPool, codec: CodecSettings, **table: Any) -> None:
        self.run = pool.assignment(TRAIN.per_device_train_batch_size)
        self.settings = AggregationSettings.model_validate(table)
        context = Context(
            seed=SEED,
            rounds=ROUNDS,
            layout=self.run.layout,
            codec=codec,
            downlink=None,
            train=TRAIN,
            open_pool=lambda: pool,
            secret=lambda: b"",
            public=dict,
        )
        self.fresh = initial_state(self.run.layout, SEED)
        self.whole = WholeAdapter(self.fresh)
        self.exchange = Exchange(context, self.fresh, terms(METHOD_SETTINGS, codec), run=self.run)
        self.received: dict[str, Named] = {}
        self.losses: list[float] = []

    def round(self, number: int, fleet: Fleet, assignments: Mapping[str, Assignment]) -> Metrics:
        """Run one round, as a method would."""
        changes = {}
        adapter_of = partial(redistribute, self.whole)
        for update in self.exchange.assigned_updates(fleet, assignments, adapter_of, round=number):
            received = self.exchange.received(update.site)
            trained = moved(without_side(received), update.tensors)
            changes[update.site] = SiteChange(received, trained, update.weight)
            self.received[update.site] = received
            assert update.loss is not None
            self.losses.append(update.loss)

        result = combine(self.whole, changes, self.settings, fresh=self.fresh)
        self.whole = result.whole
        return {**result.metrics(), **self.exchange.close_assigned()}


def fleet_of(
    pool: ModelPool, codec: CodecSettings, names: Mapping[str, Assignment], store: StateStore
) -> Fleet:
    def open_site(name: str) -> Site:
        data = SiteData(examples(name), examples(name)[:2], [], 0, 0, 0)
        return Site(
            name=name,
            seed=SEED,
            pool=pool,
            load=lambda: data,
            train=TRAIN,
            codec=codec,
            method=METHOD_SETTINGS,
            downlink=None,
            store=store,
            rounds=ROUNDS,
        )

    return local_fleet(list(names), open_site, METHOD.tasks)


def unequal(run: Assignment) -> dict[str, Assignment]:
    """Ranks from 2 to the run's; one site does not train a module, and has it as a side path."""
    return {
        "east": run,
        "north": run.with_ranks(2),
        "south": run.with_ranks({V_PROJ: 0}).with_side({V_PROJ: 12}, run),
        "west": run.with_ranks(2).with_side({V_PROJ: 4}, run),
    }


CODECS: list[dict[str, Any]] = [{"name": "identity"}, {"name": "int8", "error_feedback": True}]


@pytest.mark.parametrize("table", CODECS, ids=lambda table: table["name"])
def test_sites_of_unequal_ranks_train_together(pool: ModelPool, table: dict[str, Any]) -> None:
    codec = read_settings(table)
    server = Server(pool, codec)
    sites = unequal(server.run)
    fleet = fleet_of(pool, codec, sites, StateStore(None))

    for number in range(1, ROUNDS + 1):
        metrics = server.round(number, fleet, sites)
        assert metrics["aggregation_error_by_module"].keys() == dict(server.run.ranks).keys()
        assert 0 <= metrics["aggregation_error"] < 1
        assert "unchanged" not in metrics
        assert ("codec_error" in metrics) == codec.error_feedback

    for name, assignment in sites.items():
        assignment.layout.check(server.received[name], name)
    assert sum(server.losses[-4:]) < sum(server.losses[:4])


def test_error_feedback_survives_new_assignments(pool: ModelPool) -> None:
    """A site that gets another rank, other modules or a side path sends its residual in them."""
    codec = read_settings(CODECS[1])
    server = Server(pool, codec)
    plans = list(unequal(server.run).values())
    store = StateStore(None)
    fleet = fleet_of(pool, codec, unequal(server.run), store)

    for number in range(1, ROUNDS + 1):
        shifted = plans[number % 4 :] + plans[: number % 4]
        sites = dict(zip(unequal(server.run), shifted, strict=True))
        metrics = server.round(number, fleet, sites)
        assert metrics["codec_error"] < 0.05
        residual = store.read("north", RESIDUAL)
        assert Layout.of(residual.tensors) == sites["north"].trained

    assert sum(server.losses[-4:]) < sum(server.losses[:4])


def test_the_codec_of_each_layout_changes_little(pool: ModelPool) -> None:
    """int8 with error feedback ends near the exact exchange; a codec of another layout cannot."""
    ends = []
    for table in CODECS:
        codec = read_settings(table)
        server = Server(pool, codec)
        sites = unequal(server.run)
        fleet = fleet_of(pool, codec, sites, StateStore(None))
        server.round(1, fleet, sites)
        ends.append(server.whole)

    exact, coded = (_dense(end, V_PROJ) for end in ends)
    assert float((exact - coded).norm() / exact.norm()) < 0.05


def test_equal_assignments_are_the_exchange_without_any(pool: ModelPool) -> None:
    codec = read_settings(CODECS[1])
    results = []
    for assigned in (True, False):
        server = Server(pool, codec)
        sites = dict.fromkeys(("north", "south"), server.run)
        fleet = fleet_of(pool, codec, sites, StateStore(None))
        exchange = server.exchange
        updates = (
            exchange.assigned_updates(fleet, sites, partial(redistribute, server.whole), round=1)
            if assigned
            else exchange.updates(fleet, list(sites), server.fresh, round=1)
        )
        results.append({update.site: digest(update.tensors) for update in updates})
    assert results[0] == results[1]


def test_sites_with_a_side_path_compute_as_the_server(pool: ModelPool) -> None:
    """Every site's logits are those of the whole adapter, whatever it trains."""
    codec = read_settings(CODECS[0])
    server = Server(pool, codec)
    server.round(
        1, fleet_of(pool, codec, unequal(server.run), StateStore(None)), unequal(server.run)
    )
    ids = torch.tensor([examples("north")[0].input_ids])
    modules = dict(server.run.ranks)
    logits = []

    for ranks in (modules, dict.fromkeys(modules, 3), modules | {V_PROJ: 0}):
        assignment = server.run.with_ranks(ranks).with_side(dict.fromkeys(modules, 20), server.run)
        state = redistribute(server.whole, assignment)
        with pool.model(state, assignment=assignment) as model, torch.no_grad():
            logits.append(model(input_ids=ids).logits)

    with pool.model(initial_state(server.run.layout, SEED)) as model, torch.no_grad():
        base = model(input_ids=ids).logits
    moved_by = float((logits[0] - base).norm())
    for other in logits[1:]:
        assert float((other - logits[0]).norm()) < 1e-4 * moved_by


def test_a_state_restores_all_links(pool: ModelPool) -> None:
    codec = read_settings(CODECS[1])
    store = StateStore(None)
    server = Server(pool, codec)
    sites = unequal(server.run)
    fleet = fleet_of(pool, codec, sites, store)
    server.round(1, fleet, sites)
    state = server.exchange.state().to_bytes()

    again = Server(pool, codec)
    again.whole = server.whole
    again.exchange.restore(Payload.from_bytes(state))
    assert again.exchange.state().to_bytes() == state


def test_a_site_that_changes_nothing_is_named(pool: ModelPool) -> None:
    server = Server(pool, read_settings(CODECS[0]))
    tensors = redistribute(server.whole, server.run)
    change = SiteChange(tensors, dict(tensors), 3)
    result = combine(server.whole, {"idle": change}, server.settings, fresh=server.fresh)
    assert result.metrics()["unchanged"] == ["idle"]
    assert norm(subtract(result.whole.adapter, server.fresh)) == 0


def test_a_codec_that_learns_one_layout_is_refused(pool: ModelPool) -> None:
    codec = KltSettings()
    server = Server(pool, codec)
    sites = unequal(server.run)
    fleet = fleet_of(pool, codec, sites, StateStore(None))
    with pytest.raises(ConfigError, match=r"codec\.name='klt' learns from updates of one layout"):
        server.round(1, fleet, sites)


def _dense(whole: WholeAdapter, module: str) -> torch.Tensor:
    product = whole.product(module)
    return product.left @ product.right
