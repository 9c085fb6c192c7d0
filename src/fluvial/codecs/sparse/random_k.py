"""Codec `random_k`: values at positions that a seed gives, bf16 each."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fluvial.codecs.base import Codec, CodecSettings, RateSettings, body_room
from fluvial.codecs.quantise import bf16, from_bf16, to_numpy
from fluvial.codecs.sparse.positions import SEED, slots
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout


class RandomKSettings(RateSettings):
    """Values at random positions, bf16 each.

    Bytes per value: 4 / rate. Lost: all but values at random positions, and bits of those.
    """

    name: Literal["random_k"] = "random_k"
    """Name of the codec."""
    unbiased: Literal["yes", "no"] = "no"
    """Scaling by numel / k, which makes the expectation over seeds the update."""

    @property
    def without_bias(self) -> bool:
        """See `CodecSettings.without_bias`."""
        return self.unbiased == "yes"

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if (
            self.unbiased == "yes" and self.error_feedback
        ):  # feedback around a codec that enlarges diverges
            yield "unbiased='yes' diverges with error_feedback=true; choose one of the two"


class RandomK(Codec):
    """k values at positions that the seed in the frame gives; only seed and values are sent.

    Body: seed u64, then k values in bf16, in order of position.
    """

    code: ClassVar[int] = 6
    exact: ClassVar[bool] = True
    settings: RandomKSettings

    def __init__(self, settings: RandomKSettings, layout: Layout) -> None:
        super().__init__(settings, layout)
        self.kept = _num_sent(settings, layout)

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the seed, and two bytes for each value that is sent."""
        assert isinstance(settings, RandomKSettings)
        return OVERHEAD + SEED.size + 2 * _num_sent(settings, layout)

    def body(self, vector: Tensor, seed: int) -> bytes:
        """Code the flattened update (numel,); see `Codec.body`."""
        seed %= 1 << 64
        gain = self.layout.numel / self.kept if self.settings.unbiased == "yes" else 1.0
        values = to_numpy(vector)[slots(seed, self.kept, self.layout.numel)].astype(np.float64)
        return SEED.pack(seed) + bf16(values * gain).astype("<u2").tobytes()

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        seed = int(reader.number("Q"))
        values = from_bf16(reader.array("u2", self.kept))
        vector = np.zeros(self.layout.numel, dtype=np.float32)
        vector[slots(seed, self.kept, self.layout.numel)] = values
        return torch.from_numpy(vector)


def _num_sent(settings: RandomKSettings, layout: Layout) -> int:
    """Return the values that are sent; raises `ConfigError` if not one fits."""
    room = body_room(layout, settings, least=SEED.size + 2)
    return min((room - SEED.size) // 2, layout.numel)
