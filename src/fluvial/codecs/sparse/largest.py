"""Codec `top_k`, and what it shares with `dct_top_k`: the largest values, in a few bits each."""

import struct
from typing import Annotated, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fluvial.codecs.base import Codec, CodecSettings, RateSettings, frame_room
from fluvial.codecs.quantise import Floats, bf16, steps, to_levels
from fluvial.codecs.sparse.masked import Masked, masked_least
from fluvial.codecs.sparse.positions import Indices
from fluvial.errors import ConfigError, WireError
from fluvial.settings import EXACT
from fluvial.wire.frame import Reader
from fluvial.wire.tensors import Layout


class _Steps(Masked):
    """Kept values in 255 whole steps, relative to the largest of all."""

    alphabet = 255

    def __init__(self, settings: RateSettings, layout: Layout, *, mark: int = 0) -> None:
        super().__init__(settings, layout, num_scales=1, mark=mark)

    def weights(self, values: Floats) -> NDArray[np.floating]:
        return np.abs(values)

    def scales(
        self,
        kept: Floats,
        tensors: Indices,  # noqa: ARG002 - one for all
    ) -> NDArray[np.uint16]:
        return steps(np.abs(kept).max(initial=0, keepdims=True), 127)

    def to_symbols(
        self,
        kept: Floats,
        tensors: Indices,  # noqa: ARG002
        scales: Floats,
    ) -> NDArray[np.integer]:
        return to_levels(kept, np.broadcast_to(scales, kept.shape), 127).astype(np.int32) + 127

    def from_symbols(
        self,
        symbols: NDArray[np.int32],
        tensors: Indices,  # noqa: ARG002
        scales: Floats,
    ) -> Floats:
        return cast(Floats, (symbols - 127).astype(np.float32) * scales)


class _Codebook(Masked):
    """Kept values as a sign and one of a few magnitudes, which are fitted to the message
    (Lloyd)."""

    def __init__(self, settings: RateSettings, layout: Layout, *, bits: int, mark: int = 0) -> None:
        super().__init__(settings, layout, num_scales=_num_scales(bits), mark=mark)
        self.alphabet = 1 << bits

    def weights(self, values: Floats) -> NDArray[np.floating]:
        return np.abs(values)

    def best(
        self,
        weights: NDArray[np.floating],
        tensors: Indices,  # noqa: ARG002 - one for all
    ) -> int:
        """Return how many of the heaviest values to keep: k values of one magnitude capture (their
        sum)^2 / k, so more can be worse."""
        if self.num_scales > 1 or not len(weights):
            return len(weights)
        sums = np.cumsum(weights / weights[0], dtype=np.float64)
        return int(np.argmax(sums**2 / np.arange(1, len(sums) + 1))) + 1

    def scales(
        self,
        kept: Floats,
        tensors: Indices,  # noqa: ARG002 - one for all
    ) -> NDArray[np.uint16]:
        """Return the centroids, rising."""
        if not len(kept):
            return np.zeros(self.num_scales, dtype=np.uint16)

        ordered = np.sort(np.abs(kept)).astype(np.float64)
        sums = np.concatenate([[0.0], np.cumsum(ordered)])
        centroids = ordered[
            ((np.arange(self.num_scales) + 0.5) / self.num_scales * len(ordered)).astype(np.int64)
        ]

        for _ in range(20):
            edges = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
            edges = np.concatenate([[0], edges, [len(ordered)]])
            counts = np.diff(edges)
            centroids = np.where(
                counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), centroids
            )

        return bf16(centroids)

    def to_symbols(
        self,
        kept: Floats,
        tensors: Indices,  # noqa: ARG002
        scales: Floats,
    ) -> NDArray[np.integer]:
        """Return the nearest magnitude, plus `num_scales` for positive values."""
        wide = scales.astype(np.float64)
        return np.searchsorted((wide[1:] + wide[:-1]) / 2, np.abs(kept)) + self.num_scales * (
            kept > 0
        )

    def from_symbols(
        self,
        symbols: NDArray[np.int32],
        tensors: Indices,  # noqa: ARG002
        scales: Floats,
    ) -> Floats:
        return np.concatenate([-scales, scales])[symbols]


ValueBits = Annotated[Literal["best", 1, 2, 4, 8], EXACT]
_BITS = (1, 2, 4, 8)


class LargestSettings(RateSettings):
    """The largest values, or coefficients, in a few bits each."""

    value_bits: ValueBits
    """Bits of what is kept; fewer leave room for more of it."""


class Largest(Codec):
    """The largest magnitudes of the whole update in so many bits each. Body: that of `Masked`.

    With value_bits="best" every number of bits is tried, and the one of least error goes before it
    as a byte.
    """

    value_bits: ValueBits

    def __init__(self, settings: RateSettings, layout: Layout, *, value_bits: ValueBits) -> None:
        super().__init__(settings, layout)
        self._coders: dict[int, Masked] = {}
        self._marked = value_bits == "best"

        for bits in _BITS if value_bits == "best" else (value_bits,):
            try:
                self._coders[bits] = _coder(settings, layout, bits=bits, mark=int(self._marked))
            except ConfigError:
                if not self._marked or bits == 1:
                    raise

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, LargestSettings)
        marked = settings.value_bits == "best"
        bits = 1 if settings.value_bits == "best" else settings.value_bits
        least = masked_least(layout, num_scales=_num_scales(bits), mark=int(marked))

        return frame_room(layout, settings, least)

    def body(self, vector: Tensor, seed: int) -> bytes:
        """Code the flattened update (numel,); see `Codec.body`."""
        if not self._marked:
            (coder,) = self._coders.values()
            return coder.body(vector, seed)

        bodies = {bits: coder.body(vector, seed) for bits, coder in self._coders.items()}
        bits = min(bodies, key=lambda bits: self._error(vector, bodies[bits], bits))
        return struct.pack("<B", bits) + bodies[bits]

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        bits = int(reader.number("B")) if self._marked else next(iter(self._coders))
        if bits not in self._coders:
            raise WireError(
                f"frame: {bits} bits for each value; expected one of {sorted(self._coders)}"
            )

        return self._coders[bits].parse(reader)

    def _error(self, vector: Tensor, body: bytes, bits: int) -> float:
        return float((self._coders[bits].parse(Reader(body)).double() - vector).square().sum())


def _num_scales(bits: int) -> int:
    """Return the magnitudes that values of so many bits are written with."""
    return 1 if bits == 8 else 1 << bits - 1


def _coder(settings: RateSettings, layout: Layout, *, bits: int, mark: int) -> Masked:
    if bits == 8:
        return _Steps(settings, layout, mark=mark)
    return _Codebook(settings, layout, bits=bits, mark=mark)


class TopKSettings(LargestSettings):
    """The largest values, in a few bits each.

    Bytes per value: 4 / rate. Lost: all but the largest values, and bits of those.
    """

    name: Literal["top_k"] = "top_k"
    """Name of the codec."""
    value_bits: ValueBits = 8
    """Bits of a kept value; fewer leave room for more values. 1 is best at 1/32 and below."""


class TopK(Largest):
    """The largest magnitudes of the whole update, not normalised: that captures the most energy."""

    code: ClassVar[int] = 5

    def __init__(self, settings: TopKSettings, layout: Layout) -> None:
        super().__init__(settings, layout, value_bits=settings.value_bits)
