"""Differential privacy in CG-FedLLM (section C6): clipping, Gaussian noise, an accountant.

The paper gives epsilon in {0.25, 2, 8} and a sensitivity of 1, but neither delta, clip norm nor
placement; its text puts the noise before compression, its formula on the latent. All three readings
are here:

| placement   | who adds the noise | to what                       | a server may see |
|-------------|--------------------|-------------------------------|------------------|
| `update`    | the site           | the clipped update            | anything         |
| `latent`    | the site           | the clipped latent            | anything         |
| `aggregate` | the server         | the mean of clipped updates   | is trusted       |

Sensitivity is that of a site taking part against sending zero: one clipped vector, norm at most
`clip_norm`. Rounds compose without amplification by sampling, which overstates epsilon when
`fraction` < 1. The noise comes from a secret of whoever adds it (`noise`, `releases`). Where the
site adds it, a frame is all that leaves: no sample count, no loss.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fluvial.federation import noise
from fluvial.federation.epsilon import epsilon_of, multiplier_for
from fluvial.federation.releases import Mechanism, claim
from fluvial.federation.sites import Site
from fluvial.methods.interface import Promise
from fluvial.settings import Settings
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, norm, scale

OUTSIDE = "held-out sums leave the sites exactly and are outside epsilon"
"""The line that goes wherever epsilon is shown, under `heldout = "exact"`."""


class PrivacyConfig(Settings):
    """Gaussian mechanism on what a site releases in one round."""

    placement: Literal["update", "latent", "aggregate"]
    """Object that is clipped and noised: the site's update, its code (the paper), or the server's
    mean."""
    clip_norm: float = Field(ge=1e-9, le=1e9)
    """L2 bound C; the median norm of undisturbed updates is a good start."""
    noise_multiplier: float | None = Field(None, ge=1e-3, le=1e6)
    """Standard deviation of the noise in units of C."""
    epsilon: float | None = Field(None, ge=1e-3, le=1e3)
    """Budget of the whole run, from which the noise multiplier is computed; set one of the two."""
    delta: float = Field(1e-5, ge=1e-15, lt=1)
    """Delta of the promise (ours: the paper gives no value)."""
    heldout: Literal["none", "exact"] = "none"
    """Measures on the sites' held-out text: "none", or "exact", whose sums leave the sites and are
    outside epsilon."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if (self.noise_multiplier is None) == (self.epsilon is None):
            yield "noise_multiplier: set exactly one of noise_multiplier and epsilon"

    @property
    def at_site(self) -> bool:
        """Return whether the site adds the noise, so that the server need not be trusted."""
        return self.placement != "aggregate"

    def multiplier(self, rounds: int) -> float:
        """Return the noise multiplier; where epsilon is set, that for `rounds` releases."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        return multiplier_for(self.epsilon, rounds, self.delta)

    def mechanism(self, rounds: int) -> Mechanism:
        """Return the mechanism of a run of `rounds` rounds."""
        return Mechanism(self.placement, self.clip_norm, self.multiplier(rounds), rounds)

    def promise(self) -> Promise:
        """Return the promise that the rest of a run must respect."""
        measured = {"evaluate"} if self.heldout == "exact" else set()

        def report(rounds: int, of: int) -> dict[str, object]:
            multiplier = self.multiplier(of)
            return {
                "placement": self.placement,
                "clip_norm": self.clip_norm,
                "noise_multiplier": multiplier,
                "epsilon": epsilon_of(multiplier, rounds, self.delta),
                "delta": self.delta,
                "releases": rounds,
                "outside": [OUTSIDE] if measured else [],
            }

        tasks = frozenset({"train", "install", *measured})
        return Promise(self.at_site, tasks, bool(measured), report)


def clip(update: Named, clip_norm: float) -> Named:
    """Return `update` scaled down to norm `clip_norm` where it is longer, rounding included."""
    length = norm(update)
    return scale(update, clip_norm / length * (1 - 2**-22)) if length > clip_norm else update


def release(
    site: Site,
    config: PrivacyConfig,
    vector: Tensor,
    *,
    round: int,
    received: Named,
    codec: Payload,
) -> Tensor:
    """Return the clipped and disturbed `vector` (n,), counted in the site's ledger before it
    leaves.

    `received` is the adapter that the site was sent, and `codec` what was installed where `vector`
    is a latent: with `round` and `vector` they tell one release from another. Raises `PrivacyError`
    for one that epsilon does not count.
    """
    mechanism = config.mechanism(site.rounds)
    std = mechanism.clip_norm * mechanism.noise_multiplier
    steps = noise.on_grid(vector, std, clip_norm=mechanism.clip_norm)
    asked = Payload(received, {"round": round, "placement": config.placement}).to_bytes()
    inputs = (asked, codec.to_bytes(), steps.tobytes())
    digests = (hashlib.sha256(data).digest() for data in inputs)
    key = claim(site.store.private(site.name), mechanism, *digests)

    return noise.disturb(steps, std, key)


def disturb_mean(mean: Named, std: float, secret: bytes, round: int) -> Named:
    """Return the mean of a round with the server's noise of standard deviation `std` per value."""
    layout = Layout.of(mean)
    steps = noise.on_grid(layout.flatten(mean), std)
    digest = hashlib.sha256(steps.tobytes()).digest()
    key = noise.derive_key(secret, "aggregate", str(round).encode(), digest)

    return layout.unflatten(noise.disturb(steps, std, key))


def noise_std(config: PrivacyConfig, multiplier: float, largest_share: float = 1.0) -> float:
    """Return the standard deviation per value.

    In the mean of a round, one site weighs at most `largest_share`.
    """
    assert 0 < largest_share <= 1
    std = config.clip_norm * multiplier * largest_share
    assert math.isfinite(std)

    return std


def zero(update: Named) -> Named:
    """Return the zero update of the same shapes on the CPU."""
    return {name: torch.zeros(tensor.shape) for name, tensor in update.items()}
