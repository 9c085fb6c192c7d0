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
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fluvial import seeds
from fluvial.codecs import entropy
from fluvial.codecs.base import CodecSettings, LearnedCodec, RateSettings, body_room
from fluvial.codecs.learned.canvas import target
from fluvial.codecs.quantise import bf16, read_scales
from fluvial.errors import ConfigError, WireError
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, factor

Floats = NDArray[np.float64]

_SAMPLES = 1 << 18
"""Vectors that `fit` looks at, at most."""
_START = 1 << 13
"""Vectors of each factor among which k-means++ chooses."""
_PRIOR = 30
"""Vectors' worth of the factor's frequencies that a tensor's own are mixed with."""
_TOTAL = 1 << 14
_LARGEST = 1e4
"""Of a codeword's values; those of `fit` are near 1."""
_OCTAVES = 10
"""How far `encode` looks for its price of a bit, to either side of the one for white values."""


class VQSettings(RateSettings):
    """Ours; the paper has no such codec."""

    name: Literal["vq"] = "vq"
    """Which codec."""
    codebook: int = Field(512, ge=2, le=4096)
    """Codewords for A, and as many for B."""
    dimension: int | None = Field(None, ge=1, le=64)
    """Values in a vector; None takes the square root of `rate`, up to a power of two, 2 to 16 (8 at
    1/64)."""
    iterations: int = Field(15, ge=1, le=10**6)
    """Lloyd steps of `fit`."""

    @property
    def width(self) -> int:
        """Values in a vector, whether it was set or not."""
        if self.dimension is not None:
            return self.dimension
        return 1 << min(max(math.ceil(math.log2(self.rate) / 2), 1), 4)


@dataclass(frozen=True)
class _Part:
    """One factor: `count` vectors of `width` values along the rank axis; the last may end in
    zeros."""

    name: str
    shape: tuple[int, ...]
    kind: int
    group: int
    count: int
    width: int


class VQ(LearnedCodec):
    """Encoder and decoder are the codebooks: whoever can encode can decode."""

    code = 18

    def __init__(
        self, settings: CodecSettings, layout: Layout, codebooks: Tensor, frequencies: Tensor
    ) -> None:
        """Codebooks of A and B (2, codebook, width) bf16; frequencies (tensors, codebook) int16,
        all positive."""
        assert isinstance(settings, VQSettings)
        super().__init__(settings, layout)
        self.settings: VQSettings = settings
        self.codebooks = codebooks
        self.frequencies = frequencies
        self._parts, self._sizes = _parts(layout, settings.width)
        self._groups = len(self._sizes)
        self._room = _room(settings, layout, self._groups)
        self._books = codebooks.float()
        self._tables = frequencies.numpy().astype(np.int64)
        self._lengths = _lengths(frequencies)
        digest = zlib.crc32(frequencies.numpy().astype("<i2").tobytes(), layout.fingerprint)
        self._fingerprint = zlib.crc32(
            codebooks.view(torch.int16).numpy().astype("<i2").tobytes(), digest
        )

    @property
    def fingerprint(self) -> int:
        """Of the layout and of what was published."""
        return self._fingerprint

    @classmethod
    def fit(
        cls, settings: CodecSettings, layout: Layout, updates: Sequence[Named], *, seed: int
    ) -> Self:
        """Train on `updates` (each counts the same) at the rate of the settings; `seed` chooses
        samples and start."""
        assert isinstance(settings, VQSettings)
        if not updates:
            raise ConfigError(
                "codec: vq has no updates to learn from; TGAP must collect at least one"
            )

        parts, sizes = _parts(layout, settings.width)
        vectors = sum(part.count for part in parts)
        goal = 8 * (_room(settings, layout, len(sizes)) - 2 * len(sizes) - 4) / vectors
        draw = seeds.generator(seed, "vq")
        seen = _samples(parts, sizes, layout, updates, _SAMPLES / (len(updates) * vectors), draw)
        books = torch.zeros(2, settings.codebook, settings.width)

        for kind in range(2):
            rows = [x for (x, _), part in zip(seen, parts, strict=True) if part.kind == kind]
            if rows:
                books[kind] = _start(torch.cat(rows), settings.codebook, draw)

        frequencies = torch.ones(len(parts), settings.codebook, dtype=torch.int16)
        price = _price(settings)
        for _ in range(settings.iterations):
            books, frequencies, bits = _lloyd(books, _lengths(frequencies), price, seen, parts)
            price *= min(max(bits / goal, 0.5), 2.0)

        return cls(settings, layout, books.bfloat16(), frequencies)

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, VQSettings)
        return _room(settings, layout, len(_parts(layout, settings.width)[1])) + OVERHEAD

    def published(self, *, decoder: bool) -> Payload:  # noqa: ARG002 - the encoder is the decoder
        """Codebooks and frequencies, two bytes a value."""
        return Payload({"codebooks": self.codebooks, "frequencies": self.frequencies})

    @classmethod
    def from_published(cls, settings: CodecSettings, layout: Layout, payload: Payload) -> Self:
        """Rebuild; raises `WireError` if a tensor is missing, left over, of another shape, or has
        impossible values."""
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
            found = payload.tensors[name]
            if found.dtype != dtype or found.shape != shape:
                raise WireError(
                    f"vq: {name}: expected {dtype} {shape}, found {found.dtype} {tuple(found.shape)}; both ends need "
                    "the same codec settings"
                )

        if not bool((payload.tensors["codebooks"].abs() <= _LARGEST).all()):
            raise WireError(f"vq: codebooks: a value is NaN or beyond {_LARGEST:g}")
        if not bool((payload.tensors["frequencies"] > 0).all()):
            raise WireError("vq: frequencies: a codeword has none; all need at least 1")

        return cls(settings, layout, payload.tensors["codebooks"], payload.tensors["frequencies"])

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """At the lowest price of a bit whose frame is within the rate."""
        rows, scales = _normalised(vector, self.layout, self._parts, self._sizes)
        costs = _weights(scales, self._sizes)
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
        scales = read_scales(reader, self._groups)
        stream = entropy.Stream(reader.take(reader.left))
        vector = []

        for part, table in zip(self._parts, self._tables, strict=True):
            values = torch.zeros(math.prod(part.shape))
            if scales[part.group] > 0:
                indices = torch.from_numpy(stream.take(table, part.count))
                values = _values(self._books[part.kind][indices], part) * float(scales[part.group])

            vector.append(values)

        stream.finish()
        largest = torch.finfo(torch.float32).max
        return torch.cat(vector).clamp(-largest, largest)

    def _indices(
        self, rows: Sequence[Tensor], weights: Floats, active: NDArray[np.bool_], octaves: float
    ) -> list[Tensor | None]:
        """Of the codewords of each tensor (count,), at a price of 2^octaves; None for one that is
        not sent."""
        price = _price(self.settings) * 2**octaves
        return [
            _nearest(
                x,
                self._books[part.kind],
                lengths,
                torch.full((len(x),), _ratio(price, float(weights[part.group]))),
            )
            if active[part.group]
            else None
            for x, part, lengths in zip(rows, self._parts, self._lengths, strict=True)
        ]

    def _bits(self, indices: Sequence[Tensor | None]) -> float:
        pairs = zip(self._lengths, indices, strict=True)
        return sum(
            float(lengths[found].double().sum()) for lengths, found in pairs if found is not None
        )

    def _write(
        self, rows: Sequence[Tensor], indices: Sequence[Tensor | None], scales: Floats
    ) -> bytes:
        """With the scales <u, q> / <q, q>, so that what is decoded is never further from the update
        than zero is."""
        inner = np.zeros(self._groups)
        power = np.zeros(self._groups)

        for x, found, part in zip(rows, indices, self._parts, strict=True):
            if found is not None:
                q = self._books[part.kind][found].double()
                inner[part.group] += float((x.double() * q).sum())
                power[part.group] += float(q.square().sum())

        gains = np.divide(inner, power, out=np.zeros(self._groups), where=power > 0)
        bits = bf16(np.maximum(gains, 0) * scales)
        parts = [
            (found.numpy(), table)
            for found, part, table in zip(indices, self._parts, self._tables, strict=True)
            if found is not None and bits[part.group]
        ]

        return bits.astype("<u2").tobytes() + entropy.encode(parts)


def _parts(layout: Layout, width: int) -> tuple[list[_Part], Floats]:
    """The factors in layout order, and how many values each group has."""
    groups: dict[tuple[str, int], int] = {}
    parts = []

    for name, shape in layout.shapes:
        which = factor(name)
        if which is None or len(shape) != 2 or 0 in shape:
            raise ConfigError(
                f"codec: {name!r} with shape {shape} is no LoRA factor; vq codes only A and B"
            )

        kind = "AB".index(which)
        group = groups.setdefault((target(name), kind), len(groups))
        parts.append(_Part(name, shape, kind, group, -(-math.prod(shape) // width), width))

    if not parts:
        raise ConfigError("codec: the adapter has no tensors")

    return parts, np.bincount([part.group for part in parts], layout.sizes).astype(np.float64)


def _room(settings: VQSettings, layout: Layout, groups: int) -> int:
    return body_room(layout, settings.rate, least=2 * groups + 4)


def _price(settings: VQSettings) -> float:
    """Squared error that a bit saves a white source of unit variance at the rate; -dD/dR of D =
    2^(-2R)."""
    return float(2 * math.log(2) * 2.0 ** (-64 / settings.rate))


def _ratio(price: float, weight: float) -> float:
    """Price in a group of this weight."""
    return min(price / weight, 1e6) if weight > 0 else 1e6


def _normalised(
    vector: Tensor, layout: Layout, parts: Sequence[_Part], sizes: Floats
) -> tuple[list[Tensor], Floats]:
    """Vectors (count, width) of every factor over the RMS of its group, and these RMS (groups,)."""
    pieces = torch.split(vector.double(), list(layout.sizes))
    energy = np.zeros(len(sizes))

    for piece, part in zip(pieces, parts, strict=True):
        energy[part.group] += float(piece.square().sum())
    scales = np.sqrt(energy / sizes)
    rows = []
    for piece, part in zip(pieces, parts, strict=True):
        x = piece.view(part.shape)
        x = (x if part.kind else x.T).reshape(-1) / (scales[part.group] or 1.0)
        x = torch.nn.functional.pad(x, (0, part.count * part.width - len(x)))
        rows.append(x.view(part.count, part.width).float())

    return rows, scales


def _values(vectors: Tensor, part: _Part) -> Tensor:
    """The factor (numel,) that `vectors` (count, width) came from."""
    flat = vectors.reshape(-1)[: math.prod(part.shape)]
    return flat if part.kind else flat.view(part.shape[::-1]).T.reshape(-1)


def _weights(scales: Floats, sizes: Floats) -> Floats:
    """What a squared error of one costs in each group (groups,), against the mean square of all
    values."""
    mean = float((scales**2 * sizes).sum() / sizes.sum())
    return scales**2 / (mean or 1.0)


def _lengths(frequencies: Tensor) -> Tensor:
    """Bits of every codeword (tensors, codebook) by its frequencies."""
    counts = frequencies.double()
    return (counts.sum(1, keepdim=True) / counts).log2().float()


def _nearest(x: Tensor, book: Tensor, lengths: Tensor, prices: Tensor) -> Tensor:
    """For vectors x (count, width), the codeword (count,) of least |x - c|^2 + price * bits; prices
    (count,)."""
    left = torch.cat([x, torch.ones(len(x), 1), prices[:, None]], dim=1)
    right = torch.cat([-2 * book, book.square().sum(1, keepdim=True), lengths[:, None]], dim=1)
    return (left @ right.T).argmin(1)


def _samples(
    parts: Sequence[_Part],
    sizes: Floats,
    layout: Layout,
    updates: Sequence[Named],
    share: float,
    draw: torch.Generator,
) -> list[tuple[Tensor, Tensor]]:
    """For every factor, vectors (samples, width) of all updates and their weights (samples,)."""
    found: list[list[Tensor]] = [[] for _ in parts]
    weights: list[list[Tensor]] = [[] for _ in parts]

    for update in updates:
        rows, scales = _normalised(layout.flatten(update), layout, parts, sizes)
        weight = _weights(scales, sizes)
        for index, (x, part) in enumerate(zip(rows, parts, strict=True)):
            kept = x if share >= 1 else x[torch.rand(len(x), generator=draw) < share]
            found[index].append(kept)
            weights[index].append(torch.full((len(kept),), weight[part.group], dtype=torch.float32))

    return [(torch.cat(x), torch.cat(w)) for x, w in zip(found, weights, strict=True)]


def _start(x: Tensor, number: int, draw: torch.Generator) -> Tensor:
    """`number` codewords: zero, then vectors of x (samples, width) drawn with odds |x - nearest one
    so far|^2."""
    x = x[torch.randperm(len(x), generator=draw)[:_START]]
    book = torch.zeros(number, x.shape[1])
    distance = x.square().sum(1)

    for index in range(1, number):
        if not bool(distance.sum() > 0):
            break
        book[index] = x[int(torch.multinomial(distance, 1, generator=draw))]
        distance = torch.minimum(distance, (x - book[index]).square().sum(1))

    return book


def _lloyd(
    books: Tensor,
    lengths: Tensor,
    price: float,
    seen: Sequence[tuple[Tensor, Tensor]],
    parts: Sequence[_Part],
) -> tuple[Tensor, Tensor, float]:
    """One step at this price of a bit: new codebooks, new frequencies, bits for a vector."""
    sums = torch.zeros_like(books)
    mass = torch.zeros(books.shape[:2])
    counts = torch.zeros(len(parts), books.shape[1])
    bits = total = 0.0

    for index, ((x, weight), part) in enumerate(zip(seen, parts, strict=True)):
        prices = (price / weight.clamp_min(1e-30)).clamp_max(1e6)
        chosen = _nearest(x, books[part.kind], lengths[index], prices)
        sums[part.kind].index_add_(0, chosen, weight[:, None] * x)
        mass[part.kind].index_add_(0, chosen, weight)
        counts[index] = torch.bincount(chosen, minlength=books.shape[1])
        bits += float(lengths[index][chosen].sum())
        total += len(x)

    moved = torch.where(mass[..., None] > 0, sums / mass[..., None].clamp_min(1e-30), books)
    moved[:, 0] = 0  # what is not worth a bit
    return moved.clamp(-_LARGEST, _LARGEST), _frequencies(counts, parts), bits / max(total, 1)


def _frequencies(counts: Tensor, parts: Sequence[_Part]) -> Tensor:
    """int16 (tensors, codebook) of sum near 2^14, from counts of each tensor and of all tensors of
    its factor."""
    kinds = torch.tensor([part.kind for part in parts])
    pooled = torch.full((2, counts.shape[1]), 0.5).index_add_(0, kinds, counts)
    mixed = counts + _PRIOR * (pooled / pooled.sum(1, keepdim=True))[kinds]

    return (mixed / mixed.sum(1, keepdim=True) * _TOTAL).round().clamp_min(1).to(torch.int16)
