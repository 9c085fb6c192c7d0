"""HetLoRA's self-pruning of ranks, for the contenders of `benchmarks.fedpipe`.

Cho, Liu, Xu, Fahrezi, Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
Models", EMNLP 2024, https://arxiv.org/abs/2401.06432. A site adds lambda |B_tail| |A_tail| to its
loss, the norms of the last components of its adapter, and gives these components up where their
norm is smaller after its training than before. The other half of HetLoRA, weights that follow the
norms of the products, is the product's own (`method.aggregation.mode = "pad"`).

Components that were given up are zero at the site and zero in its message: the message has the
size that it had before, so a run's bytes do not show what pruning would save.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fluvial.federation.adapters import factor_names, modules_of
from fluvial.wire.tensors import Named

T = TypeVar("T", bound=Tensor)
DECAY = 0.85
"""Share gamma of a rank that remains after a pruning; the paper tries 0.85 to 0.99."""
PENALTY = 5e-3
"""Weight lambda of the norms of the last components; ours."""


@dataclass
class SelfPruning:
    """The ranks that sites have given up in the course of a run."""

    share: dict[str, float] = field(default_factory=dict)
    """Share of each rank that a site still has, by site."""

    def training(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `train_locally` with the penalty, and with the pruning after it."""

        def pruned(site: Any, received: Named, round: int, **named: Any) -> Any:
            ranks = self._ranks(site.name, received)
            start = _first(received, ranks)
            watch = named.pop("watch", None)

            def penalised(parameters: Mapping[str, nn.Parameter]) -> bool:
                _penalise(parameters, ranks)
                return watch is None or bool(watch(parameters))

            update, report = function(site, start, round, watch=penalised, **named)
            end = {name: start[name] + change for name, change in update.items()}
            if _tail_norm(end, ranks) < _tail_norm(start, ranks):
                self.share[site.name] = DECAY * self.share.get(site.name, 1.0)
            return {name: tensor - received[name] for name, tensor in end.items()}, report

        return pruned

    def _ranks(self, site: str, adapter: Named) -> dict[str, int]:
        """Return the rank that a site still has of each module."""
        share = self.share.get(site, 1.0)
        ranks = {}
        for module in modules_of(adapter):
            _, a = _factors(adapter, module)
            ranks[module] = math.ceil(share * len(a))
        return ranks


def _factors(tensors: Mapping[str, T], module: str) -> tuple[T, T]:
    """Return the factors B (rows, rank) and A (rank, columns) of a module."""
    name_b, name_a = factor_names(module)
    return tensors[name_b], tensors[name_a]


def _tail(rank: int) -> slice:
    """Return the components of a rank that may be given up; the first one never is."""
    return slice(max(1, math.floor(DECAY * rank)), rank)


def _first(adapter: Named, ranks: Mapping[str, int]) -> Named:
    """Return an adapter with zeros beyond `ranks`."""
    result = {name: tensor.clone() for name, tensor in adapter.items()}
    for module, rank in ranks.items():
        b, a = _factors(result, module)
        b[:, rank:] = 0
        a[rank:] = 0
    return result


@torch.no_grad()
def _penalise(parameters: Mapping[str, nn.Parameter], ranks: Mapping[str, int]) -> None:
    """Add the gradient of the penalty; components that were given up get none."""
    for module, rank in ranks.items():
        b, a = _factors(parameters, module)
        if a.grad is None or b.grad is None:
            continue

        tail = _tail(rank)
        norm_b = b[:, tail].norm()
        norm_a = a[tail].norm()
        if norm_a > 0 and norm_b > 0:
            b.grad[:, tail] += PENALTY * norm_a / norm_b * b[:, tail]
            a.grad[tail] += PENALTY * norm_b / norm_a * a[tail]

        b.grad[:, rank:] = 0
        a.grad[rank:] = 0


def _tail_norm(adapter: Named, ranks: Mapping[str, int]) -> float:
    """Return the sum over the modules of |B_tail| |A_tail|."""
    total = 0.0
    for module, rank in ranks.items():
        b, a = _factors(adapter, module)
        tail = _tail(rank)
        total += float(b[:, tail].norm() * a[tail].norm())
    return total
