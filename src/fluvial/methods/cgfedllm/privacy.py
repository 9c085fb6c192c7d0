"""Differential privacy in CG-FedLLM: clip, Gaussian noise at three placements, and an accountant (section C6).

The paper gives epsilon in {0.25, 2, 8} and a sensitivity of 1, but neither delta, clip norm nor placement; its text
puts the noise before compression, its formula on the latent. All three readings are here:

| placement   | who adds the noise | to what                       | a server may see |
|-------------|--------------------|-------------------------------|------------------|
| `update`    | the site           | the clipped update            | anything         |
| `latent`    | the site           | the clipped latent            | anything         |
| `aggregate` | the server         | the mean of clipped updates   | is trusted       |

Sensitivity is that of a site taking part against sending zero: one clipped vector, norm at most `clip_norm`. Rounds
compose without amplification by sampling, which overstates epsilon when `fraction` < 1. Sample counts are public.
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fluvial.settings import Settings
from fluvial.tensors import Named, norm, scale


class PrivacyConfig(Settings):
    """Gaussian mechanism on what a site releases in one round."""

    placement: Literal["update", "latent", "aggregate"]
    """What is clipped and noised: the site's update, its code (the paper), or the server's mean."""
    clip_norm: float = Field(gt=0)
    """L2 bound C; the median norm of undisturbed updates is a good start."""
    noise_multiplier: float | None = Field(None, gt=0)
    """Standard deviation of the noise in units of C."""
    epsilon: float | None = Field(None, gt=0)
    """Instead of `noise_multiplier`: the budget of the whole run, from which it is computed."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Ours: the paper gives no value."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "PrivacyConfig":
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("noise_multiplier: set exactly one of noise_multiplier and epsilon")
        return self

    def multiplier(self, rounds: int) -> float:
        """The noise multiplier, computed from epsilon for `rounds` releases where that is what was set."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        import dp_accounting
        from dp_accounting import rdp

        found: float = dp_accounting.calibrate_dp_mechanism(
            rdp.RdpAccountant,
            lambda multiplier: _event(multiplier, rounds),
            self.epsilon,
            self.delta,
        )
        return found


def _event(multiplier: float, rounds: int) -> object:
    import dp_accounting

    return dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(multiplier), rounds)


def spent(multiplier: float, rounds: int, delta: float) -> float:
    """Epsilon after `rounds` releases, by Renyi accounting; 0 before the first."""
    if rounds == 0:
        return 0.0
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()
    accountant.compose(_event(multiplier, rounds))
    epsilon: float = accountant.get_epsilon(delta)
    return epsilon


def clip(update: Named, clip_norm: float) -> Named:
    """`update` scaled down to norm `clip_norm` where it is longer."""
    length = norm(update)
    return scale(update, clip_norm / length) if length > clip_norm else update


def disturb(update: Named, std: float, generator: torch.Generator) -> Named:
    """`update` with independent Gaussian noise on every value, in order of the names."""
    return {name: update[name] + std * torch.randn(update[name].shape, generator=generator) for name in sorted(update)}


def release_latent(latent: Tensor, clip_norm: float, multiplier: float, generator: torch.Generator) -> Tensor:
    """A clipped and disturbed latent (1-D)."""
    length = float(latent.double().norm())
    clipped = latent * min(1.0, clip_norm / length) if length > 0 else latent
    return clipped + clip_norm * multiplier * torch.randn(latent.shape, generator=generator)


def noise_std(config: PrivacyConfig, multiplier: float, largest_share: float = 1.0) -> float:
    """Standard deviation per value; in the mean of a round, one site weighs at most `largest_share`."""
    assert 0 < largest_share <= 1
    std = config.clip_norm * multiplier * largest_share
    assert math.isfinite(std)
    return std
