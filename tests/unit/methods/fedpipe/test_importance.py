"""Scores of weights: what they say at B = 0, what they do not depend on, and their means."""

import pytest
import torch

from fluvial.errors import WireError
from fluvial.federation.adapters import factor_names, modules_of
from fluvial.methods.fedpipe.importance import (
    Meter,
    averaged,
    best,
    federated,
    normalised,
    overlap,
    read_scores,
    spectrum,
)
from fluvial.methods.fedpipe.scores import Probe, Scores
from fluvial.wire.tensors import Named

MODULES = ("a", "b")


def factors(seed: int, *, rank: int = 3) -> Named:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=draw)
        for module in MODULES
        for name, shape in zip(reversed(factor_names(module)), ((rank, 7), (5, rank)), strict=True)
    }


def gradients(state: Named, seed: int) -> Named:
    """Gradients of the factors, of a loss whose gradient in B A is random."""
    draw = torch.Generator().manual_seed(seed)
    result = {}
    for module in MODULES:
        name_b, name_a = factor_names(module)
        of_product = torch.randn(5, 7, generator=draw)
        result[name_a] = state[name_b].T @ of_product
        result[name_b] = of_product @ state[name_a].T
    return result


def turned(state: Named, seed: int) -> Named:
    """The same products from other factors: (B R, R^-1 A)."""
    draw = torch.Generator().manual_seed(seed)
    result = {}
    for module in MODULES:
        name_b, name_a = factor_names(module)
        change = torch.randn(3, 3, generator=draw, dtype=torch.float64) @ torch.diag(
            torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
        )
        result[name_b] = (state[name_b].double() @ change).float()
        result[name_a] = torch.linalg.solve(change, state[name_a].double()).float()
    return result


def scored(state: Named, which: str, *, steps: int = 3) -> dict[str, float]:
    meter = Meter(MODULES)
    for step in range(steps):
        meter.watch(state, gradients(state, step))
    return meter.score(state, which)  # type: ignore[arg-type]


def test_a_step_from_the_start_says_nothing() -> None:
    """At B = 0 all products of B with its gradient are 0, and the gradient of A is."""
    start = {
        name: torch.zeros_like(tensor) if ".lora_B." in name else tensor
        for name, tensor in factors(1).items()
    }
    meter = Meter(MODULES)
    meter.watch(start, gradients(start, 1))
    assert meter.score(start, "invariant") == {"a": 0.0, "b": 0.0}
    assert meter.score(start, "sensitivity") == {"a": 0.0, "b": 0.0}

    later = factors(1)
    meter.watch(later, gradients(later, 2))
    alone = Meter(MODULES)
    alone.watch(later, gradients(later, 2))
    assert meter.score(later, "invariant") == alone.score(later, "invariant")
    assert meter.score(later, "sensitivity") == alone.score(later, "sensitivity")


def test_two_scores_do_not_depend_on_the_balance_of_the_factors() -> None:
    state = factors(2)
    other = turned(state, 3)
    for which in ("invariant", "spectral"):
        assert scored(other, which) == pytest.approx(scored(state, which), rel=1e-4)
    # Entry-wise products depend on it, which is why they are not the default.
    assert scored(other, "sensitivity")["a"] != pytest.approx(
        scored(state, "sensitivity")["a"], rel=0.05
    )


def test_the_invariant_score_is_the_product_with_the_gradient_of_the_change() -> None:
    state = factors(4)
    name_b, name_a = factor_names("a")
    draw = torch.Generator().manual_seed(0)
    of_product = torch.randn(5, 7, generator=draw)
    expected = abs(float(((state[name_b] @ state[name_a]) * of_product).sum()))
    assert scored(state, "invariant", steps=1)["a"] == pytest.approx(expected, rel=1e-5)


def test_the_spectrum_is_that_of_the_product() -> None:
    state = factors(5)
    name_b, name_a = factor_names("b")
    dense = torch.linalg.svdvals((state[name_b] @ state[name_a]).double())
    assert torch.allclose(spectrum(state[name_a], state[name_b]), dense[:3])


def test_sensitivity_is_adaloras() -> None:
    """Moving averages of abs(w g) and of its distance from the average; their product, by
    triplet."""
    state = factors(6)
    step = gradients(state, 1)
    meter = Meter(MODULES)
    meter.watch(state, step)
    name_b, name_a = factor_names("a")

    def by_entry(name: str) -> torch.Tensor:
        value = (state[name] * step[name]).abs().double()
        mean = 0.15 * value
        return mean * (0.15 * (value - mean).abs())

    expected = float((by_entry(name_a).mean(dim=1) + by_entry(name_b).mean(dim=0)).sum())
    assert meter.score(state, "sensitivity")["a"] == pytest.approx(expected)


def test_the_federated_score_is_the_mean_of_normalised_ones() -> None:
    by_site = {"x": {"a": 300.0, "b": 100.0}, "y": {"a": 0.0, "b": 2.0}}
    mean = federated(by_site, {"x": 1, "y": 3})
    assert mean == pytest.approx({"a": 0.75 / 4, "b": 0.25 / 4 + 3 / 4})
    reordered = {site: by_site[site] for site in ("y", "x")}
    assert federated(reordered, {"y": 3, "x": 1}) == mean
    assert normalised({"a": 0.0, "b": 0.0}) == {"a": 0.5, "b": 0.5}


def test_scores_are_a_moving_average_over_probes() -> None:
    assert averaged({}, {"a": 1.0}, 0.5) == {"a": 1.0}
    assert averaged({"a": 1.0}, {"a": 0.0}, 0.25) == {"a": 0.25}

    scores = Scores()
    scores.take({"x": Probe({"a": 1.0, "b": 0.0}, {"a": (1.0,), "b": (1.0,)}, 1)}, 0.5)
    scores.take({"x": Probe({"a": 0.0, "b": 1.0}, {"a": (0.0,), "b": (1.0,)}, 1)}, 0.5)
    assert scores.score == {"a": 0.5, "b": 0.5}
    assert scores.spectrum["a"] == [0.5]
    assert Scores.from_values(scores.to_values()) == scores


def test_the_best_modules_of_two_scores_overlap() -> None:
    left = {"a": 3.0, "b": 2.0, "c": 1.0, "d": 1.0}
    assert best(left, 3) == ["a", "b", "c"]
    assert overlap(left, {"a": 1.0, "b": 0.0, "c": 5.0, "d": 9.0}, 2) == 0.0
    assert overlap(left, left, 2) == 1.0


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_score_that_no_probe_gives_is_refused(value: float) -> None:
    with pytest.raises(WireError, match="scores"):
        read_scores(torch.tensor([1.0, value]), MODULES)
    with pytest.raises(WireError, match="expected"):
        read_scores(torch.ones(3), MODULES)


def test_modules_are_those_that_have_factors() -> None:
    assert modules_of(list(factors(1))) == ["a", "b"]
