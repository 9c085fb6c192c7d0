"""Named tensors, the order-free mean and the seeds."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fluvial import seeds
from fluvial.errors import WireError
from fluvial.wire.tensors import (
    Layout,
    Named,
    WeightedMean,
    add,
    cosine,
    digest,
    energy,
    factor,
    inner,
    is_finite,
    norm,
    only,
    relative_error,
    scale,
    subtract,
    zeros_like,
)
from tests.support.memory import allocates_less

UPDATE = {
    "b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "a": torch.tensor([5.0, 6.0, 7.0]),
    "c": torch.tensor(8.0),
}


def mean_of(updates: list[Named], weights: list[int]) -> Named:
    """The mean as a server takes it: checked, then folded in the given order."""
    mean = WeightedMean()
    for update, weight in zip(updates, weights, strict=True):
        WeightedMean.check(update, weight)
        mean.add(update, weight)

    return mean.mean()


def bits(tensors: Named) -> dict[str, list[int]]:
    """Bit patterns, which tell 0 from -0."""
    return {name: tensor.reshape(-1).view(torch.int32).tolist() for name, tensor in tensors.items()}


def scattered(sites: int, size: int, seed: int, low: float = -30, high: float = 10) -> list[Tensor]:
    """`sites` fp32 vectors whose values run from 2^low to 2^high in size, with either sign."""
    numbers = np.random.default_rng(seed)
    exponents = numbers.uniform(low, high, (sites, size))
    return list(torch.from_numpy(numbers.choice([-1.0, 1.0], (sites, size)) * 2**exponents).float())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(1, 100_000), min_size=2, max_size=12),
    st.sampled_from([(-30, 10), (-60, 11), (10, 11), (-149, -100), (-24, -20)]),
)
def test_mean_does_not_depend_on_the_order(
    seed: int, weights: list[int], span: tuple[float, float]
) -> None:
    pairs = [
        ({"w": vector}, weight)
        for vector, weight in zip(scattered(len(weights), 16, seed, *span), weights, strict=True)
    ]
    first = bits(mean_of([update for update, _ in pairs], [weight for _, weight in pairs]))
    draw = random.Random(seed)

    for _ in range(8):
        draw.shuffle(pairs)
        assert (
            bits(mean_of([update for update, _ in pairs], [weight for _, weight in pairs])) == first
        )


def test_mean_does_not_depend_on_the_order_when_giants_cancel() -> None:
    """Partial sums reach 2^34 before they cancel down to small values."""
    giants = [
        sign * torch.tensor([2.0**27.9 - step, 2.0**27]) for step in range(64) for sign in (1, -1)
    ]
    vectors = giants + [
        0.001 * torch.randn(2, generator=torch.Generator().manual_seed(site)) for site in range(10)
    ]
    expected = np.stack([vector.double().numpy() for vector in vectors[len(giants) :]]).sum(
        0
    ) / len(vectors)
    draw = random.Random(0)

    for attempt in range(20):
        if attempt:  # the first order has all positive giants before all negative ones
            draw.shuffle(vectors)
        else:
            vectors.sort(key=lambda vector: -float(vector[0]))

        mean = mean_of([{"w": vector} for vector in vectors], [1] * len(vectors))["w"]
        assert torch.equal(mean, torch.from_numpy(expected).float())


@pytest.mark.parametrize("sites", [2, 7, 100])
def test_mean_equals_numpy_in_double_precision(sites: int) -> None:
    vectors = scattered(sites, 200, seed=sites, low=-20, high=5)
    weights = np.random.default_rng(sites).integers(1, 5000, sites)
    expected = np.average(
        np.stack([vector.numpy().astype(np.float64) for vector in vectors]), axis=0, weights=weights
    )
    mean = mean_of([{"w": vector} for vector in vectors], weights.tolist())["w"].numpy()
    # one rounding to fp32, and what float64 itself loses in a sum of this size
    np.testing.assert_allclose(mean, expected, rtol=2**-24, atol=1e-14 * sites)


@pytest.mark.parametrize("weight", [1, 3, 999, 12_345_677])
def test_mean_of_one_update_is_the_update(weight: int) -> None:
    update = {
        "w": scattered(1, 1000, seed=weight, low=-40, high=4)[0],
        "zero": torch.zeros(3),
        "scalar": torch.tensor(0.1),
    }
    assert bits(mean_of([update], [weight])) == bits(update)


def test_mean_weighs_its_updates() -> None:
    mean = mean_of([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}], [2, 1])
    assert mean["w"].tolist() == [2.0]


def test_mean_counts_what_it_has_seen_and_keeps_no_update() -> None:
    size = 10_000

    def filled() -> WeightedMean:
        mean = WeightedMean()

        for site in range(1, 51):
            update = {"w": torch.full((size,), 0.5)}
            mean.add(update, site)
            assert not torch.equal(update["w"], torch.zeros(size))

        return mean

    mean = filled()
    stored = [held for held in vars(mean).values() if isinstance(held, torch.Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in stored) == 2 * 8 * size
    assert allocates_less(filled, 100_000)
    assert (mean.count, mean.weight) == (50, 1275)


def test_adding_leaves_the_update_alone() -> None:
    update = {"w": torch.tensor([1.0, -2.0])}
    mean = WeightedMean()
    mean.add(update, 3)
    mean.add(update, 4)
    mean.mean()["w"].fill_(7)
    assert update["w"].tolist() == [1.0, -2.0]
    assert mean.mean()["w"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**28, -(2.0**28), 3e38])
def test_values_that_cannot_be_summed_are_refused(value: float) -> None:
    with pytest.raises(WireError, match=r"update of 'w': a value is NaN, Inf or beyond 2.68e\+08"):
        WeightedMean.check({"ok": torch.ones(2), "w": torch.tensor([0.0, value])}, 1)
    with pytest.raises(AssertionError, match="not checked before"):
        WeightedMean().add({"w": torch.tensor([value])}, 1)


def test_the_limit_holds_for_the_product_with_the_weight() -> None:
    update = {"w": torch.tensor([2.0**20])}
    WeightedMean.check(update, 255)
    with pytest.raises(WireError, match=r"beyond 1.05e\+06"):
        WeightedMean.check(update, 256)


def test_mean_of_nothing_and_weight_zero_are_bugs() -> None:
    with pytest.raises(AssertionError, match="mean of nothing"):
        WeightedMean().mean()
    with pytest.raises(AssertionError, match="weights are positive"):
        WeightedMean().add(UPDATE, 0)


def test_arithmetic_goes_name_by_name() -> None:
    doubled = add(UPDATE, UPDATE)
    assert doubled["a"].tolist() == [10, 12, 14]
    assert all(
        torch.equal(tensor, UPDATE[name]) for name, tensor in subtract(doubled, UPDATE).items()
    )
    assert scale(UPDATE, -0.5)["c"].item() == -4
    assert energy(zeros_like(UPDATE)) == 0
    assert energy(UPDATE) == 204
    assert norm(UPDATE) == math.sqrt(204)
    assert inner(UPDATE, scale(UPDATE, 2)) == 408


def test_sums_are_taken_in_double_precision() -> None:
    many = {"w": torch.full((2**20,), 1.0 + 2**-12), "one": torch.tensor([2.0**14])}
    assert energy(many) == 2**20 * (1.0 + 2**-12) ** 2 + 2.0**28


def test_cosine_of_known_angles() -> None:
    right = {"a": torch.tensor([1.0, 0.0])}
    assert cosine(right, {"a": torch.tensor([0.0, 3.0])}) == 0
    assert cosine(right, {"a": torch.tensor([-2.0, 0.0])}) == -1
    assert cosine(right, {"a": torch.tensor([1.0, 1.0])}) == pytest.approx(math.sqrt(0.5))
    assert cosine(right, {"a": torch.zeros(2)}) == 0
    assert cosine({}, {}) == 0


def test_relative_error_of_known_copies() -> None:
    assert relative_error(UPDATE, UPDATE) == 0
    assert relative_error(UPDATE, zeros_like(UPDATE)) == 1
    assert relative_error(UPDATE, scale(UPDATE, -1)) == 4
    assert relative_error(zeros_like(UPDATE), zeros_like(UPDATE)) == 0


def test_is_finite_sees_a_single_bad_value() -> None:
    assert is_finite(UPDATE)
    assert is_finite({"empty": torch.empty(0)})
    for bad in (math.nan, math.inf):
        assert not is_finite({**UPDATE, "d": torch.tensor([0.0, bad])})


def test_factors_are_told_apart_by_name() -> None:
    tensors = {
        name: torch.zeros(1)
        for name in ("q.lora_A.weight", "q.lora_B.weight", "lora_A", "norm.weight")
    }
    assert [factor(name) for name in tensors] == ["A", "B", None, None]
    assert list(only(tensors, "A")) == ["q.lora_A.weight"]
    assert list(only(tensors, "B")) == ["q.lora_B.weight"]


def test_digest_sees_everything_but_the_order() -> None:
    same = {name: UPDATE[name].clone() for name in sorted(UPDATE)}
    assert digest(same) == digest(UPDATE)
    assert digest({"b": UPDATE["b"].T.contiguous().T}) == digest({"b": UPDATE["b"]})
    others: list[Named] = [
        {**UPDATE, "a": torch.tensor([5.0, 6.0, 7.0 + 2**-20])},
        {**UPDATE, "a": UPDATE["a"].reshape(1, 3)},
        {**UPDATE, "a": UPDATE["a"].double()},
        {**UPDATE, "c": torch.tensor([8.0])},
        {**UPDATE, "z": torch.empty(0)},
        {"b": UPDATE["b"], "x": UPDATE["a"], "c": UPDATE["c"]},
        {"zero": torch.tensor([0.0])},
        {"zero": torch.tensor([-0.0])},
        {},
    ]
    assert len({digest(tensors) for tensors in [UPDATE, *others]}) == 1 + len(others)
    assert (
        len(
            digest(
                {
                    "h": torch.ones(3, dtype=torch.bfloat16),
                    "e": torch.empty(0, 4),
                    "k": torch.tensor(True),
                }
            )
        )
        == 64
    )


_shapes = st.dictionaries(
    st.text(st.sampled_from("abc.AB01"), min_size=1),
    st.lists(st.integers(0, 4), max_size=3),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(_shapes, st.integers(0, 2**32))
def test_flatten_and_unflatten_are_inverse(shapes: dict[str, list[int]], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    layout = Layout.of(tensors)
    vector = layout.flatten(tensors)
    assert vector.shape == (layout.numel,)
    assert layout.raw_bytes == 4 * sum(tensor.numel() for tensor in tensors.values())
    back = layout.unflatten(vector)
    assert list(back) == sorted(tensors) == list(layout.names)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(layout.flatten(back), vector)


def test_flatten_goes_in_order_of_the_names() -> None:
    assert Layout.of(UPDATE).flatten(UPDATE).tolist() == [5, 6, 7, 1, 2, 3, 4, 8]


def test_fingerprint_differs_for_other_names_and_shapes() -> None:
    others: list[Named] = [
        UPDATE,
        {**UPDATE, "a": torch.zeros(3, 1)},
        {**UPDATE, "b": torch.zeros(4)},
        {**UPDATE, "d": torch.zeros(0)},
        {name + "x": tensor for name, tensor in UPDATE.items()},
        {"b": UPDATE["b"], "a": UPDATE["a"]},
    ]
    assert len({Layout.of(tensors).fingerprint for tensors in others}) == len(others)
    assert Layout.of(zeros_like(UPDATE)).fingerprint == Layout.of(UPDATE).fingerprint


def test_a_foreign_layout_is_refused() -> None:
    layout = Layout.of(UPDATE)
    layout.check(zeros_like(UPDATE), "reply")
    wrong: list[tuple[Named, str]] = [
        (
            {"b": UPDATE["b"], "a": UPDATE["a"]},
            r"reply: tensors of another layout, first differences \[\('c', \(\)\)\]",
        ),
        (
            {**UPDATE, "a": torch.zeros(4)},
            r"first differences \[\('a', \(3,\)\), \('a', \(4,\)\)\]",
        ),
        (
            {**UPDATE, "a": UPDATE["a"].double()},
            "reply: 'a' is torch.float64, expected torch.float32",
        ),
        ({**UPDATE, "a": torch.tensor([1.0, math.nan, 1.0])}, "reply: NaN or Inf among the values"),
    ]

    for tensors, message in wrong:
        with pytest.raises(WireError, match=message):
            layout.check(tensors, "reply")

    with pytest.raises(AssertionError, match="another layout"):
        layout.flatten(wrong[1][0])


def test_any_part_of_the_purpose_gives_another_stream() -> None:
    purposes: list[tuple[str | int, ...]] = [
        (), ("train",), ("train", 1), ("train", "1"), ("train", 1, 1), (1, "train"), ("train", 11),
        ("train1",), ("train", 1, "a"), ("train", 1, "b"), ("a", "b"), ("a/str:b",), ("a/", "b"),
        ("a", "/b"), ("",), ("", ""),
    ]  # fmt: skip
    derived = [seeds.derive(seed, *purpose) for seed in (0, 1, -1, 2**70) for purpose in purposes]
    assert len(set(derived)) == len(derived)
    assert all(0 <= value < 2**63 for value in derived)
    draws = {
        tuple(seeds.generator(0, *purpose).initial_seed() for _ in range(1)) for purpose in purposes
    }
    assert len(draws) == len(purposes)


def test_the_same_purpose_repeats_its_stream() -> None:
    def torch_draw() -> list[float]:
        return torch.rand(4, generator=seeds.generator(3, "train", 1, "site")).tolist()

    def numpy_draw() -> list[float]:
        drawn: list[float] = seeds.numpy_generator(3, "train", 1, "site").random(4).tolist()
        return drawn

    assert torch_draw() == torch_draw()
    assert numpy_draw() == numpy_draw()
    assert torch_draw() != torch.rand(4, generator=seeds.generator(3, "train", 2, "site")).tolist()
    assert numpy_draw() != seeds.numpy_generator(3, "train", 2, "site").random(4).tolist()


def test_streams_are_the_same_on_every_machine() -> None:
    """Published runs depend on these numbers; a change of `derive` changes every run."""
    assert seeds.derive(0) == 2033344993903900207
    assert seeds.derive(7, "train", 3, "site-1") == 1906183273524517718


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_a_flattened_update_shares_no_memory_with_it(names: tuple[str, ...]) -> None:
    """Check that codecs may write into the vector, also where there is one tensor only."""
    update = {name: torch.ones(3, 2) for name in names}
    Layout.of(update).flatten(update).zero_()
    assert all(bool((tensor == 1).all()) for tensor in update.values())


def test_a_slice_of_a_longer_vector_is_unflattened() -> None:
    """Check that tensors begin where the slice does."""
    layout = Layout((("a", (2, 3)), ("b", (4,))))
    whole = torch.arange(15.0)
    tensors = layout.unflatten(whole[5:])
    assert torch.equal(layout.flatten(tensors), whole[5:])
    assert tensors["a"].tolist() == [[5, 6, 7], [8, 9, 10]]
    with pytest.raises(AssertionError, match="another layout"):
        layout.unflatten(whole)
