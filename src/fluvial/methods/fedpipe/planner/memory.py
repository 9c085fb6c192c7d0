"""The memory model of a site: base, adapter with its optimizer, activations, and a reserve.

    memory = layers in their formats + other * width + 16 n_lora + activations(b, T) + reserve

is C2 of FedPipe as we concretise it. Each layer's weights have the bytes that its format stores,
with the correction of their quantisation. Activations are affine in the b T tokens of a pass, with
a further term in b T^2 where attention holds its scores; without measured points they follow from
the model's shapes (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
Models", MLSys 2023), and with two or more points from a least-squares fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

from fluvial.methods.fedpipe.planner.formats import FORMATS, Format
from fluvial.methods.fedpipe.planner.sizes import Sizes
from fluvial.methods.planning import OPTIMIZER_BYTES

RANK_BYTES = 8
"""Bytes for each token and rank of an adapter: its fp32 inner product, and the gradient of it."""


@dataclass(frozen=True)
class Activations:
    """Bytes of activations as a polynomial in batch and length."""

    fixed: int
    token: int
    """Bytes for each of the b T tokens."""
    pair: int = 0
    """Bytes for each of the b T^2 pairs of tokens, where attention holds scores."""

    def bytes(self, batch: int, length: int) -> int:
        """Return the bytes of a step; none where measured points that contradict the base's bytes
        would make them negative."""
        tokens = batch * length
        return max(0, self.fixed + self.token * tokens + self.pair * tokens * length)

    @classmethod
    def of(cls, sizes: Sizes, *, checkpointing: bool, scores: bool) -> "Activations":
        """Return activations by shapes: 34 b T d a layer in half precision and 5 b h T^2 where
        attention holds its scores; with checkpointing 2 b T d a layer and all of one layer.

        The logits and what the loss makes of them take 6 bytes for each token and word, also in
        fp32.
        """
        halves = sizes.width // 2
        layer = 34 * sizes.hidden * halves
        pair = 5 * sizes.heads * halves if scores else 0
        logits = 6 * sizes.vocabulary
        if checkpointing:
            return cls(0, 2 * sizes.hidden * sizes.layers * halves + layer + logits, pair)
        return cls(0, sizes.layers * layer + logits, sizes.layers * pair)


@dataclass(frozen=True)
class MemoryPoint:
    """A measured step."""

    batch: int
    length: int
    checkpointing: bool
    format: Format
    lora: int
    """Parameters of the adapter."""
    bytes: int
    """Most bytes of the process, or of the device."""


@dataclass(frozen=True)
class MemoryModel:
    """Predicts the most bytes of a site's training."""

    sizes: Sizes
    plain: Activations
    """Activations without checkpointing."""
    checkpointed: Activations
    reserve: int
    """Bytes of the process beside the model: libraries, messages, the allocator."""
    candidate_width: Fraction
    """Mean of d_in + d_out over the candidates: parameters for each rank of a module.

    The activations within adapters are counted by their parameters, which is exact where all
    modules have one rank."""
    lora_bytes: int = OPTIMIZER_BYTES

    def base(self, format: Format) -> int:
        """Return the bytes of the frozen base; other weights stay in the type of the model."""
        return base_bytes(self.sizes, format)

    def activations(self, format: Format, batch: int, length: int, *, checkpointing: bool) -> int:
        """Return the bytes of activations without those within adapters."""
        model = self.checkpointed if checkpointing else self.plain
        return model.bytes(batch, length) * self._width(format) // self.sizes.width

    def for_each(self, batch: int, length: int, *, checkpointing: bool) -> Fraction:
        """Return the bytes of each adapter parameter: optimizer, and activations within it.

        With checkpointing the adapters of one layer hold activations at a time.
        """
        held = RANK_BYTES * batch * length / self.candidate_width
        return self.lora_bytes + (held / self.sizes.layers if checkpointing else held)

    def total(
        self, format: Format, batch: int, length: int, *, checkpointing: bool, lora: int
    ) -> int:
        """Return the most bytes of a step."""
        return (
            self.reserve
            + self.base(format)
            + self.activations(format, batch, length, checkpointing=checkpointing)
            + ceil(self.for_each(batch, length, checkpointing=checkpointing) * lora)
        )

    def calibrated(self, points: Sequence[MemoryPoint]) -> "MemoryModel":
        """Return the model with activations that fit measured points.

        For checkpointing on and off apart, two or more points of different b T determine the line
        fixed + token * b T by least squares, in exact fractions; fewer leave that case as it is.
        Where the slope would be negative, which only noise makes, the mean is taken. The reserve
        that was known before stays, and what it misses goes into `fixed`.
        """
        model = self
        for checkpointing in (False, True):
            own = [point for point in points if point.checkpointing == checkpointing]
            if len({point.batch * point.length for point in own}) < 2:
                continue
            fitted = _line([(point.batch * point.length, self._rest(point)) for point in own])
            if checkpointing:
                model = replace(model, checkpointed=fitted)
            else:
                model = replace(model, plain=fitted)
        return model

    def _rest(self, point: MemoryPoint) -> Fraction:
        """Return the measured bytes that are activations, in the type of the model."""
        each = self.for_each(point.batch, point.length, checkpointing=point.checkpointing)
        rest = point.bytes - self.reserve - self.base(point.format) - each * point.lora
        return rest * self.sizes.width / self._width(point.format)

    def _width(self, format: Format) -> int:
        return value_bytes(self.sizes, format)

    def to_json(self) -> dict[str, Any]:
        """Return the model as JSON values, for the record of a run."""
        return {
            **asdict(self),
            "sizes": self.sizes.to_json(),
            "candidate_width": str(self.candidate_width),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "MemoryModel":
        """Return the inverse of `to_json`; the record is the run's own."""
        return cls(
            Sizes.from_json(values["sizes"]),
            Activations(**values["plain"]),
            Activations(**values["checkpointed"]),
            values["reserve"],
            Fraction(values["candidate_width"]),
            values["lora_bytes"],
        )


def base_bytes(sizes: Sizes, format: Format) -> int:
    """Return the bytes of a frozen base in a format, with the largest decoded weight."""
    width = value_bytes(sizes, format)
    kinds = format.by_layer(sizes.layers)
    decoded = [
        largest
        for kind, largest in zip(kinds, sizes.largest, strict=True)
        if FORMATS[kind].quantised
    ]
    layers = sum(layer_bytes(sizes, layer, kind, width) for layer, kind in enumerate(kinds))
    return layers + max(decoded, default=0) * width + sizes.other * width


def layer_bytes(sizes: Sizes, layer: int, kind: str, width: int) -> int:
    """Return the bytes of one layer's linear weights in the format `kind`, with corrections, where
    computed values have `width` bytes."""
    if FORMATS[kind].quantised:
        return sizes.coded[kind][layer] + sizes.corrections[layer] * width
    return sizes.linear[layer] * width


def value_bytes(sizes: Sizes, format: Format) -> int:
    """Return the bytes of a computed value: a quantised base computes in the model's type."""
    return sizes.width if format.width is None else format.width


def _line(points: Sequence[tuple[int, Fraction]]) -> Activations:
    """Return the least-squares line through (tokens, bytes), with whole coefficients rounded up."""
    count = len(points)
    mean_tokens = Fraction(sum(tokens for tokens, _ in points), count)
    mean_bytes = sum((size for _, size in points), Fraction(0)) / count
    spread = sum((tokens - mean_tokens) ** 2 for tokens, _ in points)
    product = sum((tokens - mean_tokens) * (size - mean_bytes) for tokens, size in points)
    slope = max(Fraction(0), Fraction(product) / spread)
    return Activations(ceil(mean_bytes - slope * mean_tokens), ceil(slope))
