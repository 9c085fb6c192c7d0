"""Coding that counts the error of the weights, not of the factors.

A change dA of a factor changes the weights by B dA, a change dB by dB A. Both ends know the adapter
that the update starts from, so they can scale every factor by the size of its partner, at no byte;
while B is small, B is sent first. It lowers the error of the weights' change; in the runs that we
know of it ends where the unweighted codec ends.
"""

import math
from collections.abc import Mapping

from fluvial.codecs.base import Codec
from fluvial.errors import ConfigError
from fluvial.exchange.coding import NOTHING, Coder, Plain, State, Wrapper
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, factor

_FLOOR = 0.2
"""Share of a factor's own energy in its scale, so that A counts while B is zero (ours)."""


class Weighted(Wrapper):
    """A coder on factors that are scaled by `received`, the adapter that both ends have."""

    def __init__(self, inner: Coder, received: Named) -> None:
        super().__init__(inner)
        self.scales = scales(received, inner.layout)

    def encode(
        self, update: Named, state: State = NOTHING, *, seed: int = 0, round: int = 0
    ) -> tuple[bytes, dict[str, Payload]]:
        """Return the inner coder's frame of the scaled update."""
        return self.inner.encode(weigh(update, self.scales), state, seed=seed, round=round)

    def decode(self, frame: bytes, state: State = NOTHING, *, round: int | None = None) -> Named:
        """Return the inverse of `encode`; raises `WireError`."""
        decoded = self.inner.decode(frame, state, round=round)
        return {name: tensor / self.scales[name] for name, tensor in decoded.items()}


def weighted(codec: Codec, received: Named) -> Coder:
    """Return a coder of `codec`, on scaled factors where its settings say so."""
    coder = Plain(codec)
    return Weighted(coder, received) if codec.settings.weighted else coder


def scales(received: Named, layout: Layout) -> dict[str, float]:
    """Return sqrt((|partner|^2 + 0.2 |factor|^2) / rank) for every factor of `layout`.

    `received` holds both factors. Raises `ConfigError` for a tensor that is no factor.
    """
    by_name = {}

    for name, shape in layout.shapes:
        kind = factor(name)
        if kind is None:
            raise ConfigError(
                f"codec.weighted: {name!r} is no LoRA factor; only these have a partner to be "
                "weighed by"
            )

        partner = (
            name.replace(".lora_A.", ".lora_B.")
            if kind == "A"
            else name.replace(".lora_B.", ".lora_A.")
        )
        partner_energy = float(received[partner].double().square().sum())
        own_energy = float(received[name].double().square().sum())
        mean = (partner_energy + _FLOOR * own_energy) / min(shape)
        by_name[name] = math.sqrt(max(mean, 1e-12))

    return by_name


def weigh(update: Named, by: Mapping[str, float]) -> Named:
    """Return every factor times its scale."""
    return {name: tensor * by[name] for name, tensor in update.items()}
