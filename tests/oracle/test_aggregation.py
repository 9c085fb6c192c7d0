"""Aggregates of unequal adapters against dense products, and sites that compute with one model."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fluvial.errors import ConfigError
from fluvial.federation.adapters import (
    AggregationSettings,
    Combined,
    SiteChange,
    WholeAdapter,
    combine,
    redistribute,
)
from fluvial.federation.adapters.low_rank import LowRank
from fluvial.models.assignment import Assignment
from fluvial.models.states import initial_state
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, WeightedMean, digest

pytestmark = pytest.mark.oracle

SIZES = {"layers.0.q_proj": (12, 10), "layers.1.v_proj": (9, 14)}
"""Rows and columns of the adapted weights."""
EXACT = 1e-5
"""Tolerance of the specification, relative; factors are stored in fp32."""


def layout(ranks: Mapping[str, int]) -> Layout:
    shapes = {}
    for module, (rows, columns) in SIZES.items():
        shapes[f"{module}.lora_A.weight"] = (ranks[module], columns)
        shapes[f"{module}.lora_B.weight"] = (rows, ranks[module])
    return Layout(tuple(sorted(shapes.items())))


def assignment(rank: int) -> Assignment:
    ranks = dict.fromkeys(SIZES, rank)
    return Assignment(layout(ranks), tuple(ranks.items()), 1, "float32")


def adapter(seed: int, rank: int) -> Named:
    draw = torch.Generator().manual_seed(seed)
    shapes = layout(dict.fromkeys(SIZES, rank)).shapes
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes}


def only(tensors: Named, module: str) -> Named:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(module)}


def start(rank: int) -> Named:
    return initial_state(assignment(rank).layout, 3)


def dense(tensors: Named, module: str) -> Tensor:
    """The product B A of one module, with its side path."""
    a, b = (f"{module}.lora_{which}.weight" for which in ("A", "B"))
    side_a, side_b = (f"{module}.lora_{which}.side.weight" for which in ("A", "B"))
    whole = torch.zeros(SIZES[module], dtype=torch.float64)
    for left, right in ((b, a), (side_b, side_a)):
        if left in tensors:
            whole = whole + tensors[left].double() @ tensors[right].double()
    return whole


def change(seed: int, rank: int, weight: int) -> SiteChange:
    """A site that began at the initial adapter and ends anywhere."""
    return SiteChange(start(rank), adapter(seed, rank), weight)


def aggregate(
    changes: Mapping[str, SiteChange],
    rank: int,
    before: WholeAdapter | None = None,
    **table: object,
) -> Combined:
    read = AggregationSettings.model_validate(table)
    return combine(before or WholeAdapter(start(rank)), changes, read, fresh=start(rank))


def mean_product(changes: Mapping[str, SiteChange], module: str) -> Tensor:
    samples = sum(each.weight for each in changes.values())
    terms = [dense(each.trained, module) * (each.weight / samples) for each in changes.values()]
    return torch.stack(terms).sum(dim=0)


def error(expected: Tensor, tensor: Tensor) -> float:
    return float((expected - tensor).norm() / expected.norm())


UNEQUAL = {"a": change(1, 2, 10), "b": change(2, 4, 30), "c": change(3, 3, 5)}


@pytest.mark.parametrize("mode", ["ab-mean", "pad", "stack", "svd", "residual"])
def test_one_site_of_the_full_rank_is_the_identity(mode: str) -> None:
    changes = {"a": change(1, 4, 7)}
    result = aggregate(changes, 4, mode=mode)
    for module in SIZES:
        whole = result.whole.product(module)
        assert error(dense(changes["a"].trained, module), whole.left @ whole.right) < EXACT


@pytest.mark.parametrize("mode", ["stack", "residual"])
def test_stack_and_residual_are_the_dense_mean(mode: str) -> None:
    result = aggregate(UNEQUAL, 4, mode=mode)
    for module in SIZES:
        whole = result.whole.product(module)
        assert error(mean_product(UNEQUAL, module), whole.left @ whole.right) < EXACT
        assert result.measures[module].error < EXACT
        assert result.measures[module].dropped < EXACT


def test_svd_of_the_full_rank_equals_stack() -> None:
    full = aggregate(UNEQUAL, 9, mode="svd")
    stacked = aggregate(UNEQUAL, 9, mode="stack")
    for module in SIZES:
        whole = stacked.whole.product(module)
        assert error(dense(full.whole.adapter, module), whole.left @ whole.right) < EXACT
        assert full.measures[module].retained == pytest.approx(1)


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 1000), min_size=4, max_size=4),
    kept=st.integers(1, 6),
    seed=st.integers(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_svd_is_the_optimum_of_eckart_and_young(
    ranks: list[int], weights: list[int], kept: int, seed: int
) -> None:
    """No matrix of the rank is nearer, at the server and after redistribution to a smaller rank."""
    most = max(kept, *ranks)
    changes = {f"site {n}": change(seed + n, rank, weights[n]) for n, rank in enumerate(ranks)}
    result = aggregate(changes, most, mode="svd")

    for module in SIZES:
        target = mean_product(changes, module)
        values = torch.linalg.svdvals(target)
        for rank in (most, kept):
            tensors = redistribute(result.whole, assignment(rank))
            best = float(values[rank:].norm())
            distance = float((target - dense(tensors, module)).norm())
            assert distance == pytest.approx(best, abs=EXACT * float(values.norm()))
        expected = float(values[:most].square().sum() / values.square().sum())
        assert result.measures[module].retained == pytest.approx(expected, abs=EXACT)


def test_singular_components_fall_and_have_fixed_signs() -> None:
    """Nearly equal singular values are the hard case, and a zero product has no components."""
    u, v = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64))[0] for n in (12, 10))
    for values in ([3.0, 2.0, 2.0 - 1e-9, 1e-3], [1.0, 1e-4, 1e-8, 0.0], [0.0] * 4):
        product = LowRank(u * torch.tensor(values, dtype=torch.float64), v.T)
        turned = LowRank(-product.left, -product.right)
        first, again = product.sorted(), turned.sorted()
        assert first.rank == sum(value > 0 for value in values)
        assert float((first.left @ first.right - product.left @ product.right).norm()) < 1e-12
        sizes = first.left.square().sum(dim=0)
        assert torch.allclose(sizes, torch.tensor(values[: first.rank], dtype=torch.float64))
        assert torch.allclose(first.left[:, :1], again.left[:, :1])


def test_the_mean_of_factors_is_not_the_mean_of_products() -> None:
    """Two sites with the same product and opposite signs of their factors: the mean is zero."""
    trained = adapter(1, 2)
    opposite = {name: -tensor for name, tensor in trained.items()}
    changes = {"a": SiteChange(start(2), trained, 1), "b": SiteChange(start(2), opposite, 1)}

    for mode in ("ab-mean", "pad"):
        result = aggregate(changes, 2, mode=mode)
        for module in SIZES:
            assert float(dense(result.whole.adapter, module).norm()) == 0
            assert result.measures[module].error == pytest.approx(1)

    right = aggregate(changes, 2, mode="svd")
    for module in SIZES:
        assert error(dense(trained, module), dense(right.whole.adapter, module)) < EXACT
        assert right.measures[module].error < EXACT


def test_the_error_is_that_of_the_dense_products() -> None:
    for mode in ("pad", "svd"):
        result = aggregate(UNEQUAL, 4, mode=mode)
        for module in SIZES:
            exact = mean_product(UNEQUAL, module)
            expected = error(exact, dense(result.whole.adapter, module))
            assert result.measures[module].error == pytest.approx(expected, abs=1e-6)


def test_ab_mean_is_fedavg_up_to_rounding() -> None:
    changes = {name: change(n, 3, 5 + n) for n, name in enumerate("abc")}
    mean = WeightedMean()
    for each in changes.values():
        mean.add(each.trained, each.weight)
    result = aggregate(changes, 3, mode="ab-mean")
    for name, tensor in mean.mean().items():
        assert torch.allclose(tensor, result.whole.adapter[name], rtol=1e-6, atol=1e-7)


def test_pad_weighs_by_the_norm_of_the_products() -> None:
    changes = {"a": change(1, 2, 1000), "b": change(2, 4, 1)}
    norms = {
        name: sum(float(dense(each.trained, module).square().sum()) for module in SIZES) ** 0.5
        for name, each in changes.items()
    }
    share = norms["a"] / sum(norms.values())
    result = aggregate(changes, 4, mode="pad")
    for name, tensor in result.whole.adapter.items():
        small, large = changes["a"].trained[name], changes["b"].trained[name]
        padded = torch.zeros_like(large)
        padded[: small.shape[0], : small.shape[1]] = small
        assert torch.allclose(tensor, share * padded + (1 - share) * large, atol=1e-6)


def test_products_that_are_zero_have_the_weights_of_samples() -> None:
    """HetLoRA's weights are zero there, and a relative error has no unit; both stay finite."""
    changes = {"a": SiteChange(start(2), start(2), 1), "b": SiteChange(start(4), start(4), 3)}
    result = aggregate(changes, 4, mode="pad")
    a = f"{min(SIZES)}.lora_A.weight"
    assert torch.allclose(result.whole.adapter[a][2:], 0.75 * start(4)[a][2:])
    assert {each.error for each in result.measures.values()} == {0.0}


def test_ffa_is_exact_and_needs_one_a() -> None:
    shared = start(4)
    changes = {}
    for name, rank in (("a", 2), ("b", 4), ("c", 3)):
        own = {
            key: tensor[:rank] if ".lora_A." in key else tensor[:, :rank]
            for key, tensor in shared.items()
        }
        noise = adapter(rank, rank)
        trained = {key: own[key] if ".lora_A." in key else noise[key] for key in own}
        changes[name] = SiteChange(own, trained, rank)

    result = aggregate(changes, 4, mode="ffa")
    for module in SIZES:
        assert error(mean_product(changes, module), dense(result.whole.adapter, module)) < EXACT
        assert result.measures[module].error < EXACT
    with pytest.raises(ConfigError, match=r"method\.factors='B'"):
        aggregate(UNEQUAL, 4, mode="ffa")


def test_unequal_factors_have_no_mean() -> None:
    with pytest.raises(ConfigError, match=r"ranks \[2, 3, 4\]"):
        aggregate(UNEQUAL, 4, mode="ab-mean")


@pytest.mark.parametrize("mode", ["pad", "stack", "svd", "residual"])
def test_the_order_of_arrival_changes_no_bit(mode: str) -> None:
    results = [
        aggregate(dict(order), 4, mode=mode) for order in itertools.permutations(UNEQUAL.items())
    ]
    assert len({digest(each.whole.adapter) for each in results}) == 1
    assert len({digest(each.whole.rest) for each in results}) == 1
    assert len({str(each.metrics()) for each in results}) == 1


def test_a_module_is_averaged_over_the_sites_that_train_it() -> None:
    """With `absent = "count"`, the site that does not train it counts as no change."""
    module, other = SIZES
    partial = SiteChange(start(4), only(adapter(1, 4), module), 30)
    whole = change(2, 4, 10)
    changes = {"a": partial, "b": whole}

    alone = aggregate(changes, 4, mode="svd").whole.adapter
    assert error(dense(whole.trained, other), dense(alone, other)) < EXACT
    both = 0.75 * dense(partial.trained, module) + 0.25 * dense(whole.trained, module)
    rest = aggregate(changes, 4, mode="svd").whole.product(module)
    assert error(both, rest.left @ rest.right) < EXACT

    counted = aggregate(changes, 4, mode="svd", absent="count").whole.adapter
    assert error(0.25 * dense(whole.trained, other), dense(counted, other)) < EXACT


def test_a_module_that_nobody_trains_stays() -> None:
    module, other = SIZES
    result = aggregate({"a": SiteChange(start(4), only(adapter(1, 4), module), 3)}, 4, mode="svd")
    assert digest(only(result.whole.adapter, other)) == digest(only(start(4), other))
    assert list(result.measures) == [module]


def test_nothing_is_lost_over_rounds_with_feedback() -> None:
    """What the rank cannot hold is in the rest, so changes of later rounds add to all of it."""
    whole = WholeAdapter(start(3))
    expected = {module: torch.zeros(size, dtype=torch.float64) for module, size in SIZES.items()}

    for number in range(4):
        changes = {}
        for place, rank in enumerate((1, 2, 3)):
            received = redistribute(whole, assignment(rank))
            noise = adapter(10 * number + place, rank)
            trained = {name: tensor + 0.1 * noise[name] for name, tensor in received.items()}
            changes[f"site {place}"] = SiteChange(received, trained, 1 + place)

        for module in SIZES:
            for each in changes.values():
                moved = dense(each.trained, module) - dense(each.received, module)
                expected[module] += moved * (each.weight / 6)

        result = aggregate(changes, 3, whole, mode="svd", residual_rank=14)
        whole = result.whole
        assert all(each.dropped < 1e-10 for each in result.measures.values())
        whole = WholeAdapter(start(3)).restored(Payload.from_bytes(whole.state().to_bytes()))

    for module in SIZES:
        product = whole.product(module)
        assert error(expected[module], product.left @ product.right) < EXACT


def test_a_bounded_rest_drops_what_is_measured() -> None:
    changes = {name: change(n, 2, 1) for n, name in enumerate("abcd")}
    result = aggregate(changes, 2, mode="svd", residual_rank=3)
    for module in SIZES:
        values = torch.linalg.svdvals(mean_product(changes, module)).square()
        expected = float(values[5:].sum() / values.sum())
        assert result.measures[module].dropped == pytest.approx(expected, rel=1e-5)
        assert result.whole.rest_of(module).rank == 3


def test_a_site_of_low_rank_lowers_nothing_that_it_cannot_hold() -> None:
    """With `target = "products"` (FlexLoRA) the components beyond its rank shrink instead."""
    whole = aggregate({"a": change(1, 4, 1)}, 4, mode="svd").whole
    received = {rank: redistribute(whole, assignment(rank)) for rank in (1, 4)}
    idle = {f"rank {rank}": SiteChange(t, dict(t), 1) for rank, t in received.items()}

    ours = aggregate(idle, 4, whole, mode="svd")
    published = aggregate(idle, 4, whole, mode="svd", target="products")
    assert ours.unchanged == ("rank 1", "rank 4")
    assert ours.metrics()["unchanged"] == ["rank 1", "rank 4"]
    for module in SIZES:
        before = dense(whole.adapter, module)
        assert error(before, dense(ours.whole.adapter, module)) < EXACT
        assert float(dense(published.whole.adapter, module).norm()) < 0.9 * float(before.norm())


def test_a_side_path_gives_every_site_the_whole_function() -> None:
    """Whatever ranks a site trains, none included, B A and the side path together are the whole."""
    module, other = SIZES
    run = assignment(4)
    whole = aggregate(UNEQUAL, 4, mode="svd").whole

    for ranks in ({module: 0, other: 4}, {module: 1, other: 2}, {module: 4, other: 4}):
        site = run.with_ranks(ranks)
        sides = {name: min(9 - rank, min(SIZES[name])) for name, rank in ranks.items()}
        site = site.with_side(sides, run)
        tensors = redistribute(whole, site)
        site.layout.check(tensors, "test")
        for name in SIZES:
            product = whole.product(name)
            assert error(product.left @ product.right, dense(tensors, name)) < EXACT


def test_components_that_are_zero_can_train() -> None:
    """A and B are never both zero; B is zero where nothing was learned, so the product is right."""
    result = aggregate({"a": change(1, 2, 1)}, 6, mode="svd").whole
    site = redistribute(result, assignment(6))
    for module in SIZES:
        assert bool((site[f"{module}.lora_A.weight"].norm(dim=1) > 0).all())
        assert not site[f"{module}.lora_B.weight"][:, 2:].any()


@pytest.mark.parametrize(
    ("table", "place"),
    [
        ({"mode": "pad", "residual_rank": 4}, "residual_rank: without effect"),
        ({"mode": "pad", "measure": "always"}, "measure: without effect"),
        ({"mode": "residual", "residual_rank": 0}, "would drop what sites trained"),
        ({"mode": "stack", "target": "products"}, "target: without effect"),
    ],
)
def test_settings_without_effect_are_refused(table: dict[str, object], place: str) -> None:
    with pytest.raises(ValueError, match=place):
        AggregationSettings.model_validate(table)
