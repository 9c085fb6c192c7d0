"""Clip each token's hidden state, add secret Gaussian noise, and account for it.

FedSEA-LLaMA (arXiv 2505.15683) adds noise without a clip, in training only. Without a clip the
noise promises nothing, and what is sent while a model is used is text as well. So here each
token's hidden state is clipped to norm C before noise of standard deviation `multiplier` * C is
added, and `inference` extends both to generation.

Epsilon protects one hidden state: two texts are neighbours if one token's hidden state was
replaced by any other, at most 2C away (not removed: the number of tokens is sent anyway). A token
changes the hidden states of all later tokens of its text too, so the bound for a token, or for a
text, counts all hidden states that it changes. Gradients and labels are outside epsilon.
"""

import hashlib
import math

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fluvial.federation import noise
from fluvial.federation.epsilon import epsilon_of
from fluvial.settings import Settings


class NoiseConfig(Settings):
    """Clip and Gaussian noise of every hidden state that leaves a site."""

    clip: float = Field(ge=1e-9, le=1e9)
    """L2 bound C of one token's hidden state; the median norm of the front's hidden states is a
    good start."""
    multiplier: float = Field(ge=1e-6, le=1e6)
    """Standard deviation of the noise per value in units of C."""
    delta: float = Field(1e-5, ge=1e-15, lt=1)
    """Delta of the promise (ours: the papers give none)."""
    inference: bool = False
    """Clip and noise in generation and evaluation too, not only in training."""

    @property
    def std(self) -> float:
        """Return sigma, the standard deviation of the noise per value."""
        return self.multiplier * self.clip


def std_of_mean_absolute(mean_absolute: float) -> float:
    """Return the standard deviation of Gaussian noise whose mean absolute value is given.

    The papers state noise as E|eps|: their 0.02 is a standard deviation of 0.0251, as
    E|eps| = sigma * sqrt(2 / pi).
    """
    return mean_absolute * math.sqrt(math.pi / 2)


def clip_rows(hidden: Tensor, clip: float) -> Tensor:
    """Return `hidden` (..., width) with each row scaled down to norm `clip` where it is longer.

    Differentiable: the gradient of what the server received goes back through the clip.
    """
    lengths = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    clipped: Tensor = hidden * (clip / lengths.clamp(min=clip))
    return clipped


class HiddenNoise:
    """The mechanism of one site in one exchange, under a key that only the site knows."""

    def __init__(self, config: NoiseConfig, key: bytes) -> None:
        """Take a `key` that `noise.derive_key` made of the site's secret for this exchange."""
        self.config = config
        self._key = key

    @torch.no_grad()
    def release(self, hidden: Tensor, *step: bytes) -> Tensor:
        """Return `hidden` (..., width) clipped and disturbed, of the same shape, type and device.

        `step` names the message within the exchange. Sent again with the same content, a message
        has the same noise, which tells nothing new. Another step or content draws independent
        noise. A row that is not finite becomes zero before the noise.
        """
        rows = hidden.flatten(0, -2)
        std = self.config.std
        steps = [noise.on_grid(row, std, clip_norm=self.config.clip) for row in rows.cpu()]
        grid = np.concatenate(steps)
        digest = hashlib.sha256(grid.tobytes()).digest()
        key = noise.derive_key(self._key, "hidden states", *step, digest)
        return noise.disturb(grid, std, key).view(hidden.shape).to(hidden)


def separation(config: NoiseConfig, releases: int) -> float:
    """Return mu of Gaussian differential privacy (Dong, Roth, Su, 2022) after `releases`.

    `releases` counts the hidden states that differ between two neighbours, each time that they are
    sent: the passes for one hidden state; tokens * passes for all of a text.
    """
    return 2 / config.multiplier * math.sqrt(releases)


def spent(config: NoiseConfig, releases: int) -> float:
    """Return epsilon at `config.delta` after `releases` (see `separation`); 0 before the first.

    Two neighbours are twice the clip apart.
    """
    return epsilon_of(config.multiplier / 2, releases, config.delta)
