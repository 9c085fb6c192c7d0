"""The learned numbers of `klt`: directions, variances and tables, as they are published."""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from fluvial.codecs.klt.factors import basis_features, factors_of, num_published
from fluvial.codecs.klt.tables import KNOWN, LEARNED, Learned
from fluvial.errors import WireError
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named


@dataclass(frozen=True)
class Model:
    """The numbers that `fit` learns and `published` carries; pieces stand one after another in
    layout order.

    Logarithms are of standard deviations, in 1/16 octave.
    """

    tops: Tensor
    """int8: U (features, kept) of every basis, each column up to a factor."""
    rotations: Tensor
    """int8: 127 V (rank, rank) of every factor."""
    rows: Tensor
    """int8: logarithm for each row of Z; row + column is the entry's, of about unit mean power in
    every group."""
    cols: Tensor
    """int8: the same for each column."""
    groups: Tensor
    """int16: logarithm for each group (target, factor) of its root mean square over the updates of
    `fit`."""
    counts: Tensor
    """int16 (LEARNED * KNOWN): see `Learned`."""
    centroids: Tensor
    """int8 (LEARNED * (KNOWN - 1))."""

    def named(self) -> Named:
        """Return all as named tensors."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def learned(self) -> Learned:
        """The tables of the lowest classes."""
        return Learned(
            self.counts.numpy().reshape(LEARNED, KNOWN),
            self.centroids.numpy().reshape(LEARNED, KNOWN - 1),
        )

    @classmethod
    def check(cls, layout: Layout, share: float, payload: Payload) -> "Model":
        """Return the model of a published payload; raises `WireError` if a tensor is missing, left
        over or of another form."""
        expected = _forms(layout, share)
        if set(payload.tensors) != set(expected):
            raise WireError(
                f"klt: expected tensors {sorted(expected)}, found {sorted(payload.tensors)[:8]}"
            )

        for name, (dtype, length) in expected.items():
            tensor = payload.tensors[name]
            if tensor.dtype != dtype or tensor.shape != (length,):
                raise WireError(
                    f"klt: {name}: expected {dtype} ({length},), found {tensor.dtype} "
                    f"{tuple(tensor.shape)}; both "
                    "ends need the same codec settings"
                )

        if int(payload.tensors["counts"].min()) < 1:
            raise WireError("klt: counts: a frequency is below 1")

        return cls(**payload.tensors)


def published_bytes(layout: Layout, share: float) -> int:
    """Return the bytes of the numbers that a transform of `layout` publishes, before any fit."""
    return sum(dtype.itemsize * length for dtype, length in _forms(layout, share).values())


def _forms(layout: Layout, share: float) -> dict[str, tuple[torch.dtype, int]]:
    """Return the type and the length of each published tensor."""
    factors = factors_of(layout)
    return {
        "tops": (torch.int8, sum(n * num_published(n, share) for n in basis_features(factors))),
        "rotations": (torch.int8, sum(factor.rank**2 for factor in factors)),
        "rows": (torch.int8, sum(factor.rank for factor in factors)),
        "cols": (torch.int8, sum(factor.features for factor in factors)),
        "groups": (torch.int16, 1 + max(factor.group for factor in factors)),
        "counts": (torch.int16, LEARNED * KNOWN),
        "centroids": (torch.int8, LEARNED * (KNOWN - 1)),
    }
