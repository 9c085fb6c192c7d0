"""Noise on hidden states: clip, deviation, independence, and epsilon against its definition."""

import math

import pytest
import torch
from scipy.special import log_ndtr
from torch import Tensor

from fluvial.methods.flglm.leakage.noise import (
    HiddenNoise,
    NoiseConfig,
    clip_rows,
    separation,
    spent,
    std_of_mean_absolute,
)

KEY = b"k" * 32


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_the_noise_has_its_standard_deviation_and_no_mean() -> None:
    hidden = 0.01 * drawn(2, 150, 64)
    config = NoiseConfig(clip=2.0, multiplier=0.25)
    noise = (HiddenNoise(config, KEY).release(hidden, b"1") - hidden).double()

    # 19,200 values: the standard error of the deviation is 0.5 %.
    assert float(noise.std()) == pytest.approx(0.5, rel=0.02)
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.abs().mean()) == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=0.02)


def test_rows_are_clipped_before_the_noise() -> None:
    """With little noise, long rows have norm C and short ones are as they were."""
    hidden = drawn(4, 64) * torch.tensor([[10.0], [1e-3], [1e3], [0.0]])
    config = NoiseConfig(clip=1.0, multiplier=1e-6)
    released = HiddenNoise(config, KEY).release(hidden, b"1")

    assert torch.linalg.vector_norm(released, dim=-1) == pytest.approx(
        torch.tensor([1.0, float(hidden[1].norm()), 1.0, 0.0]), abs=2e-5
    )
    assert torch.allclose(released, clip_rows(hidden, 1.0), atol=1e-5)


def test_the_gradient_goes_through_the_clip() -> None:
    hidden = drawn(3, 5).double() * torch.tensor([[1.0], [0.01], [5.0]]).double()
    assert torch.autograd.gradcheck(
        lambda rows: clip_rows(rows, 0.5), (hidden.requires_grad_(),), raise_exception=True
    )


def test_only_the_same_message_of_the_same_site_has_the_same_noise() -> None:
    hidden = drawn(3, 8)
    config = NoiseConfig(clip=1.0, multiplier=1.0)
    mechanism = HiddenNoise(config, KEY)
    first = mechanism.release(hidden, b"1")
    assert torch.equal(mechanism.release(hidden, b"1"), first)

    others = [
        mechanism.release(hidden, b"2"),
        mechanism.release(hidden * torch.tensor([[1.0], [1.0], [0.1]]), b"1"),
        HiddenNoise(config, b"l" * 32).release(hidden, b"1"),
    ]
    rows = {tuple(row.tolist()) for each in (first, *others) for row in each - clip_rows(hidden, 1)}
    assert len(rows) == 12, "noise of one row stands in another message"


def test_a_row_that_is_not_finite_is_sent_as_noise_alone() -> None:
    hidden = drawn(2, 4)
    hidden[0, 1] = torch.nan
    released = HiddenNoise(NoiseConfig(clip=1.0, multiplier=1e-6), KEY).release(hidden, b"1")
    assert released.isfinite().all()
    assert float(released[0].abs().max()) < 1e-4


def test_type_and_shape_are_those_of_the_hidden_states() -> None:
    hidden = drawn(2, 3, 4).bfloat16()
    released = HiddenNoise(NoiseConfig(clip=1.0, multiplier=1.0), KEY).release(hidden, b"1")
    assert (released.shape, released.dtype) == (hidden.shape, torch.bfloat16)


def log_delta(epsilon: float, mu: float) -> float:
    """Return log(Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)), the definition of mu-GDP."""
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return first + math.log1p(-math.exp(second - first))


@pytest.mark.parametrize("multiplier", [0.0157, 0.5, 1.0, 20.0])
@pytest.mark.parametrize("releases", [1, 3, 400])
def test_epsilon_is_that_of_gaussian_privacy(multiplier: float, releases: int) -> None:
    config = NoiseConfig(clip=3.0, multiplier=multiplier)
    mu = 2 * config.clip / config.std * math.sqrt(releases)
    epsilon = spent(config, releases)

    assert separation(config, releases) == pytest.approx(mu, rel=1e-12)
    assert log_delta(epsilon, mu) == pytest.approx(math.log(config.delta), abs=1e-4)


@pytest.mark.parametrize(("multiplier", "releases"), [(1.0, 1), (8.0, 50)])
def test_epsilon_is_near_to_and_below_the_bound_by_renyi_accounting(
    multiplier: float, releases: int
) -> None:
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()
    # Replacement moves a state by up to 2C, so the deviation in units of the sensitivity is half.
    accountant.compose(dp_accounting.GaussianDpEvent(multiplier / 2), releases)
    bound = accountant.get_epsilon(1e-5)
    epsilon = spent(NoiseConfig(clip=1.0, multiplier=multiplier), releases)
    assert 0.8 * bound < epsilon <= bound


def test_nothing_is_spent_before_the_first_release() -> None:
    assert spent(NoiseConfig(clip=1.0, multiplier=1.0), 0) == 0


def test_the_papers_unit_is_the_mean_absolute_value() -> None:
    """Their 0.02 is a deviation of 0.0251; with states of norm 1.6 that is mu = 128."""
    std = std_of_mean_absolute(0.02)
    assert std == pytest.approx(0.0251, abs=5e-5)
    assert separation(NoiseConfig(clip=1.6, multiplier=std / 1.6), 1) == pytest.approx(128, abs=1)
