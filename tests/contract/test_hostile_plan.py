"""Lies of a site about itself, and of a server about a site's plan, in FedPipe: each value within
its own bounds, and together what no honest end sends."""

import copy
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fluvial.errors import WireError
from fluvial.federation.adapters import AggregationSettings
from fluvial.federation.sites import Site, adapter_message
from fluvial.federation.store import StateStore
from fluvial.methods.fedpipe import tasks
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.measure import full_load
from fluvial.methods.fedpipe.planner.plan import Prediction, Setting, SitePlan
from fluvial.methods.fedpipe.site_configuration import VERSION, SiteConfiguration
from fluvial.methods.fedpipe.tasks import configure, run_assignment
from fluvial.models.states import initial_state
from fluvial.runs.config import RunConfig
from fluvial.runs.opening import site_of
from fluvial.wire.frame import OVERHEAD
from fluvial.wire.payload import Payload, frame_payload, payload_frame
from tests.contract.test_hostile_site import LIAR, model_bytes, with_values
from tests.contract.test_methods import SETTINGS
from tests.support.replay import Round, record


@pytest.fixture(scope="module")
def recorded() -> list[Round]:
    """Recorded when it is asked for, once."""
    return []


@pytest.fixture
def played(recorded: list[Round], run_config: dict[str, Any], tmp_path: Path) -> Round:
    if not recorded:
        table = run_config | copy.deepcopy(SETTINGS["fedpipe"])
        recorded.append(record(table, tmp_path / "run"))
    return recorded[0]


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
        ({"memory": 0.2}, "training by it needs .* more than the 200 kB of this site"),
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
    site = site_at(played, config.model_copy(update={"method": method}), tmp_path / "sites")
    site.memory_mb = changes.pop("memory", None)

    with pytest.raises(WireError, match=words):
        configure(site, message(site, plan_of(site, **changes)))
    assert "plan" not in site.kept

    site.kept.clear()
    site.memory_mb = None
    configure(site, message(site, plan_of(site)))
    assert "plan" in site.kept


def site_at(played: Round, config: RunConfig, folder: Path | None = None) -> Site:
    """The site of north, with the data of a recorded round."""
    texts: Any = played.run.texts
    return site_of(config, "north", played.run.pool, texts, StateStore(folder))


def message(site: Site, configuration: SiteConfiguration) -> Payload:
    """The message that brings a configuration to a site."""
    return Payload(values={**configuration.to_values(run_assignment(site)), VERSION: 1})


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ({"ranks": -1}, "rank of .* -1 is not from 0"),
        ({"ranks": 10**400}, "is not from 0"),
        ({"ranks": float("nan")}, "ranks: expected a rank"),
        ({"ranks": {"MODULE": float("nan")}}, "is nan, expected a number"),
        ({"ranks": {"MODULE": True}}, "is True, expected a number"),
        ({"ranks": {"MODULE": -2}}, "-2 is not from 0"),
        ({"ranks": {"no.such": 2}}, "'no.such' has no adapter"),
        ({"side": {"MODULE": -2}}, "-2 is not from 0"),
        ({"side": {"no.such": 2}}, "'no.such' has no adapter"),
        ({"side": 2}, "side: expected ranks by module"),
        ({"batch": -1}, "-1 is not a number from 1"),
        ({"batch": float("nan")}, "nan is not a number from 1"),
        ({"precision": "int2"}, "'int2' is none of"),
        ({"quantization": "nf4"}, "none of the formats float32"),
        ({"quantization": "int2"}, "quantization"),
        ({"more": 1}, "unknown name 'more'"),
    ],
)
def test_a_site_refuses_an_assignment_that_no_model_has(
    assignment: dict[str, Any], words: str, played: Round
) -> None:
    site = site_at(played, played.config)
    good = message(site, plan_of(site))
    module = run_assignment(site).ranks[0][0]
    forged = {
        name: {key.replace("MODULE", module): rank for key, rank in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in assignment.items()
    }
    given = {**good.value("assignment", dict), **forged}
    with pytest.raises(WireError, match=words):
        configure(site, Payload(values={**good.values, "assignment": given}))
    assert not site.kept


def test_a_site_refuses_an_adapter_of_other_ranks_than_its_plan(
    played: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained, and the site keeps the plan that it has."""
    site = site_at(played, played.config)
    configure(site, message(site, plan_of(site)))
    kept = dict(site.kept)
    monkeypatch.setattr(tasks, "train_locally", lambda *_, **__: pytest.fail("it was trained"))
    run = run_assignment(site)
    own = plan_of(site).assignment
    (first, _), (second, _) = run.ranks[:2]
    none = dict.fromkeys(dict(run.ranks), 0)
    others = {
        "all modules": initial_state(run.layout, 1),
        "another rank": initial_state(run.with_ranks({**none, first: 2}).layout, 1),
        "another module": initial_state(run.with_ranks({**none, second: 4}).layout, 1),
        "a side path": initial_state(own.with_side({second: 4}, run).layout, 1),
        "another shape": {name: tensor.T for name, tensor in initial_state(own.layout, 1).items()},
    }
    forged = {
        what: adapter_message(adapter, round=1, **{VERSION: 1}) for what, adapter in others.items()
    }
    frame = payload_frame(adapter_message(initial_state(own.layout, 1)))
    nan = frame[:-8] + struct.pack("<f", float("nan"))
    whole = nan + struct.pack("<I", zlib.crc32(nan))
    forged["nan"] = frame_payload(whole, round=1, **{VERSION: 1})
    for what, sent in forged.items():
        with pytest.raises(WireError):
            tasks.train(site, sent)
        assert site.kept == kept, what

    honest = adapter_message(initial_state(own.layout, 1), round=1, **{VERSION: 1})
    with pytest.raises(pytest.fail.Exception, match="it was trained"):
        tasks.train(site, honest)


def test_scores_and_updates_beyond_all_bounds_are_that_sites_failure(played: Round) -> None:
    """Negative and infinite scores; scores so large that their sum is no fp32 number count as their
    shares."""
    for value in (-1.0, float("inf"), float("nan"), -3e38):
        for name in ("score", "spectrum"):

            def forge(sent: Payload, name: str = name, value: float = value) -> bytes:
                wrong = sent.tensor(name).clone()
                wrong.view(-1)[0] = value
                return Payload({**sent.tensors, name: wrong}, sent.values).to_bytes()

            _, fleet, metrics = played.set_up(lying("probe", forge))
            assert [failure.site for failure in fleet.failures] == [LIAR], (name, value)
            assert LIAR in metrics["plans"]  # what it measured of itself still holds

    def huge(sent: Payload) -> bytes:
        tensors = {name: torch.full_like(tensor, 3e38) for name, tensor in sent.tensors.items()}
        return Payload(tensors, sent.values).to_bytes()

    _, fleet, metrics = played.set_up(lying("probe", huge))
    assert not fleet.failures
    assert sum(metrics["scores"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize("factor", [50.0, 1e6])
def test_an_update_much_longer_than_the_others_is_that_sites_failure(
    factor: float, played: Round
) -> None:
    """The other sites go on as if it were silent."""

    def longer(task: str, site: str, _number: int, data: bytes) -> bytes:
        if (task, site) != ("train", LIAR):
            return data
        sent = Payload.from_bytes(data)
        honest = payload_frame(sent)
        head = OVERHEAD - 4
        values = np.frombuffer(honest[head:-4], "<f4") * np.float32(factor)
        frame = honest[:head] + values.tobytes()
        return frame_payload(frame + struct.pack("<I", zlib.crc32(frame)), **sent.values).to_bytes()

    def silent(task: str, site: str, _number: int, data: bytes) -> bytes | None:
        return None if (task, site) == ("train", LIAR) else data

    server, fleet, metrics = played.again(longer)
    alone, _, _ = played.again(silent)
    assert [failure.site for failure in fleet.failures] == [LIAR]
    assert metrics["sites"] == 2
    assert model_bytes(server) == model_bytes(alone)


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
    site = site_at(played, config)
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
