"""The largest components of a site's change, which a site sends first when it cannot send all.

A site began from B A and ended with B' A'. The components of its change D = B' A' - B A come in
falling order within each module, and over all modules by energy for each value that they cost. So
every prefix of this one order holds, within each module, the best approximation of D of its rank
(Eckart and Young, 1936). Ours, after the specification's "what arrived counts".
"""

import math
from collections.abc import Mapping

import torch

from fluvial.federation.adapters.low_rank import LowRank, total
from fluvial.federation.adapters.whole import (
    factor_names,
    modules_of,
    read_factors,
    write_factors,
)
from fluvial.models.adapters import module_of
from fluvial.wire.tensors import Layout, Named, factor

_ROUNDING = 1e-12
"""Components below this share of the adapter's own norm are rounding of the difference in fp64."""


def change_of(received: Named, update: Named, module: str) -> LowRank:
    """Return the change D of one module, its components in falling order."""
    before = read_factors(received, module)
    b, a = factor_names(module)
    after = LowRank.of(received[b] + update[b], received[a] + update[a])
    change = total([after, before.times(-1.0)]).sorted()
    sizes = change.left.square().sum(dim=0)  # balanced: the singular values
    rounding = _ROUNDING * max(before.norm(), after.norm())
    return change.first(int((sizes > rounding).sum()))


def leading(received: Named, update: Named, share: float) -> Named:
    """Return the factors of the largest components of the change, at least one, that have at most a
    `share` of the values of the update; a module without any is left out.

    `received` is the adapter that `update` is the difference to.
    """
    values = share * Layout.of(update).numel
    changes = {module: change_of(received, update, module) for module in modules_of(update)}
    order = []
    for module, change in changes.items():
        cost = change.left.shape[0] + change.right.shape[1]
        sizes = change.left.square().sum(dim=0)  # balanced: the singular values
        order += [(-(float(size) ** 2) / cost, module, cost) for size in sizes]

    ranks = dict.fromkeys(changes, 0)
    spent = 0
    for _, module, cost in sorted(order):
        if spent + cost > values and spent:
            break
        ranks[module] += 1
        spent += cost

    tensors: Named = {}
    for module, rank in ranks.items():
        if rank:
            tensors |= write_factors(changes[module].first(rank), module)
    if not tensors:  # nothing was changed, and a frame carries something
        tensors = _nothing(received, next(iter(changes)))
    return {name: tensors[name] for name in update if name in tensors}


def _nothing(received: Named, module: str) -> Named:
    """Return one component that is zero."""
    zero = read_factors(received, module).first(1).times(0.0)
    return write_factors(LowRank(zero.left, zero.right * 0.0), module)


def layout_of_ranks(layout: Layout, ranks: Mapping[str, int]) -> Layout:
    """Return the layout of components: `layout` with these ranks by module, without rank 0."""
    shapes = []
    for name, shape in layout.shapes:
        rank = ranks[module_of(name)]
        if rank:
            resized = (rank, shape[1]) if factor(name) == "A" else (shape[0], rank)
            shapes.append((name, resized))
    return Layout(tuple(shapes))


def completed(components: Named, layout: Layout) -> Named:
    """Return components with factors of rank 0 for the modules of `layout` that have none: their
    site has trained them, and what it has not sent counts as no change."""
    return {
        name: components.get(
            name, torch.zeros((0, shape[1]) if factor(name) == "A" else (shape[0], 0))
        )
        for name, shape in layout.shapes
    }


def factor_length(components: Named, received: Named) -> float:
    """Return the least norm of a difference of the factors, to first order, that makes this change.

    |D| <= |dB| |A| + |B| |dA| with spectral norms of A and B, so an honest site's own difference is
    at least as long.
    """
    squares = []
    for module in modules_of(components):
        b, a = factor_names(module)
        spectral = [float(torch.linalg.matrix_norm(received[name].double(), 2)) for name in (a, b)]
        size = read_factors(components, module).norm()
        squares.append(size**2 / max(math.fsum(each**2 for each in spectral), 1e-30))
    return math.sqrt(math.fsum(squares))
