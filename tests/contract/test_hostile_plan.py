"""Lies of a site about itself, and of a server about a site's plan, in FedPipe: each value within
its own bounds, and together what no honest end sends."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fluvial.errors import WireError
from fluvial.federation.adapters import AggregationSettings
from fluvial.federation.sites import Site
from fluvial.federation.store import StateStore
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.measure import full_load
from fluvial.methods.fedpipe.planner.plan import Prediction, Setting, SitePlan
from fluvial.methods.fedpipe.site_configuration import VERSION, SiteConfiguration
from fluvial.methods.fedpipe.tasks import configure, run_assignment
from fluvial.runs.opening import site_of
from fluvial.wire.payload import Payload
from tests.contract.test_hostile_site import LIAR, with_values
from tests.contract.test_methods import SETTINGS
from tests.support.replay import Round, record


@pytest.fixture
def played(run_config: dict[str, Any], tmp_path: Path) -> Round:
    return record(run_config | copy.deepcopy(SETTINGS["fedpipe"]), tmp_path / "run")


def lying(task: str, lie: Callable[[Payload], bytes]) -> Callable[..., bytes]:
    """The liar's reply to one task goes through `lie`."""

    def change(asked: str, site: str, _number: int, data: bytes) -> bytes:
        return lie(Payload.from_bytes(data)) if (asked, site) == (task, LIAR) else data

    return change


PROFILES: dict[str, dict[str, Any]] = {
    "fastest": {"speeds": {"float32": [[1, 1e12]]}},
    "slowest": {"speeds": {"float32": [[1, 1e-6], [2, 1e12]]}},
    "largest batch": {"speeds": {"float32": [[2**40, 1e12]]}},
    "another format": {"speeds": {"nf4": [[1, 1.0]]}},
    "falling peaks": {"peaks": [[1, 1, False, 2**50], [2**40, 2**40, False, 1]]},
    "steep peaks": {"peaks": [[1, 1, False, 1], [2, 1, False, 2**50]]},
    "no memory": {"memory_bytes": 1},
    "all memory": {"memory_bytes": 2**50},
    "most samples": {"samples": 2**40, "tokens": [[2, 2**40], [2**40, 2**40]]},
    "one token": {"samples": 1, "tokens": [[1, 1]]},
    "slowest link": {"up_bytes_s": 1e-6, "down_bytes_s": 1e-6},
}


def test_a_lie_of_a_profile_changes_no_setting_of_the_other_sites(played: Round) -> None:
    _, _, honest = played.set_up(lambda _task, _site, _number, data: data)

    for what, lie in PROFILES.items():

        def forge(sent: Payload, lie: dict[str, Any] = lie) -> bytes:
            return with_values(sent.to_bytes(), {"profile": sent.value("profile", dict) | lie})

        server, fleet, metrics = played.set_up(lying("profile", forge))
        others = [site for site in honest["plans"] if site != LIAR]
        assert set(metrics["plans"]) >= set(others), what
        # A site that no plan fits is not probed, and the scores are those of the others.
        if LIAR in metrics["plans"]:
            for site in others:
                assert metrics["plans"][site] == honest["plans"][site], (what, site)
        assert {failure.site for failure in fleet.failures} <= {LIAR}, what
        assert server.state().to_bytes(), what


def test_a_site_that_claims_to_have_no_room_leaves_the_scores_to_the_others(played: Round) -> None:
    """Without room for a pass a site is not probed; all others are planned."""

    def forge(sent: Payload) -> bytes:
        return with_values(
            sent.to_bytes(), {"profile": sent.value("profile", dict) | {"peaks": []}}
        )

    _, _, honest = played.set_up(lambda _task, _site, _number, data: data)
    _, fleet, metrics = played.set_up(lying("profile", forge))
    assert {failure.site for failure in fleet.failures} <= {LIAR}
    assert set(metrics["plans"]) >= set(honest["plans"]) - {LIAR}
    assert metrics["scores"] != honest["scores"]


def test_a_format_that_the_planner_does_not_know_is_that_sites_failure(played: Round) -> None:
    def forge(sent: Payload) -> bytes:
        lie = sent.value("profile", dict) | {"speeds": {"int2": [[1, 1.0]]}}
        return with_values(sent.to_bytes(), {"profile": lie})

    _, fleet, metrics = played.set_up(lying("profile", forge))
    assert LIAR not in metrics["plans"]
    assert "'int2' is none of float32" in fleet.failures[0].reason


def test_a_site_has_at_most_its_share_of_the_scores(played: Round) -> None:
    """Its sample count alone would make its scores those of all sites."""

    def forge(sent: Payload) -> bytes:
        score = torch.zeros_like(sent.tensor("score"))
        score[-1] = 1.0
        return Payload({**sent.tensors, "score": score}, {"n": 2**31}).to_bytes()

    _, fleet, honest = played.set_up(lambda _task, _site, _number, data: data)
    _, _, metrics = played.set_up(lying("probe", forge))
    last = list(metrics["scores"])[-1]
    others = sum(score for name, score in metrics["scores"].items() if name != last)

    assert "clipped_probes" not in honest
    assert metrics["clipped_probes"][0]["site"] == LIAR
    # The other sites have what the share leaves; their own scores of the last weight are small.
    assert others > 0.5 * (1 - fleet.config.max_weight_share)


def plan_of(site: Site, **changes: Any) -> SiteConfiguration:
    """A plan that the run's settings allow, with changes."""
    run = run_assignment(site)
    steps = -(-full_load(site.train, len(site.load().train)) // 2)
    setting = Setting(run.precision, 2, 32, False, 1, steps)
    plan = SitePlan(setting, run.ranks[:1], 0, 0.0, 0.0, Prediction(0, 0, 0, 0.0, 0.0))
    configuration = SiteConfiguration.of(plan, run, ())
    assignment = {
        name: changes.pop(name) for name in ("batch", "precision", "ranks") if name in changes
    }
    ranks = assignment.pop("ranks", None)
    changed = replace(configuration.assignment, **assignment)
    if ranks is not None:
        changed = replace(run.with_ranks(ranks), batch=2)
    return replace(configuration, assignment=changed, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "bfloat16"}, "none of the formats float32"),
        ({"batch": 10**6}, "batch 1000000 is not in method.planner.batches"),
        ({"batch": 3}, "batch 3 is not in"),
        ({"steps": 7}, "7 steps of 2 sequences, where the round of this site has at most 6"),
        ({"steps": 10**9}, "1000000000 steps"),
        ({"checkpointing": True}, "method.planner.checkpointing is 'never'"),
        ({"ranks": 5}, "rank 5 of .* above the run's 4"),
    ],
)
def test_a_site_refuses_a_plan_that_the_run_does_not_allow(
    changes: dict[str, Any], words: str, played: Round, tmp_path: Path
) -> None:
    config = played.config
    assert isinstance(config.method, FedPipeConfig)
    planner = config.method.planner.model_copy(update={"checkpointing": "never"})
    method = config.method.model_copy(update={"planner": planner})
    texts: Any = played.run.texts
    site = site_of(
        config.model_copy(update={"method": method}),
        "north",
        played.run.pool,
        texts,
        StateStore(tmp_path / "sites"),
    )
    run = run_assignment(site)

    def message(configuration: SiteConfiguration) -> Payload:
        return Payload(values={**configuration.to_values(run), VERSION: 1})

    with pytest.raises(WireError, match=words):
        configure(site, message(plan_of(site, **changes)))
    assert not site.kept

    configure(site, message(plan_of(site)))
    assert "plan" in site.kept


@pytest.mark.parametrize(
    ("mode", "most", "trained"),
    [("svd", 4, 0), ("stack", 2, 2), ("residual", 6, 2)],
)
def test_a_site_refuses_a_side_path_beyond_that_of_the_mode(
    mode: Any, most: int, trained: int, played: Round
) -> None:
    """A rest of rank 2 beside the run's rank 4, and one module that the site trains at rank 4."""
    config = played.config
    assert isinstance(config.method, FedPipeConfig)
    site = site_of(config, "north", played.run.pool, cast(Any, played.run.texts), StateStore(None))
    run = run_assignment(site)
    rest = {} if mode == "svd" else {"residual_rank": 2}
    aggregation = AggregationSettings.model_validate({"mode": mode, **rest})
    plan = plan_of(site)
    own, other = (name for name, _ in run.ranks[:2])

    def with_side(side: dict[str, int]) -> SiteConfiguration:
        return replace(plan, assignment=plan.assignment.with_side(side, run))

    planner = config.method.planner
    with_side({own: trained, other: most}).check_allowed(planner, aggregation, run, 12)
    for side in ({other: most + 1}, {own: trained + 1}):
        with pytest.raises(WireError, match="a side path of rank"):
            with_side(side).check_allowed(planner, aggregation, run, 12)
