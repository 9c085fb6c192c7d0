"""Named tensors: the one form of weights, adapters and updates in the whole package."""

import hashlib
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from fluvial.errors import WireError

Named = dict[str, Tensor]
"""Tensors by name. An *update* is a difference of two adapters, a *state* holds absolute values."""


def add(left: Named, right: Named) -> Named:
    """Add left + right, name by name; both have the same names and shapes."""
    return {name: tensor + right[name] for name, tensor in left.items()}


def subtract(left: Named, right: Named) -> Named:
    """Return left - right, name by name; both have the same names and shapes."""
    return {name: tensor - right[name] for name, tensor in left.items()}


def moved(state: Named, update: Named) -> Named:
    """Return `state` + `update`, where the update may have only some of the names."""
    return {
        name: tensor + update[name] if name in update else tensor for name, tensor in state.items()
    }


def scale(tensors: Named, factor: float) -> Named:
    """Multiply all tensors by `factor`."""
    return {name: tensor * factor for name, tensor in tensors.items()}


def zeros_like(tensors: Named) -> Named:
    """Return the zero update of the same shapes."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def energy(tensors: Named) -> float:
    """Sum of squares over everything, in fp64."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values())


def norm(tensors: Named) -> float:
    """Return the global L2 norm."""
    return math.sqrt(energy(tensors))


def inner(left: Named, right: Named) -> float:
    """Return the inner product over everything, in fp64."""
    return sum(
        float((tensor.double() * right[name].double()).sum()) for name, tensor in left.items()
    )


def cosine(left: Named, right: Named) -> float:
    """Return the cosine of the angle between two named vectors; 0 when either is zero."""
    product = norm(left) * norm(right)
    return inner(left, right) / product if product > 0 else 0.0


def relative_error(true: Named, decoded: Named) -> float:
    """Return ||true - decoded||^2 / ||true||^2; 1 is what sending nothing gives."""
    reference = energy(true)
    return energy(subtract(true, decoded)) / reference if reference > 0 else 0.0


def is_finite(tensors: Named) -> bool:
    """Return whether no value is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def factor(name: str) -> Literal["A", "B"] | None:
    """Return which LoRA factor a tensor is, by PEFT's naming: A is (rank, in), B is (out, rank)."""
    if ".lora_A." in name:
        return "A"
    return "B" if ".lora_B." in name else None


def only(tensors: Named, which: Literal["A", "B"]) -> Named:
    """Return the A factors or the B factors."""
    return {name: tensor for name, tensor in tensors.items() if factor(name) == which}


def digest(tensors: Named) -> str:
    """Return SHA-256 over names, types, shapes and bytes, in order of the names."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        state.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        state.update(
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )

    return state.hexdigest()


@dataclass(frozen=True)
class Layout:
    """Names and shapes that both ends agree on, so that a frame need not carry them. All values are
    fp32."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Named) -> "Layout":
        """Return the layout of `tensors`, in order of the names."""
        return cls(tuple((name, tuple(tensors[name].shape)) for name in sorted(tensors)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(name for name, _ in self.shapes)

    @cached_property
    def _by_name(self) -> dict[str, tuple[int, ...]]:
        return dict(self.shapes)

    @cached_property
    def _forms(self) -> list[tuple[int, ...]]:
        return [shape for _, shape in self.shapes]

    @cached_property
    def _places(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...], int]]:
        """Name, shape, strides and first value of each tensor in a flattened vector."""
        starts = accumulate(self.sizes, initial=0)
        return [
            (name, shape, torch.empty(shape, device="meta").stride(), start)
            for (name, shape), start in zip(self.shapes, starts, strict=False)
        ]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Values of each tensor, in order."""
        return tuple(math.prod(shape) for _, shape in self.shapes)

    @cached_property
    def numel(self) -> int:
        """Values of all tensors."""
        return sum(self.sizes)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the uncompressed update, fp32."""
        return 4 * self.numel

    @cached_property
    def fingerprint(self) -> int:
        """CRC-32 of names and shapes; a frame of another layout is refused by it."""
        return zlib.crc32(repr(self.shapes).encode())

    def flatten(self, tensors: Named) -> Tensor:
        """Return one fp32 vector (numel,) in layout order; asserts that names and shapes are those
        of the layout."""
        assert tensors.keys() == self._by_name.keys(), "tensors of another layout"
        values = [tensors[name] for name in self.names]
        assert [each.shape for each in values] == self._forms, "tensors of another layout"

        if len(values) == 1:
            return values[0].detach().float().reshape(-1).clone()  # no view of the update
        vector: Tensor = _flatten_dense_tensors(values)  # type: ignore[no-untyped-call]
        return vector.detach().float()

    def unflatten(self, vector: Tensor) -> Named:
        """Invert `flatten`: views of a vector (numel,)."""
        assert vector.shape == (self.numel,), "a vector of another layout"
        vector = vector.contiguous()
        start = vector.storage_offset()
        return {
            name: vector.as_strided(shape, strides, start + offset)
            for name, shape, strides, offset in self._places
        }

    def check(self, tensors: Named, what: str) -> None:
        """Raise `WireError` unless `tensors` have exactly this layout, in fp32 and finite."""
        other = Layout.of(tensors)
        if other != self:
            difference = sorted(set(other.shapes) ^ set(self.shapes))[:2]
            raise WireError(f"{what}: tensors of another layout, first differences {difference}")

        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise WireError(f"{what}: {name!r} is {tensor.dtype}, expected torch.float32")

        if not is_finite(tensors):
            raise WireError(f"{what}: NaN or Inf among the values")


class WeightedMean:
    """Weighted mean of named tensors, folded as they arrive; the result does not depend on the
    order.

    Floating-point sums depend on their order, so every product weight * value is first cut, in
    fp64, into a multiple of 2^-12 and a rest that is a multiple of 2^-64; sums of such parts are
    exact (for 8192 updates at the limit, more below it). Memory is two fp64 copies of one update,
    whatever the number of sites. With one site the mean is its update, bit for bit (values over
    5e-13).
    """

    _COARSE = 2.0**-12
    _FINE = 2.0**-64
    _LIMIT = 2.0**28
    _PIECE = 2**20
    """Values that are folded at a time, so that what is computed for each takes no memory for
    all."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._high, self._low = (
            torch.zeros(0, dtype=torch.float64),
            torch.zeros(0, dtype=torch.float64),
        )
        self.weight = 0
        self.count = 0

    @classmethod
    def check(cls, tensors: Named, weight: int) -> None:
        """Raise `WireError` if a value is too large, or not a number, to be folded with
        `weight`."""
        for name, tensor in tensors.items():
            if not all(
                cls._fits(piece, weight) for piece in torch.split(tensor.reshape(-1), cls._PIECE)
            ):
                raise WireError(
                    f"update of {name!r}: a value is NaN, Inf or beyond {cls._LIMIT / weight:.3g}"
                )

    @classmethod
    def _fits(cls, values: Tensor, weight: int) -> bool:
        return bool((values.double().abs() * weight < cls._LIMIT).all())

    def add(self, tensors: Named, weight: int) -> None:
        """Fold one update in. `weight` is a positive whole number, such as a site's sample
        count."""
        assert weight > 0, "weights are positive"
        if self._layout is None:
            self._layout = Layout.of(tensors)
            self._high = torch.zeros(self._layout.numel, dtype=torch.float64)
            self._low = torch.zeros_like(self._high)

        values = torch.split(self._layout.flatten(tensors), self._PIECE)
        sums = zip(
            torch.split(self._high, self._PIECE), torch.split(self._low, self._PIECE), strict=True
        )
        for piece, (high_sum, low_sum) in zip(values, sums, strict=True):
            product = piece.double() * weight
            assert bool((product.abs() < self._LIMIT).all()), "not checked before"
            high = self._round(product, self._COARSE)
            low = low_sum + self._round(product - high, self._FINE)
            carry = self._round(
                low, self._COARSE
            )  # keeps `low` small; exact, so the order still does not matter
            high_sum.add_(high).add_(carry)
            low_sum.copy_(low - carry)

        self.weight += weight
        self.count += 1

    def mean(self) -> Named:
        """Return the mean in fp32; at least one update must have been added."""
        assert self._layout is not None, "mean of nothing"
        sums = zip(
            torch.split(self._high, self._PIECE), torch.split(self._low, self._PIECE), strict=True
        )

        return self._layout.unflatten(
            torch.cat([((high + low) / self.weight).float() for high, low in sums])
        )

    @staticmethod
    def _round(values: Tensor, quantum: float) -> Tensor:
        return torch.round(values / quantum) * quantum
