"""Vector quantisation of LoRA updates: short vectors along the rank axis, each sent as the index of
a codeword.

A column of A, or a row of B, holds the same feature seen by all ranks. These vectors are far from
white, each tensor in its own way: on real updates at 1/64 they lose 0.46 of the energy where
vectors along the feature axis lose 0.55. All A factors share one codebook and all B factors
another; every tensor has its own frequencies of the codewords. Codebooks are trained by Lloyd's
algorithm with an entropy constraint (Chou, Lookabaugh and Gray, "Entropy-constrained vector
quantization", IEEE Trans. ASSP 37(1), 1989) from a k-means++ start (Arthur and Vassilvitskii, SODA
2007).

Body: scale of every group (target, factor) (bf16; 0 if nothing of it is sent), ANS stream of the
indices.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fluvial import seeds
from fluvial.codecs import entropy
from fluvial.codecs.base import (
    CodecSettings,
    LearnedCodec,
    RateSettings,
    body_room,
    require_updates,
)
from fluvial.codecs.learned.vq_codebooks import (
    LARGEST_VALUE,
    codeword_bits,
    first_codewords,
    lloyd_step,
    nearest,
    samples_of,
)
from fluvial.codecs.learned.vq_vectors import (
    Floats,
    from_vectors,
    group_weights,
    normalised,
    vector_factors,
)
from fluvial.codecs.quantise import bf16, read_scales
from fluvial.errors import WireError
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named

_SAMPLES = 1 << 18
"""Vectors that `fit` looks at, at most."""
_OCTAVES = 10
"""Octaves that `encode` searches for its price of a bit, to either side of that of white values."""


class VQSettings(RateSettings):
    """Learned vectors, each sent as an index (ours; it needs a fit).

    Bytes per value: 4 / rate. Lost: the difference to the nearest learned vector.
    """

    name: Literal["vq"] = "vq"
    """Name of the codec."""
    codebook: int = Field(512, ge=2, le=4096)
    """Codewords for A, and as many for B."""
    dimension: int | None = Field(None, ge=1, le=64)
    """Values in a vector; None takes the square root of `rate`, up to a power of two, 2 to 16 (8 at
    1/64)."""
    iterations: int = Field(15, ge=1, le=10**6)
    """Lloyd steps of `fit`."""

    @property
    def fit_iterations(self) -> int:
        """Return `iterations`."""
        return self.iterations

    @property
    def width(self) -> int:
        """Values in a vector, whether it was set or not."""
        if self.dimension is not None:
            return self.dimension
        return 1 << min(max(math.ceil(math.log2(self.rate) / 2), 1), 4)


class VQ(LearnedCodec):
    """Encoder and decoder are the codebooks: whoever can encode can decode."""

    code = 18

    def __init__(
        self, settings: CodecSettings, layout: Layout, codebooks: Tensor, frequencies: Tensor
    ) -> None:
        """Return the codebooks of A and B (2, codebook, width) bf16; frequencies (tensors,
        codebook) int16, all positive."""
        assert isinstance(settings, VQSettings)
        super().__init__(settings, layout)
        self.settings: VQSettings = settings
        self.codebooks = codebooks
        self.frequencies = frequencies
        self._factors, self._sizes = vector_factors(layout, settings.width)
        self._groups = len(self._sizes)
        self._room = _room(settings, layout, self._groups)
        self._books = codebooks.float()
        self._tables = frequencies.numpy().astype(np.int64)
        self._lengths = codeword_bits(frequencies)
        digest = zlib.crc32(frequencies.numpy().astype("<i2").tobytes(), layout.fingerprint)
        self._fingerprint = zlib.crc32(
            codebooks.view(torch.int16).numpy().astype("<i2").tobytes(), digest
        )

    @property
    def fingerprint(self) -> int:
        """CRC-32 of the layout and of what was published."""
        return self._fingerprint

    @classmethod
    def fit(
        cls, settings: CodecSettings, layout: Layout, updates: Sequence[Named], *, seed: int
    ) -> Self:
        """Train on `updates` (each counts the same) at the rate of the settings; `seed` chooses
        samples and start."""
        assert isinstance(settings, VQSettings)
        require_updates(settings, updates)

        factors, sizes = vector_factors(layout, settings.width)
        vectors = sum(factor.count for factor in factors)
        goal = 8 * (_room(settings, layout, len(sizes)) - 2 * len(sizes) - 4) / vectors
        draw = seeds.generator(seed, "vq")
        seen = samples_of(
            factors, sizes, layout, updates, _SAMPLES / (len(updates) * vectors), draw
        )
        books = torch.zeros(2, settings.codebook, settings.width)

        for kind in range(2):
            rows = [x for (x, _), factor in zip(seen, factors, strict=True) if factor.kind == kind]
            if rows:
                books[kind] = first_codewords(torch.cat(rows), settings.codebook, draw)

        frequencies = torch.ones(len(factors), settings.codebook, dtype=torch.int16)
        price = price_of(settings)
        for _ in range(settings.iterations):
            books, frequencies, bits = lloyd_step(
                books, codeword_bits(frequencies), price, seen, factors
            )
            price *= min(max(bits / goal, 0.5), 2.0)

        return cls(settings, layout, books.bfloat16(), frequencies)

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, VQSettings)
        return _room(settings, layout, len(vector_factors(layout, settings.width)[1])) + OVERHEAD

    def published(self, *, decoder: bool) -> Payload:  # noqa: ARG002 - the encoder is the decoder
        """Return the codebooks and frequencies, two bytes a value."""
        return Payload({"codebooks": self.codebooks, "frequencies": self.frequencies})

    @classmethod
    def from_published(cls, settings: CodecSettings, layout: Layout, payload: Payload) -> Self:
        """Rebuild the codec; raises `WireError` if a tensor is missing, left over, of another
        shape, or has impossible values."""
        assert isinstance(settings, VQSettings)
        expected = {
            "codebooks": (torch.bfloat16, (2, settings.codebook, settings.width)),
            "frequencies": (torch.int16, (len(layout.shapes), settings.codebook)),
        }

        if set(payload.tensors) != set(expected):
            raise WireError(
                f"vq: expected tensors {sorted(expected)}, found {sorted(payload.tensors)[:8]}"
            )

        for name, (dtype, shape) in expected.items():
            tensor = payload.tensors[name]
            if tensor.dtype != dtype or tensor.shape != shape:
                raise WireError(
                    f"vq: {name}: expected {dtype} {shape}, found {tensor.dtype} "
                    f"{tuple(tensor.shape)}; both ends need "
                    "the same codec settings"
                )

        if not bool((payload.tensors["codebooks"].abs() <= LARGEST_VALUE).all()):
            raise WireError(f"vq: codebooks: a value is NaN or beyond {LARGEST_VALUE:g}")
        if not bool((payload.tensors["frequencies"] > 0).all()):
            raise WireError("vq: frequencies: a codeword has none; all need at least 1")

        return cls(settings, layout, payload.tensors["codebooks"], payload.tensors["frequencies"])

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """Code the update at the lowest price of a bit whose frame is within the rate."""
        rows, scales = normalised(vector, self.layout, self._factors, self._sizes)
        costs = group_weights(scales, self._sizes)
        active = scales > 0
        room = 8 * (self._room - 2 * self._groups - 4)
        cheap = -float(_OCTAVES)
        dear = float(_OCTAVES)

        for _ in range(12):
            middle = (cheap + dear) / 2
            indices = self._indices(rows, costs, active, middle)
            if self._bits(indices) > room:
                cheap = middle
            else:
                dear = middle

        while True:
            written = self._write(rows, self._indices(rows, costs, active, dear), scales)
            if len(written) <= self._room:
                return written
            dear += 0.02
            if dear > _OCTAVES:  # an update unlike those of `fit`: what weighs least stays at home
                active &= scales > scales[active].min()

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        scales = read_scales(reader, self._groups)
        stream = entropy.Stream(reader.take(reader.left))
        vector = []

        for factor, table in zip(self._factors, self._tables, strict=True):
            values = torch.zeros(math.prod(factor.shape))
            if scales[factor.group] > 0:
                indices = torch.from_numpy(stream.take(table, factor.count))
                values = from_vectors(self._books[factor.kind][indices], factor) * float(
                    scales[factor.group]
                )

            vector.append(values)

        stream.finish()
        largest = torch.finfo(torch.float32).max
        return torch.cat(vector).clamp(-largest, largest)

    def _indices(
        self, rows: Sequence[Tensor], weights: Floats, active: NDArray[np.bool_], octaves: float
    ) -> list[Tensor | None]:
        """Return the indices of the codewords of each tensor (count,), at a price of 2^octaves;
        None for a tensor that is not sent."""
        price = price_of(self.settings) * 2**octaves
        return [
            nearest(
                x,
                self._books[factor.kind],
                lengths,
                torch.full((len(x),), _ratio(price, float(weights[factor.group]))),
            )
            if active[factor.group]
            else None
            for x, factor, lengths in zip(rows, self._factors, self._lengths, strict=True)
        ]

    def _bits(self, indices: Sequence[Tensor | None]) -> float:
        pairs = zip(self._lengths, indices, strict=True)
        return sum(
            float(lengths[chosen].double().sum()) for lengths, chosen in pairs if chosen is not None
        )

    def _write(
        self, rows: Sequence[Tensor], indices: Sequence[Tensor | None], scales: Floats
    ) -> bytes:
        """Write the body with the scales <u, q> / <q, q>, so that what is decoded is never further
        from the update than zero is."""
        inner = np.zeros(self._groups)
        power = np.zeros(self._groups)

        for x, chosen, factor in zip(rows, indices, self._factors, strict=True):
            if chosen is not None:
                q = self._books[factor.kind][chosen].double()
                inner[factor.group] += float((x.double() * q).sum())
                power[factor.group] += float(q.square().sum())

        gains = np.divide(inner, power, out=np.zeros(self._groups), where=power > 0)
        bits = bf16(np.maximum(gains, 0) * scales)
        coded = [
            (chosen.numpy(), table)
            for chosen, factor, table in zip(indices, self._factors, self._tables, strict=True)
            if chosen is not None and bits[factor.group]
        ]

        return bits.astype("<u2").tobytes() + entropy.encode(coded)


def _room(settings: VQSettings, layout: Layout, groups: int) -> int:
    return body_room(layout, settings, least=2 * groups + 4)


def price_of(settings: VQSettings) -> float:
    """Return the squared error that a bit saves a white source of unit variance at the rate; -dD/dR
    of D = 2^(-2R)."""
    return float(2 * math.log(2) * 2.0 ** (-64 / settings.rate))


def _ratio(price: float, weight: float) -> float:
    """Return the price in a group of this weight."""
    return min(price / weight, 1e6) if weight > 0 else 1e6
