"""A codec that counts the error of the weights, not of the factors: each factor times what the
other one multiplies.

A change dA of a factor changes the weights by B dA, a change dB by dB A. Both ends know the adapter
that the update starts from, so they can scale every factor by the size of its partner, at no byte;
while B is small, B is sent first. It lowers the error of the weights' change; in the runs that we
know of it ends where the unweighted codec ends.
"""

import math

from torch import Tensor

from fluvial.codecs.base import Codec
from fluvial.errors import ConfigError
from fluvial.wire.frame import Reader
from fluvial.wire.tensors import Layout, Named, factor

_FLOOR = 0.2  # of the factor's own size, so that A counts for something while B is zero


class Weighted(Codec):
    """`codec` on factors that are scaled by `received`, the adapter that both ends have."""

    code = 0  # never in a frame: that is the inner codec's

    def __init__(self, codec: Codec, received: Named) -> None:
        super().__init__(codec.settings, codec.layout)
        self.codec, self.scales = codec, scales(received, codec.layout)

    def encode(self, update: Named, *, seed: int = 0, round: int = 0) -> bytes:
        """Return the inner codec's frame of the scaled update."""
        return self.codec.encode(weigh(update, self.scales), seed=seed, round=round)

    def decode(self, wire: bytes, *, round: int | None = None) -> Named:
        """Invert `encode`; raises `WireError`."""
        decoded = self.codec.decode(wire, round=round)
        return {name: tensor / self.scales[name] for name, tensor in decoded.items()}

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002
        """Code the flattened update (numel,); see `Codec.body`."""
        raise AssertionError("the inner codec makes the frame")

    def parse(self, reader: Reader) -> Tensor:  # noqa: ARG002
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        raise AssertionError("the inner codec reads the frame")


def weighted(codec: Codec, received: Named) -> Codec:
    """Return `codec`, on scaled factors where its settings say so."""
    return Weighted(codec, received) if codec.settings.weighted else codec


def scales(received: Named, layout: Layout) -> dict[str, float]:
    """Return sqrt((|partner|^2 + 0.2 |factor|^2) / rank) for every factor of `layout`; `received`
    holds both factors."""
    scales = {}
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
        theirs, own = (float(received[each].double().square().sum()) for each in (partner, name))
        scales[name] = math.sqrt(max((theirs + _FLOOR * own) / min(shape), 1e-12))

    return scales


def weigh(update: Named, by: dict[str, float]) -> Named:
    """Return every factor times its scale."""
    return {name: tensor * by[name] for name, tensor in update.items()}
