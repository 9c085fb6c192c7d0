"""The factors of a layout as signals of `rank` channels, and the bytes of a frame of `cnn`."""

import math
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from fluvial.codecs.base import RateSettings, body_room
from fluvial.codecs.learned.cnn_networks import STRIDE
from fluvial.codecs.normalise import (
    BYTES_PER_SCALE,
    measure,
    normalise,
    scale_count,
)
from fluvial.errors import ConfigError
from fluvial.wire.tensors import Layout, factor


class CNNSettings(RateSettings):
    """A one-dimensional autoencoder (ours; it needs a fit).

    Bytes per value: 4 / rate. Lost: what the autoencoder did not learn.
    """

    name: Literal["cnn"] = "cnn"
    """Name of the codec."""
    latent_share: float = Field(1.0, ge=1e-6, le=1)
    """Latent values per value of the update."""
    hidden: int = Field(32, ge=1, le=512)
    """Channels of the residual path."""
    normalise: Literal["global_rms", "factor_rms"] = "global_rms"
    """Scales by which an update is divided before the encoder: one for all values, or one for every
    factor of every module and layer."""
    iterations: int = Field(400, ge=1, le=10**6)
    """Number of Adam steps of the fit."""
    learning_rate: float = Field(1e-2, ge=1e-12, le=1)
    """Adam's learning rate at the start of the fit; it falls to 0 along half a cosine."""

    @property
    def fit_iterations(self) -> int:
        """Return `iterations`."""
        return self.iterations


def is_b(name: str) -> bool:
    """Return whether a tensor is a B factor."""
    return factor(name) == "B"


def signals_of(layout: Layout) -> list[tuple[int, int]]:
    """Return the rank and features of every factor."""
    signals = []
    for name, shape in layout.shapes:
        if factor(name) is None or len(shape) != 2 or 0 in shape:
            raise ConfigError(
                f"codec: {name!r} with shape {shape} is no LoRA factor; cnn codes only A and B"
            )

        signals.append((shape[1], shape[0]) if is_b(name) else (shape[0], shape[1]))

    return signals


def rank_of(layout: Layout) -> int:
    """Return the one rank of all factors; raises `ConfigError` if there are several."""
    ranks = {rank for rank, _ in signals_of(layout)}
    if len(ranks) != 1:
        raise ConfigError(f"codec: cnn needs factors of one rank, found {sorted(ranks)}")
    return min(ranks)


def num_channels(layout: Layout, settings: CNNSettings) -> int:
    """Return the channels of the latent."""
    return max(round(settings.latent_share * STRIDE * rank_of(layout)), 1)


def body_bytes(settings: CNNSettings, layout: Layout) -> int:
    """Return the bytes of a body within the rate; raises `ConfigError` if the rate leaves too
    few."""
    scales = BYTES_PER_SCALE * scale_count(layout, settings.normalise)
    silent = math.ceil(
        layout.numel / 512
    )  # what zeros cost in the lowest class, with room to spare
    return body_room(
        layout,
        settings,
        least=scales + 2 + 2 * num_channels(layout, settings) + 8 + silent // 8,
    )


def normalised(vector: Tensor, layout: Layout, settings: CNNSettings) -> Tensor:
    """Divide a flattened update (numel,) by its scales."""
    return normalise(
        vector, measure(vector, layout, settings.normalise), layout, settings.normalise
    )


def to_signals(vector: Tensor, layout: Layout) -> list[Tensor]:
    """Return every factor as X (rank, features)."""
    pieces = layout.unflatten(vector)
    return [tensor.T if is_b(name) else tensor for name, tensor in pieces.items()]


def padded(x: Tensor) -> Tensor:
    """Return x (rank, features) with zeros up to whole strides."""
    return nn.functional.pad(x, (0, -x.shape[-1] % STRIDE))
