"""The factors of a layout as short vectors along the rank axis, over the RMS of their group."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluvial.codecs.learned.canvas import target
from fluvial.errors import ConfigError
from fluvial.wire.tensors import Layout
from fluvial.wire.tensors import factor as factor_kind

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class VectorFactor:
    """One factor: `count` vectors of `width` values along the rank axis; the last may end in
    zeros."""

    name: str
    shape: tuple[int, ...]
    kind: int
    group: int
    count: int
    width: int


def vector_factors(layout: Layout, width: int) -> tuple[list[VectorFactor], Floats]:
    """Return the factors in layout order, and how many values each group has."""
    groups: dict[tuple[str, int], int] = {}
    factors = []

    for name, shape in layout.shapes:
        which = factor_kind(name)
        if which is None or len(shape) != 2 or 0 in shape:
            raise ConfigError(
                f"codec: {name!r} with shape {shape} is no LoRA factor; vq codes only A and B"
            )

        kind = "AB".index(which)
        group = groups.setdefault((target(name), kind), len(groups))
        factors.append(VectorFactor(name, shape, kind, group, -(-math.prod(shape) // width), width))

    if not factors:
        raise ConfigError("codec: the adapter has no tensors")

    return factors, np.bincount([factor.group for factor in factors], layout.sizes).astype(
        np.float64
    )


def normalised(
    vector: Tensor, layout: Layout, factors: Sequence[VectorFactor], sizes: Floats
) -> tuple[list[Tensor], Floats]:
    """Return the vectors (count, width) of every factor over the RMS of its group, and these RMS
    (groups,)."""
    pieces = torch.split(vector.double(), list(layout.sizes))
    energy = np.zeros(len(sizes))

    for piece, factor in zip(pieces, factors, strict=True):
        energy[factor.group] += float(piece.square().sum())
    scales = np.sqrt(energy / sizes)
    rows = []
    for piece, factor in zip(pieces, factors, strict=True):
        x = piece.view(factor.shape)
        x = (x if factor.kind else x.T).reshape(-1) / (scales[factor.group] or 1.0)
        x = torch.nn.functional.pad(x, (0, factor.count * factor.width - len(x)))
        rows.append(x.view(factor.count, factor.width).float())

    return rows, scales


def from_vectors(vectors: Tensor, factor: VectorFactor) -> Tensor:
    """Return the factor (numel,) that `vectors` (count, width) came from."""
    flat = vectors.reshape(-1)[: math.prod(factor.shape)]
    return flat if factor.kind else flat.view(factor.shape[::-1]).T.reshape(-1)


def group_weights(scales: Floats, sizes: Floats) -> Floats:
    """Return what a squared error of one costs in each group (groups,), against the mean square of
    all values."""
    mean = float((scales**2 * sizes).sum() / sizes.sum())
    return scales**2 / (mean or 1.0)
