"""Guards of FedCyBGD: steps that are shortened, refused updates, and proxies that are too small."""

import json
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from fluvial.errors import ClientError, GateError
from fluvial.federation.sites import Task
from fluvial.methods.fedcybgd.guards import AcceptConfig, Judge
from fluvial.models.pool import ModelPool
from fluvial.seeds import generator
from fluvial.wire.tensors import Named, scale
from tests.support.fedcybgd import (
    FORMS,
    LAYERS,
    Stage,
    answering,
    differ,
)


@pytest.mark.parametrize(
    ("settings", "best", "share"),
    [
        ({}, 0.6, 1.0),
        ({}, 0.4, 0.5),  # a whole step would go from 0.4 to 0.6 away
        ({}, 0.2, 0.25),
        ({}, 0.1, 0.0),
        ({"halvings": 3}, 0.1, 0.125),
        ({"halvings": 0}, 0.4, 0.0),
        ({"halvings": 0, "slack": 0.21}, 0.4, 1.0),  # 0.36 against 0.16
        ({"slack": 0.1}, 0.4, 0.5),
        ({}, -1.0, 0.0),
    ],
    ids=str,
)
def test_a_step_is_halved_until_it_does_no_harm(
    settings: dict[str, Any], best: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a line, with the loss (x - best)^2 and a step from 0 to 1."""
    monkeypatch.setattr(Judge, "loss", lambda _self, state: (float(state["x"]) - best) ** 2)
    judge = Judge(AcceptConfig(on="public loss", **settings), cast(ModelPool, None), ())
    state = {"x": torch.tensor(0.0), "y": torch.tensor(7.0)}
    taken, before, after = judge.share(state, lambda part: {"x": torch.tensor(part)})
    assert taken == share
    assert before == pytest.approx(best**2)
    assert after == pytest.approx((share - best) ** 2)


ACCEPT: dict[str, Any] = {"accept": {"on": "public loss"}}


def random_and(size: float) -> Callable[[Named], Named]:
    """An update of normal values of this size; the weights that it disturbs are near 0.02."""

    def disturbed(update: Named) -> Named:
        return {
            name: size * torch.randn(tensor.shape, generator=generator(0))
            for name, tensor in update.items()
        }

    return disturbed


@pytest.mark.parametrize(
    "sabotage",
    [lambda update: scale(update, -50), random_and(1.0)],
    ids=["-50 times", "random and large"],
)
def test_a_sabotaged_update_is_refused(
    sabotage: Callable[[Named], Named], stage: Stage, task: Callable[[Task], None]
) -> None:
    """From the second cycle one site of four sabotages; without the guard it ruins the model.

    Not so much that gradients overflow: whether they do at weights of 1e3 depends on the processor.
    """
    table = stage.table(4, rounds=3, train={"learning_rate": 1e-2})
    guarded = table | {"method": table["method"] | ACCEPT}
    saboteur = stage.oracle(table).sites[1]
    task(answering(sabotage, saboteur, since=2))
    ruined = stage.play(table)
    saved = stage.play(guarded)
    before = stage.loss(table, saved.states[0])
    assert stage.loss(table, saved.state) < before
    assert stage.loss(table, ruined.state) > before + 0.3

    for record in saved.rounds:
        for visit in record["visits"]:
            assert (visit["share"] == 0) == (visit["site"] == saboteur and record["round"] > 1)

    assert saved.server.ledger.versions == [3, 1, 3, 3]


@pytest.mark.parametrize("size", [1e3, 1e6])  # int8 frames hold no more than 8e6
def test_an_update_that_overflows_is_refused_on_any_processor(
    size: float, stage: Stage, task: Callable[[Task], None]
) -> None:
    table = stage.table(4, rounds=2, train={"learning_rate": 1e-2})
    guarded = table | {"method": table["method"] | ACCEPT}
    saboteur = stage.oracle(table).sites[1]
    task(answering(random_and(size), saboteur))

    with pytest.raises(ClientError, match="root mean square"):  # before any kernel computes with it
        stage.play(guarded)


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        (1.0, math.nan, 0),
        (1.0, math.inf, 0),
        (math.inf, math.inf, 0),
        (math.nan, 2.0, 1),
        (2.0, 1.0, 1),
        (1.0, 2.0, 0),
    ],
)
def test_a_loss_that_is_not_finite_is_never_accepted(
    before: float, after: float, share: float
) -> None:
    class Told(Judge):
        def loss(self, state: Named) -> float:
            return after if state else before

    judge = Told(AcceptConfig(on="public loss"), pool=None, examples=())  # type: ignore[arg-type]
    found, _, _ = judge.share({}, lambda _share: {"moved": torch.zeros(1)})
    assert found == share


def test_a_step_that_is_too_long_is_shortened_and_sites_replay_it_so(
    stage: Stage, task: Callable[[Task], None]
) -> None:
    table = stage.table(4, {"accept": {"on": "public loss", "halvings": 6}})
    site = stage.oracle(table).sites[2]
    task(answering(lambda update: scale(update, 24), site))
    cache = stage.play(table)
    shares = [
        visit["share"]
        for record in cache.rounds
        for visit in record["visits"]
        if visit["site"] == site
    ]
    assert any(0 < share < 1 for share in shares)
    assert stage.loss(table, cache.state) < stage.loss(table, stage.oracle(table).start)
    full = stage.play(table | {"method": {**table["method"], **FORMS["full"]}})
    assert not differ(cache.state, full.state)


def test_honest_updates_pass_the_guard(stage: Stage) -> None:
    table = stage.table(4)
    plain = stage.play(table)
    guarded = stage.play(table | {"method": table["method"] | ACCEPT})
    assert not differ(plain.state, guarded.state)
    assert {visit["share"] for record in guarded.rounds for visit in record["visits"]} == {1.0}


def test_a_proxy_that_is_too_small_is_refused_before_anything_is_trained(stage: Stage) -> None:
    small = {"form": "proxy", "kept": 0.2, "drop": 0.0, "prune": "neurons and heads"}
    table = stage.table(4, {"download": small, "gate": {"threshold": 0.9}})
    folder = stage.folder()

    with pytest.raises(
        GateError,
        match=r"gradient of 'layer \d' has cosine 0\.\d+ to the exact one.*threshold is 0\.9",
    ):
        stage.play(table, folder)

    assert "layer" in json.loads((folder / "refused.json").read_text())["why"]
    assert not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text()


def test_the_more_of_the_model_a_proxy_keeps_the_better_its_gradients(stage: Stage) -> None:
    reports = []
    for kept in (0.3, 0.6, 0.9, 1.0):
        download = {"form": "proxy", "kept": kept, "drop": 0.0} | (
            {} if kept == 1 else {"prune": "neurons and heads"}
        )
        run = stage.opened(stage.table(4, {"download": download, "gate": {"threshold": 0.01}}))
        reports.append(run.server.setup(run.fleet)["gradient_cosines"])
        assert reports[-1].keys() == {f"layer {block}" for block in range(LAYERS)}

    means = [sum(report.values()) / LAYERS for report in reports]
    assert means == sorted(means)
    assert means[0] < 0.8
    assert list(reports[-1].values()) == pytest.approx(
        [1.0] * LAYERS
    )  # of equal gradients, in fp64
