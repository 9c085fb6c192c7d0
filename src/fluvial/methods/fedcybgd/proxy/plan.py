"""The choice of what a proxy keeps, from scores and the share to be sent."""

import heapq
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fluvial.errors import ConfigError
from fluvial.methods.fedcybgd.proxy.anatomy import Anatomy, Prunable
from fluvial.methods.fedcybgd.proxy.manifest import Manifest
from fluvial.methods.fedcybgd.proxy.scores import Scores
from fluvial.methods.fedcybgd.proxy.settings import TOLERANCE, ProxySettings
from fluvial.seeds import generator


def plan_proxy(
    scores: Scores,
    anatomy: Anatomy,
    *,
    trained: Sequence[int],
    settings: ProxySettings,
    seed: int,
    visit: int | str,
) -> Manifest:
    """Return what a site gets that trains the layers `trained` (none, for a block outside the
    layers).

    Depends on nothing else; on `seed` and `visit` only where `settings.randomised`. Raises
    `ConfigError` where the share to be kept cannot be reached (see `Anatomy.check`).
    """
    anatomy.check(trained, settings)
    dropped, gains = _drop(scores, anatomy, trained, settings, generator(seed, "proxy", visit))
    rest = {
        index: anatomy.layers[index] for index in anatomy.others(trained) if index not in dropped
    }
    goal = settings.kept * anatomy.size(trained)
    room = goal - sum(layer.fixed for layer in rest.values())
    mlps = {index: layer.mlp for index, layer in rest.items()}
    heads = {index: layer.attention for index, layer in rest.items() if layer.attention is not None}
    share = room / max(1, sum(layer.size - layer.fixed for layer in rest.values()))
    # Rounded away from one half, so that neurons, of which there are more, can make up for what is
    # missed.
    half = math.copysign(
        max((prunable.cost for prunable in heads.values()), default=0) / 2, share - 0.5
    )
    all_heads = sum(prunable.units * prunable.cost for prunable in heads.values())
    groups = _fill(heads, scores.influence, share * all_heads + half, step=1)
    room -= sum(heads[index].cost * count for index, count in groups.items())
    step = settings.multiple

    while True:
        neurons = _fill(mlps, scores.influence, room, step)
        missed = abs(sum(mlps[index].cost * count for index, count in neurons.items()) - room)
        if missed <= TOLERANCE * goal or step == 1:
            break
        step //= 2

    if missed > TOLERANCE * goal:
        raise ConfigError(
            f"method.download: kept={settings.kept} is missed by {missed / goal:.1%}, because in "
            "this small model a "
            "neuron more or less is a larger step; ask for more"
        )

    pruned = [i for i, count in neurons.items() if count < mlps[i].units]
    corrected = pruned if settings.correction == "least-squares" else []
    return Manifest(
        anatomy,
        tuple(trained),
        dropped,
        {i: highest(scores.neurons[i], neurons[i]) for i in pruned},
        {
            i: highest(scores.groups[i], count)
            for i, count in groups.items()
            if count < heads[i].units
        },
        gains,
        {i: scores.moments[i] for i in corrected},
    )


def highest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the `count` units of the highest scores, in order."""
    chosen = scores.argsort(descending=True, stable=True)[:count]
    return tuple(sorted(chosen.tolist()))


def _fill(
    prunables: Mapping[int, Prunable], influence: Sequence[float], goal: float, step: int
) -> dict[int, int]:
    """Return the units that stay in each layer: about the same share everywhere, multiples of
    `step` or all of them.

    Starting from the least, the layer with the smallest share gets the next `step` units, of equal
    ones the most influential, until `goal` parameters are there.
    """
    counts = {index: min(step, prunable.units) for index, prunable in prunables.items()}
    filled = sum(prunables[index].cost * count for index, count in counts.items())
    queue = [
        (count / prunables[index].units, -influence[index], index)
        for index, count in counts.items()
    ]
    heapq.heapify(queue)

    while queue:
        _, least, index = heapq.heappop(queue)
        prunable = prunables[index]
        count = min(counts[index] + step, prunables[index].units)
        more = (count - counts[index]) * prunable.cost

        if filled + more / 2 > goal:
            break
        if more:
            counts[index] = count
            filled = filled + more
            heapq.heappush(queue, (count / prunable.units, least, index))

    return counts


def _drop(
    scores: Scores,
    anatomy: Anatomy,
    trained: Sequence[int],
    settings: ProxySettings,
    draw: torch.Generator,
) -> tuple[tuple[int, ...], dict[int, float]]:
    """Return the dropped layers, in order, and the gains of those that might have been."""
    layers = anatomy.droppable(trained)
    count = anatomy.num_dropped(trained, settings)

    if not settings.randomised:
        ranked = sorted(layers, key=lambda index: (scores.influence[index], index))
        return tuple(sorted(ranked[:count])), {}

    if count == 0:
        return (), {}

    stay = chances([scores.influence[index] for index in layers], len(layers) - count)
    picked = _systematic(1 - stay, draw)
    dropped = tuple(index for index, dropped_now in zip(layers, picked, strict=True) if dropped_now)
    gains = {
        i: 1 / p
        for i, p, dropped_now in zip(layers, stay.tolist(), picked, strict=True)
        if not dropped_now and p < 1
    }

    return dropped, gains


def chances(influence: Sequence[float], stay: int) -> Tensor:
    """Return the chance of each layer to stay (layers,), fp64, `stay` in sum, where so many of them
    stay.

    A layer that adds r and stays with chance p, its change divided by p, has variance r^2 (1 / p -
    1); for a given sum of chances these are least for p in proportion to r. r is sqrt(influence),
    the size of the change against the stream. No chance is above 1, nor below half of the mean, so
    that gains are bounded (ours).
    """
    size = torch.tensor(influence, dtype=torch.float64).clamp(min=1e-12).sqrt()
    least = stay / len(influence) / 2
    low = 0.0
    high = 1 / float(size.min())

    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if float((middle * size).clamp(least, 1).sum()) < stay else (low, middle)
        )

    return (high * size).clamp(least, 1)


def _systematic(shares: Tensor, draw: torch.Generator) -> list[bool]:
    """Return a draw of a fixed number of items, each with its chance in `shares`, which sum to a
    whole number.

    Systematic sampling in random order (Madow, 1949): the items are laid end to end, each as long
    as its chance, and those are picked in which a mark falls; marks are 1 apart from a random
    start.
    """
    order = torch.randperm(len(shares), generator=draw)
    ends = shares[order].cumsum(0)
    ends *= ends[-1].round() / ends[-1]
    marks = (ends - torch.rand((), dtype=torch.float64, generator=draw)).floor()
    picked = torch.zeros(len(shares), dtype=torch.bool)
    picked[order] = marks.diff(prepend=torch.full((1,), -1.0, dtype=torch.float64)) > 0

    return picked.tolist()
