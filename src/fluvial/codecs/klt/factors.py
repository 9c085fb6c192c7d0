"""The LoRA factors of a layout as the transform of `klt` sees them: matrices X (rank, features)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluvial.codecs.learned.canvas import path, target
from fluvial.errors import ConfigError
from fluvial.wire.tensors import Layout
from fluvial.wire.tensors import factor as factor_kind

_SAME_INPUT = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}


@dataclass(frozen=True)
class Factor:
    """One factor as the transform sees it: X (rank, features)."""

    name: str
    rank: int
    features: int
    transposed: bool
    basis: int
    group: int


def factors_of(layout: Layout) -> list[Factor]:
    """Return the factors in layout order; raises `ConfigError` for what is no LoRA factor."""
    bases: dict[tuple[str, int], int] = {}
    groups: dict[tuple[str, str], int] = {}
    factors = []

    for name, shape in layout.shapes:
        kind = factor_kind(name)
        module = target(name)
        if kind is None or len(shape) != 2 or 0 in shape:
            raise ConfigError(
                f"codec: {name!r} with shape {shape} is no LoRA factor; klt codes only A and B"
            )

        rank, features = shape if kind == "A" else shape[::-1]
        shared = kind == "A" and module in _SAME_INPUT
        key = path(name).removesuffix(module) + _SAME_INPUT[module] if shared else name
        basis = bases.setdefault((key, features), len(bases))
        group = groups.setdefault((module, kind), len(groups))
        factors.append(Factor(name, rank, features, kind == "B", basis, group))

    if not factors:
        raise ConfigError("codec: the adapter has no tensors")

    return factors


def num_published(features: int, share: float) -> int:
    """Return the published directions of an axis."""
    return max(int(share * features), 1)


def flat(x: Tensor, factor: Factor) -> Tensor:
    """Flatten x, as the transform sees a factor, in layout order (rank * features,)."""
    return (x.T if factor.transposed else x).reshape(-1)


def group_sizes(factors: Sequence[Factor]) -> Tensor:
    """Return the number of values of every group (groups,), fp64."""
    sizes = torch.zeros(1 + max(factor.group for factor in factors), dtype=torch.float64)
    for factor in factors:
        sizes[factor.group] += factor.rank * factor.features
    return sizes


def basis_features(factors: Sequence[Factor]) -> list[int]:
    """Return the features of every basis."""
    return list({factor.basis: factor.features for factor in factors}.values())
