"""Plans of sites: refusals, deadlines, plans made again, and the choices that they are compared
with."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from fluvial.errors import ConfigError
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.planner.candidates import Candidate, normalised
from fluvial.methods.fedpipe.planner.choice import RankChoice
from fluvial.methods.fedpipe.planner.deadline import (
    default_deadline_s,
    full_load_s,
    uniform_under_training,
)
from fluvial.methods.fedpipe.planner.decision import Planner
from fluvial.methods.fedpipe.planner.profile import Speed
from fluvial.methods.fedpipe.planner.refusal import Alternative, refusal
from fluvial.methods.fedpipe.planner.replanning import replanned
from fluvial.methods.fedpipe.planner.settings import PlannerSettings, SiteBudget
from fluvial.methods.fedpipe.planner.side_paths import with_side_path
from tests.support.planner import MB, candidates, models

RANKS = (2, 4, 8, 16, 32)
BLOCK = Alternative("fedcybgd", 8 * MB, "one block of the model")
ENDS = Alternative("flglm", 6 * MB, "its first and last layer")


def planner(seed: int = 0, rates: tuple[int, ...] = (1,), **settings: Any) -> Planner:
    given = {"formats": ("bfloat16", "nf4"), "batches": (1, 4), **settings}
    return Planner(
        candidates(seed),
        PlannerSettings.model_validate(given),
        length=64,
        format="bfloat16",
        rates=rates,
    )


def refused(memory_mb: float, deadline_s: float | None = None, **facts: Any) -> str:
    site = models(memory_bytes=round(memory_mb * MB), **facts)
    chosen = planner()
    assert chosen.plan(site, deadline_s) is None
    return str(refusal(chosen, "a", site, deadline_s, [BLOCK, ENDS]))


def test_a_base_that_does_not_fit_is_refused_with_the_method_that_would() -> None:
    words = refused(30)
    assert words.startswith("site 'a': the base in format nf4 needs 35.2 MB with the reserve")
    assert "more than its 30.0 MB; raise method.budgets.memory_mb, or add a smaller format" in words
    assert words.endswith(
        "or use method 'fedcybgd', which has one block of the model at the site and needs 8.00 MB"
    )
    assert "'flglm'" in refused(7)
    assert "or use method" not in refused(5)


def test_activations_that_do_not_fit_are_refused() -> None:
    words = refused(35.4)
    assert "a pass of 1 x 64 tokens over the base in format nf4 needs 35.9 MB" in words
    assert "; shorten data.max_length, or raise method.budgets.memory_mb" in words

    site = models(memory_bytes=round(35.4 * MB))
    words = str(refusal(planner(checkpointing="never", batches=(2, 4)), "a", site, None))
    assert "allow smaller method.planner.batches, allow method.planner.checkpointing, or" in words


def test_a_deadline_is_refused_with_the_link_or_the_work_that_misses_it() -> None:
    slow = refused(100, 5.0, up_bytes_s=10.0, latency_s=0.0)
    assert "the messages of the smallest adapter take" in slow
    assert "choose a codec of a higher rate" in slow

    busy = refused(100, 5.0, up_bytes_s=1e6, down_bytes_s=1e6, latency_s=0.0, samples=10**6)
    assert "steps of 4 sequences take" in busy
    assert "allow fewer" not in busy  # an eighth is the least
    assert "lower train.max_steps" in busy

    least = refused(100, 0.001, up_bytes_s=1e12, down_bytes_s=1e12, latency_s=0.0, samples=1)
    assert "1 step of" in least
    assert "shorten data.max_length, or raise method.deadline_s" in least
    assert "max_steps" not in least  # no round has fewer

    site = models(memory_bytes=100 * MB, samples=10**6, latency_s=0.0, up_bytes_s=1e6)
    words = str(refusal(planner(eighths=(8, 4)), "a", site, 5.0))
    assert "allow fewer method.planner.eighths" in words


def test_one_rank_for_all_needs_room_for_all() -> None:
    """Of 4 layers, 64 x 64 and 32 x 64 twice: 1,792 parameters for each rank."""
    choice = RankChoice(candidates(0), RANKS)
    assert choice.least("all") == 2 * 1792
    assert choice.least("importance") == 2 * 96
    site = models(memory_bytes=35_920_000)
    assert planner(selection="importance").plan(site) is not None
    assert planner(selection="all").plan(site) is None

    with pytest.raises(ConfigError, match="method.planner.ranks: each is larger"):
        RankChoice([replace(candidates(0)[0], rows=1)], RANKS).least("importance")


def test_the_deadline_is_the_full_load_of_the_middle_site() -> None:
    chosen = planner()
    sites = {
        name: models(memory_bytes=100 * MB, samples=samples, latency_s=0.0, up_bytes_s=1e6)
        for name, samples in (("a", 900), ("b", 100), ("c", 300))
    }
    sites["d"] = models(memory_bytes=MB)  # which holds no model and does not count
    loads = {name: full_load_s(chosen, site) for name, site in sites.items()}
    assert loads["d"] is None
    assert loads["c"] is not None
    assert default_deadline_s(chosen, sites) == loads["c"] * 1.2
    assert default_deadline_s(chosen, {"d": sites["d"]}) is None


def test_plans_leave_less_data_untrained_than_uniform_lora() -> None:
    """Sites with 0.75 to 4 times the memory, speed and link of the middle one."""
    chosen = planner(rates=(4,), batches=(1, 2, 4, 8, 16))
    sites = {
        str(number): models(
            memory_bytes=round(factor * 60 * MB),
            speeds={"bfloat16": (Speed(1, factor * 1000), Speed(16, factor * 3000))},
            up_bytes_s=factor * 2000.0,
            down_bytes_s=factor * 8000.0,
            latency_s=0.5,
            samples=800,
        )
        for number, factor in enumerate((0.75, 1.0, 1.0, 2.0, 4.0))
    }
    deadline_s = default_deadline_s(chosen, sites)
    assert deadline_s is not None
    uniform = {
        name: uniform_under_training(chosen, site, deadline_s, batch=4, length=64, rank=8)
        for name, site in sites.items()
    }
    plans = {name: chosen.plan(site, deadline_s) for name, site in sites.items()}
    left = {name: 1.0 if plan is None else plan.under_training for name, plan in plans.items()}
    assert sum(uniform.values()) > 0.5
    assert sum(left.values()) < sum(uniform.values()) / 2
    assert max(left.values()) < 1


def test_a_slow_site_processes_what_the_deadline_allows() -> None:
    chosen = planner(objective="value")
    site = models(memory_bytes=100 * MB, samples=1000, latency_s=0.0, up_bytes_s=1e6)
    full = full_load_s(chosen, site)
    assert full is not None
    plan = chosen.plan(site, full * 1.2 / 2)
    assert plan is not None
    assert 0 < plan.under_training < 0.75
    assert plan.prediction.seconds * 1.2 <= full * 1.2 / 2
    roomy = chosen.plan(site, full * 10)
    assert roomy is not None
    assert roomy.under_training == 0


def test_a_thin_link_chooses_a_higher_rate_and_a_smaller_adapter() -> None:
    chosen = planner(rates=(1, 16))
    wide = chosen.plan(models(memory_bytes=100 * MB, up_bytes_s=1e9, down_bytes_s=1e9))
    thin = chosen.plan(models(memory_bytes=100 * MB, up_bytes_s=1e2, down_bytes_s=1e2))
    assert wide is not None
    assert thin is not None
    assert (wide.setting.rate, thin.setting.rate) == (1, 16)
    assert thin.prediction.bytes_down < wide.prediction.bytes_down


@pytest.mark.parametrize(("critical_batch", "batch"), [(1, 1), (16, 4), (1e9, 16)])
def test_a_small_critical_batch_makes_more_and_smaller_steps(
    critical_batch: float, batch: int
) -> None:
    """At 16 sequences a token takes 1 / 2.5 of the time that it takes alone."""
    chosen = planner(critical_batch=critical_batch, batches=(1, 4, 16))
    plan = chosen.plan(models(memory_bytes=200 * MB, latency_s=0.0, up_bytes_s=1e6))
    assert plan is not None
    assert plan.setting.batch == batch


@pytest.mark.parametrize(
    ("setting", "low", "high"),
    [
        # Of equal value, the shortest round is the one with the least data.
        ("weight_of_data", 0.875, 0.0),
        # A coarse format leaves memory for higher ranks.
        ("weight_of_error", "nf4", "bfloat16"),
    ],
)
def test_weights_of_the_objective_decide(setting: str, low: object, high: object) -> None:
    changes: list[dict[str, Any]] = [{setting: weight} for weight in (0.0, 1.0)]
    plans = [
        planner(objective="value", **changed).plan(
            models(memory_bytes=round(86.5 * MB), samples=800)
        )
        for changed in changes
    ]
    assert None not in plans
    of = {
        "weight_of_data": lambda plan: plan.under_training,
        "weight_of_error": lambda plan: plan.setting.format,
    }[setting]
    assert list(map(of, plans)) == [low, high]


def test_a_higher_factor_of_safety_plans_fewer_steps() -> None:
    site = models(memory_bytes=100 * MB, samples=1000, latency_s=0.0, up_bytes_s=1e6)
    full = full_load_s(planner(objective="value"), site)
    assert full is not None
    plans = [planner(objective="value", safety=safety).plan(site, full) for safety in (1.0, 2.0)]
    left = [plan.under_training for plan in plans if plan is not None]
    assert left[0] < left[1]


def test_a_plan_changes_only_for_a_clear_gain() -> None:
    chosen = planner(objective="value")
    site = models(memory_bytes=60 * MB)
    present = chosen.plan(site)
    assert present is not None

    rich = replace(site, profile=replace(site.profile, memory_bytes=10**9))
    better = chosen.plan(rich)
    assert better is not None
    assert better.score > present.score
    gain = better.score / present.score - 1
    for hysteresis, expected in ((gain * 0.99, better), (gain * 1.01, present)):
        settings = chosen.settings.model_copy(update={"hysteresis": hysteresis})
        again = Planner(candidates(0), settings, length=64, format="bfloat16")
        assert replanned(again, rich, present) == expected

    poor = replace(site, profile=replace(site.profile, memory_bytes=45 * MB))
    assert replanned(chosen, poor, present) == chosen.plan(poor)
    none = replace(site, profile=replace(site.profile, memory_bytes=MB))
    assert replanned(chosen, none, present) is None


def test_a_plan_of_other_candidates_does_not_stay() -> None:
    present = planner().plan(models(memory_bytes=100 * MB))
    assert present is not None
    fewer = Planner(candidates(0)[:3], planner().settings, length=64, format="bfloat16")
    assert fewer.evaluated(models(memory_bytes=100 * MB), present) is None


@pytest.mark.parametrize("selection", ["importance", "uniform", "random", "all"])
@pytest.mark.parametrize("granularity", ["instance", "type"])
def test_every_choice_keeps_the_capacity(selection: Any, granularity: Any) -> None:
    weights = candidates(5, mlp=True)
    choice = RankChoice(weights, RANKS, granularity, seed=3)
    for capacity in range(0, choice.knapsack.total + 2000, 1777):
        ranks = choice.within(capacity, selection)
        assert ranks.lora <= capacity
        assert ranks.value <= choice.knapsack.value(capacity)
        if granularity == "type":
            by_type: dict[str, set[int]] = {}
            for module, rank in ranks.ranks:
                by_type.setdefault(module.rpartition(".")[2], set()).add(rank)
            assert all(len(found) == 1 for found in by_type.values())


def test_baselines_use_as_many_bytes_as_the_importance() -> None:
    weights = candidates(5)
    choice = RankChoice(weights, RANKS, seed=3)
    most = max(weight.width for weight in weights) * (RANKS[-1] - RANKS[-2])
    for capacity in (choice.knapsack.total // 4, choice.knapsack.total // 2):
        best = choice.within(capacity, "importance")
        for selection in ("uniform", "random"):
            other = choice.within(best.lora, selection)
            assert best.lora - most <= other.lora <= best.lora
            assert other.value < best.value

    uniform = dict(choice.within(choice.knapsack.total // 4, "uniform").ranks)
    assert sorted(set(uniform.values())) == [8]
    assert choice.within(9999, "random") != RankChoice(weights, RANKS, seed=4).within(
        9999, "random"
    )


def test_side_paths_add_to_the_download_of_a_site_that_trains_fewer_weights() -> None:
    site = models(memory_bytes=100 * MB, down_bytes_s=1000.0)
    plan = planner().plan(site)
    assert plan is not None
    few = replace(plan, ranks=plan.ranks[:2])
    sizes = {weight.module: 8 * weight.width for weight in candidates(0)}
    used = [module for module, _ in plan.ranks]
    assert with_side_path(plan, site, used, sizes) == plan

    other = with_side_path(few, site, used, sizes)
    parameters = sum(sizes[module] for module, _ in plan.ranks[2:])
    more = 4 * parameters + 8 * len(plan.ranks[2:])
    assert other.prediction.bytes_down - few.prediction.bytes_down == more
    assert other.prediction.link_s == pytest.approx(few.prediction.link_s + more / 1000)
    assert other.prediction.memory_bytes - few.prediction.memory_bytes == 4 * parameters
    assert other.prediction.bytes_up == few.prediction.bytes_up


def test_a_deadline_leaves_time_for_all_that_others_may_train() -> None:
    """A site's side path may be the whole adapter of the run, but what it trains itself."""
    weights = candidates(0)
    total = sum(weight.width * 32 for weight in weights)
    settings = PlannerSettings(ranks=(2, 4, 8, 16, 32), batches=(4,), formats=("bfloat16",))
    alone, beside = (
        Planner(weights, settings, length=64, format="bfloat16", beside=parameters)
        for parameters in (0, total)
    )
    site = models(memory_bytes=400 * MB, latency_s=0.0, down_bytes_s=2e4, up_bytes_s=1e6)
    free = beside.plan(site)
    assert free is not None
    assert free == alone.plan(site)

    sizes = {weight.module: weight.width * 32 for weight in weights}
    for deadline_s in (10.0, 20.0, 40.0, 80.0):
        plan = beside.plan(site, deadline_s)
        if plan is not None:
            widest = with_side_path(plan, site, sizes, sizes)
            assert widest.prediction.seconds * 1.2 <= deadline_s
    assert plan is not None


def test_a_plan_leaves_memory_for_all_that_others_may_train() -> None:
    """At each limit, also with the largest side path; a site with enough memory trains all."""
    sizes = {weight.module: 8 * weight.width for weight in candidates(0)}
    settings = PlannerSettings(ranks=(2, 4, 8), objective="value", formats=("nf4",), batches=(1,))
    chosen = Planner(
        candidates(0), settings, length=64, format="bfloat16", beside=sum(sizes.values())
    )
    planned = []
    for memory in range(35 * MB, 37 * MB, MB // 25):
        site = models(memory_bytes=memory)
        plan = chosen.plan(site)
        if plan is None:
            why = refusal(chosen, "north", site, None)
            assert why.needed > why.available == memory
            continue

        planned.append(len(plan.ranks))
        widest = with_side_path(plan, site, sizes, sizes)
        assert widest.prediction.memory_bytes <= memory

    assert 1 <= planned[0] < planned[-1] == len(sizes)


def test_ranks_stay_within_the_dimensions_of_a_weight() -> None:
    weight = replace(candidates(0)[0], rows=5)
    choice = RankChoice([weight], RANKS)
    assert choice.within(10**6, "importance").ranks == ((weight.module, 4),)


def test_scores_add_up_to_one_and_a_probe_without_a_step_ranks_all_alike() -> None:
    weights = candidates(1)
    assert sum(each.score for each in normalised(weights)) == pytest.approx(1)
    blank = [replace(weight, score=0.0) for weight in weights]
    assert {each.score for each in normalised(blank)} == {1 / len(weights)}


@pytest.mark.parametrize("objective", ["value", "value-per-second"])
def test_where_only_a_weight_of_no_importance_fits_it_is_tuned(objective: str) -> None:
    """k and v of 192 parameters at rank 2 fit, q and o of 256 do not."""
    weights = [
        replace(weight, score=0.0 if weight.rows == 32 else 1.0) for weight in candidates(0, 1)
    ]
    settings = planner(objective=objective).settings
    chosen = Planner(weights, settings, length=64, format="bfloat16")
    plan = chosen.plan(models(memory_bytes=35_892_000))
    assert plan is not None
    assert [rank for _, rank in plan.ranks] == [2]
    assert plan.ranks[0][0].endswith("k_proj")


def test_coverage_is_concave_and_complete_at_the_rank_of_the_probe() -> None:
    weight: Candidate = candidates(1)[0]
    covered = [weight.coverage(rank) for rank in range(34)]
    gains = [after - before for before, after in itertools.pairwise(covered)]
    assert covered[0] == 0
    assert covered[32] == covered[33] == pytest.approx(1)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(gains))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"ranks": []}, "ranks: names at least one number"),
        ({"ranks": [4, 4]}, "ranks: a number stands twice"),
        ({"formats": ["nf5"]}, "formats: 'nf5' is unknown"),
        ({"eighths": [9]}, "eighths"),
        ({"weight_of_data": 2.0}, "weight_of_data: without effect"),
        ({"selection": "all", "granularity": "type"}, "granularity: without effect"),
    ],
)
def test_settings_that_cannot_work_are_refused(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PlannerSettings.model_validate(table)


def test_a_speed_that_no_site_has_is_refused() -> None:
    with pytest.raises(ValidationError, match="speed"):
        SiteBudget.model_validate({"site": "north", "speed": 1e-9})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score_decay": 0.1}, "score_decay: without effect at replan_every=0"),
        ({"planner": {"hysteresis": 0.1}}, "planner.hysteresis: without effect at replan_every=0"),
    ],
)
def test_settings_of_later_plans_are_refused_where_there_is_none(
    change: dict[str, Any], words: str
) -> None:
    FedPipeConfig.model_validate({"replan_every": 1, **change})
    with pytest.raises(ValidationError, match=words):
        FedPipeConfig.model_validate({"replan_every": 0, **change})
