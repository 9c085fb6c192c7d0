"""Shares that a server is expected to read are those that the benchmark has measured."""

import json
from pathlib import Path

import pytest

from fluvial.methods.flglm.leakage.measured import GRADIENTS, HIDDEN, expected
from fluvial.methods.flglm.leakage.meter import GRADIENTS as ON_GRADIENTS
from fluvial.methods.flglm.leakage.meter import Leakage, Reading, beyond_bound
from fluvial.methods.flglm.leakage.noise import NoiseConfig

ROWS = json.loads(
    (Path(__file__).parents[4] / "benchmarks/results/leakage.json").read_text(encoding="utf-8")
)["rows"]


def test_the_figures_are_those_of_the_benchmark() -> None:
    best: dict[int, dict[float, float]] = {}
    for row in ROWS:
        if row["part"] == "curve" and row["attack"] != ON_GRADIENTS:
            shares = best.setdefault(row["cut"], {})
            noise = row.get("multiplier", 0.0)
            shares[noise] = max(shares.get(noise, 0.0), row["accuracy"])

    assert {cut: {**shares} for cut, shares in HIDDEN.items()} == {
        cut: {noise: pytest.approx(share, abs=5e-4) for noise, share in shares.items()}
        for cut, shares in best.items()
    }
    least = min(row["accuracy"] for row in ROWS if row["attack"] == ON_GRADIENTS)
    assert pytest.approx(least, abs=5e-4) == GRADIENTS


def test_gradients_bound_from_below_what_a_server_reads() -> None:
    assert expected(1, None, gradients=True) == 1
    assert expected(1, NoiseConfig(clip=1.0, multiplier=0.05), gradients=True) == 1
    assert expected(9, NoiseConfig(clip=1.0, multiplier=0.15), gradients=True) == HIDDEN[3][0.1]
    assert expected(2, NoiseConfig(clip=1.0, multiplier=5.0), gradients=True) == GRADIENTS


def test_without_gradients_noise_alone_decides() -> None:
    assert expected(1, None, gradients=False) == 1
    assert expected(2, NoiseConfig(clip=1.0, multiplier=5.0), gradients=False) == HIDDEN[2][0.5]


def test_a_measure_beyond_the_bound_is_a_reason_to_stop() -> None:
    leakage = Leakage(1, 10, 0, (Reading("exact causal search", 0.9, 0.0, 0.0, 0.0),))
    assert beyond_bound(leakage, None) is None
    assert beyond_bound(leakage, 0.9) is None
    reason = beyond_bound(leakage, 0.8)
    assert reason is not None
    assert "90 %" in reason
    assert "most=0.8 allows less" in reason
    assert leakage.to_values(0.9)["within"] is True
    assert leakage.to_values(0.8)["within"] is False
