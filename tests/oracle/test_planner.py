"""FedPipe's planner against a mixed-integer programme and brute force, on random sites."""

import math
import random
import time
from itertools import product

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from fluvial.methods.fedpipe.planner.candidates import VALUE_UNIT, Candidate
from fluvial.methods.fedpipe.planner.decision import Models, Planner
from fluvial.methods.fedpipe.planner.formats import FORMATS
from fluvial.methods.fedpipe.planner.knapsack import Item, Knapsack
from fluvial.methods.fedpipe.planner.plan import Setting
from fluvial.methods.fedpipe.planner.settings import PlannerSettings
from tests.support.planner import candidates, models

RANKS = (2, 4, 8, 16, 32)
SETTINGS = PlannerSettings(
    objective="value",
    formats=("bfloat16", "int8", "nf4"),
    batches=(1, 4),
    lengths=(64,),
    eighths=(8, 4),
    layer_groups=1,
)
MIXED = SETTINGS.model_copy(update={"formats": ("bfloat16", "nf4"), "layer_groups": 4})


def planner(
    weights: list[Candidate],
    settings: PlannerSettings = SETTINGS,
    rates: tuple[int, ...] = (1,),
) -> Planner:
    return Planner(weights, settings, length=64, format="bfloat16", rates=rates)


def optimum(weights: list[Candidate], site: Models, deadline_s: float) -> float | None:
    """The best value of all settings, each a programme over one-hot choices of ranks, with memory
    and time as they are written in the specification (C2)."""
    total = sum(weight.score for weight in weights)
    gains = np.array(
        [
            [weight.score / total * sum(weight.spectrum[:rank]) / sum(weight.spectrum)
             for rank in (0, *RANKS)]
            for weight in weights
        ]
    )  # fmt: skip
    best = None
    for format, batch, checkpointing, eighths in product(
        SETTINGS.formats, SETTINGS.batches, (False, True), SETTINGS.eighths
    ):
        bytes_fixed, bytes_each = memory_terms(site, format, batch, checkpointing)
        steps = math.ceil(math.ceil(site.profile.samples / batch) * eighths / 8)
        s_fixed, s_each, done = time_terms(site, batch, checkpointing, steps, len(weights))
        parameters = np.array([[w.width * rank for rank in (0, *RANKS)] for w in weights])
        allowed = min(
            (site.profile.memory_bytes - bytes_fixed) / bytes_each,
            (deadline_s / 1.2 - s_fixed) / s_each,
        )
        if allowed < parameters[:, 1].min():
            continue

        value = programme(gains, parameters, allowed)
        value -= 1.0 * (1 - done / (1 + batch / 16)) + 0.5 * FORMATS[format].error
        best = value if best is None else max(best, value)

    return best


def programme(gains: np.ndarray, parameters: np.ndarray, allowed: float) -> float:
    """The optimum of one multiple-choice knapsack."""
    count, options = gains.shape
    one_each = np.kron(np.eye(count), np.ones(options))
    result = milp(
        -gains.ravel(),
        integrality=np.ones(count * options),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(parameters.reshape(1, -1).astype(float), 0, allowed),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    assert result.success
    return float(-result.fun)


def memory_terms(site: Models, format: str, batch: int, checkpointing: bool) -> tuple[float, float]:
    """Bytes without an adapter, and for each of its parameters."""
    sizes = site.memory.sizes
    bits = {"bfloat16": 16, "int8": 8 + 32 / 1000, "nf4": 4.5}[format]
    quantised = format != "bfloat16"
    tokens = batch * 64
    layer = tokens * 34 * sizes.hidden + 5 * batch * sizes.heads * 64**2
    held = (
        2 * tokens * sizes.hidden * sizes.layers + layer if checkpointing else sizes.layers * layer
    )
    fixed = (
        math.ceil(36_000_000 * bits / 8)
        + 2 * sizes.other
        + 2 * 1_000_000 * quantised
        + held
        + 6 * tokens * sizes.vocabulary
        + site.memory.reserve
    )
    inner = 8 * tokens / float(site.memory.candidate_width)
    return fixed, 16 + (inner / sizes.layers if checkpointing else inner)


def time_terms(
    site: Models, batch: int, checkpointing: bool, steps: int, modules: int
) -> tuple[float, float, float]:
    """Seconds without an adapter, seconds for each of its parameters, share of tokens processed."""
    profile = site.profile
    (curve,) = profile.speeds.values()
    speed = np.interp(batch, [s.batch for s in curve], [s.tokens_s for s in curve])
    sequences = min(steps * batch, profile.samples)
    tokens = math.ceil(profile.all_tokens * sequences / profile.samples)
    size = site.time.base_parameters
    unit = tokens / speed / (4 * size + 6 * site.time.lora_measured)
    way = 1 / profile.up_bytes_s + 1 / profile.down_bytes_s
    fixed = unit * (6 if checkpointing else 4) * size + (8 * modules + 1) * way + profile.latency_s
    each = unit * (8 if checkpointing else 6) + 4 * way
    return fixed, each, tokens / profile.all_tokens


def mixed_optimum(weights: list[Candidate], site: Models, deadline_s: float) -> float | None:
    """The best value where each layer is in bfloat16 or in nf4, any of them: programmes over
    one-hot choices of ranks, and a choice for each layer."""
    total = sum(weight.score for weight in weights)
    shares = [sum(w.score for w in weights if w.layer == layer) / total for layer in range(4)]
    gains = np.array(
        [
            [weight.score / total * sum(weight.spectrum[:rank]) / sum(weight.spectrum)
             for rank in (0, *RANKS)]
            for weight in weights
        ]
    )  # fmt: skip
    parameters = np.array([[w.width * rank for rank in (0, *RANKS)] for w in weights])
    half = FORMATS["bfloat16"].error
    lost = np.array(
        [0.5 * s * (e - half) for s, e in zip(shares, site.profile.errors["nf4"], strict=True)]
    )
    best = None
    for batch, checkpointing, eighths, mixes in product(
        MIXED.batches, (False, True), MIXED.eighths, (False, True)
    ):
        bytes_fixed, bytes_each = memory_terms(site, "bfloat16", batch, checkpointing)
        bytes_fixed += 2_000_000 * mixes  # one weight is decoded at a time
        steps = math.ceil(math.ceil(site.profile.samples / batch) * eighths / 8)
        s_fixed, s_each, done = time_terms(site, batch, checkpointing, steps, len(weights))
        value = choice_of_layers(
            gains,
            parameters,
            lost,
            bytes_each,
            saved=9_000_000 * (2 - 4.5 / 8) * mixes,
            free=site.profile.memory_bytes - bytes_fixed,
            timed=(deadline_s / 1.2 - s_fixed) / s_each,
        )
        if value is not None:
            value -= 1.0 * (1 - done / (1 + batch / 16)) + 0.5 * half
            best = value if best is None else max(best, value)

    return best


def choice_of_layers(
    gains: np.ndarray,
    parameters: np.ndarray,
    lost: np.ndarray,
    each: float,
    *,
    saved: float,
    free: float,
    timed: float,
) -> float | None:
    """The optimum of ranks and layers within `free` bytes and `timed` parameters."""
    count, options = gains.shape
    layers = len(lost)
    one_each = np.hstack([np.kron(np.eye(count), np.ones(options)), np.zeros((count, layers))])
    n = np.concatenate([parameters.ravel(), np.zeros(layers)])
    memory = each * n - saved * np.concatenate([np.zeros(count * options), np.ones(layers)])
    result = milp(
        np.concatenate([-gains.ravel(), lost]),
        integrality=np.ones(len(n)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(memory.reshape(1, -1) / 1e6, -np.inf, free / 1e6),
            LinearConstraint(n.reshape(1, -1), parameters[:, 1].min(), timed),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    return float(-result.fun) if result.success else None


def check_mixtures(seeds: range) -> None:
    mixed = 0
    for seed in seeds:
        draw = random.Random(seed)
        weights = candidates(seed)
        errors = tuple(draw.uniform(0.05, 0.5) for _ in range(4))
        site = models(seed, memory_bytes=draw.randrange(38, 90) * 10**6, errors={"nf4": errors})
        deadline_s = draw.uniform(20, 200)
        plan = planner(weights, MIXED).plan(site, deadline_s)
        best = mixed_optimum(weights, site, deadline_s)
        assert (plan is None) == (best is None), seed
        if plan is None or best is None:
            continue

        mixed += bool(plan.setting.layer_formats)
        assert plan.prediction.memory_bytes <= site.profile.memory_bytes
        assert plan.score == pytest.approx(best, abs=1e-5), seed

    assert mixed > len(seeds) // 4


def test_formats_by_layer_are_planned_as_well_as_by_a_mixed_integer_programme() -> None:
    """The programme may give nf4 to any of the layers, the planner to the first of its order."""
    check_mixtures(range(16))


@pytest.mark.slow
def test_1000_random_sites_have_formats_by_layer_as_good_as_a_mixed_integer_programme() -> None:
    check_mixtures(range(1000))


def check_against_the_programme(seeds: range) -> None:
    planned = 0
    for seed in seeds:
        draw = random.Random(seed)
        weights = candidates(seed, layers=draw.randrange(1, 5), mlp=draw.random() < 0.3)
        site = models(seed)
        deadline_s = draw.uniform(5, 200)
        plan = planner(weights).plan(site, deadline_s)
        best = optimum(weights, site, deadline_s)
        assert (plan is None) == (best is None), seed
        if plan is None or best is None:
            continue

        planned += 1
        assert plan.prediction.memory_bytes <= site.profile.memory_bytes
        assert plan.prediction.seconds * 1.2 <= deadline_s * (1 + 1e-9)
        assert plan.score >= best - 0.01 * abs(best) - 1e-6, seed
        assert plan.score <= best + 1e-6 * max(1, abs(best)) + len(weights) / VALUE_UNIT, seed

    assert planned > len(seeds) // 2


def test_40_random_sites_are_planned_as_well_as_by_a_mixed_integer_programme() -> None:
    check_against_the_programme(range(40))


@pytest.mark.slow
def test_1000_random_sites_are_planned_as_well_as_by_a_mixed_integer_programme() -> None:
    check_against_the_programme(range(1000))


@pytest.mark.parametrize("seed", range(30))
def test_small_knapsacks_equal_brute_force_at_every_capacity(seed: int) -> None:
    draw = random.Random(seed)
    items = []
    for _ in range(draw.randrange(1, 6)):
        costs = sorted(draw.sample(range(1, 40), draw.randrange(1, 4)))
        values = [draw.randrange(0, 50) for _ in costs]
        items.append(Item((0, *costs), (0, *values)))
    knapsack = Knapsack(items)

    for capacity in range(knapsack.total + 3):
        best = max(
            sum(item.values[option] for item, option in zip(items, options, strict=True))
            for options in product(*(range(len(item.costs)) for item in items))
            if sum(item.costs[o] for item, o in zip(items, options, strict=True)) <= capacity
        )
        options = knapsack.solution(knapsack.column(capacity))
        cost = sum(item.costs[o] for item, o in zip(items, options, strict=True))
        value = sum(item.values[o] for item, o in zip(items, options, strict=True))
        assert knapsack.value(capacity) == value == best
        assert cost <= capacity
        assert knapsack.bound(capacity) >= best * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_coarse_unit_keeps_the_capacity_and_loses_less_than_one_unit_a_weight(seed: int) -> None:
    draw = random.Random(seed)
    items = [
        Item(
            (0, *sorted(draw.sample(range(1000, 9999), 3))),
            (0, *sorted(draw.sample(range(999), 3))),
        )
        for _ in range(12)
    ]
    exact = Knapsack(items)
    coarse = Knapsack(items, most_units=1000)
    assert exact.exact
    assert not coarse.exact

    for capacity in range(0, exact.total, 997):
        options = coarse.solution(coarse.column(capacity))
        cost = sum(item.costs[o] for item, o in zip(items, options, strict=True))
        assert cost <= capacity
        lost = len(items) * coarse.unit
        assert exact.value(max(0, capacity - lost)) <= coarse.value(capacity)
        assert coarse.value(capacity) <= exact.value(capacity) <= exact.bound(capacity) + 1e-6


def test_a_plan_with_rounded_costs_says_how_far_it_is_from_the_best() -> None:
    """All settings but one are closed, so that both plans have the same capacity."""
    settings = SETTINGS.model_copy(
        update={"formats": ("nf4",), "batches": (1,), "eighths": (8,), "checkpointing": "always"}
    )
    weights = candidates(0, mlp=True)
    chosen = planner(weights, settings)
    site = models(0, memory_bytes=36_500_000)
    exact = chosen.plan(site)
    assert exact is not None
    assert chosen.gap(site, exact) == 0

    chosen.choice.knapsack = Knapsack(chosen.choice.knapsack.items, most_units=300)
    coarse = chosen.plan(site)
    assert coarse is not None
    gap = chosen.gap(site, coarse)
    assert 0 < gap < 0.2
    assert coarse.value < exact.value <= coarse.value * (1 + gap) + 1


@pytest.mark.parametrize("seed", range(10))
def test_value_per_second_equals_a_search_over_all_settings_and_capacities(seed: int) -> None:
    weights = candidates(seed, layers=1)
    site = models(seed, memory_bytes=40 * 10**6)
    settings = SETTINGS.model_copy(update={"objective": "value-per-second"})
    chosen = planner(weights, settings, (1, 16))
    best = 0.0
    for room in chosen.rooms(site, 60.0):
        for capacity in range(0, max(0, room.capacity) + 1, 16):
            ranks = chosen.choice.within(capacity, "importance")
            if ranks.lora:
                best = max(best, chosen.score(room, ranks))
            if capacity > chosen.choice.knapsack.total:
                break

    plan = chosen.plan(site, 60.0)
    assert plan is None if best == 0 else plan is not None and plan.score == best


@pytest.mark.parametrize("objective", ["value", "value-per-second"])
def test_more_memory_never_lowers_the_score(objective: str) -> None:
    settings = PlannerSettings.model_validate(
        {**SETTINGS.model_dump(), "objective": objective, "batches": (1, 2, 4, 8)}
    )
    for seed in range(10):
        before = -math.inf
        chosen = planner(candidates(seed), settings)
        for memory in range(20, 130, 5):
            plan = chosen.plan(models(seed, memory_bytes=memory * 10**6), 60.0)
            score = -math.inf if plan is None else plan.score
            assert score >= before
            before = score


def test_a_plan_is_the_same_for_any_order_of_the_candidates() -> None:
    weights = candidates(7, layers=4, mlp=True)
    other = list(weights)
    random.Random(1).shuffle(other)
    site = models(3, memory_bytes=60 * 10**6)
    assert planner(weights).plan(site, 90.0) == planner(other).plan(site, 90.0)


def test_a_plan_has_the_ranks_of_its_setting() -> None:
    chosen = planner(candidates(0))
    plan = chosen.plan(models(0, memory_bytes=60 * 10**6), 90.0)
    assert plan is not None
    assert isinstance(plan.setting, Setting)
    assert {rank for _, rank in plan.ranks} <= set(RANKS)
    assert [module for module, _ in plan.ranks] == sorted(module for module, _ in plan.ranks)


def test_128_weights_6_ranks_and_24_formats_and_batches_take_less_than_a_second() -> None:
    """They take 0.03 s of one core; the bound is forty times that, for any processor."""
    settings = SETTINGS.model_copy(
        update={
            "formats": ("bfloat16", "int8", "nf4", "nf4-double"),
            "batches": (1, 2, 4, 8, 16, 32),
            "checkpointing": "always",
            "eighths": (8,),
        }
    )
    weights = candidates(0, layers=32)
    site = models(0, memory_bytes=60 * 10**6)
    assert len(weights) == 128

    started = time.process_time()
    chosen = planner(weights, settings)
    assert len(list(chosen.rooms(site))) == 24
    assert chosen.plan(site) is not None
    assert time.process_time() - started < 1
