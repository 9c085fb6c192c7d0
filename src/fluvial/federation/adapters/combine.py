"""The adapters of a round become one, by one of six published rules, and the loss is measured.

The exact result is T = G + sum_i w_i (B_i' A_i' - B_i A_i) for each module: the adapter before,
plus the mean change of the products over the sites that train the module. Where all sites begin
from G, it is the mean of the products, sum_i w_i B_i' A_i'. A mean of the factors is not T, because
the product of two means is not the mean of the products. The scale of LoRA is the same at all sites
(see `models.adapters`), so it does not appear.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fluvial.errors import ConfigError
from fluvial.federation.adapters.low_rank import LowRank, distance, share_of, total
from fluvial.federation.adapters.redistribute import without_side
from fluvial.federation.adapters.settings import AggregationSettings
from fluvial.federation.adapters.whole import (
    WholeAdapter,
    modules_of,
    read_factors,
    write_factors,
)
from fluvial.wire.tensors import Named, factor, moved


@dataclass(frozen=True)
class SiteChange:
    """The training of one site in a round."""

    received: Named
    """Adapter that the site began from, in its own ranks; a side path in it is ignored."""
    trained: Named
    """Adapter after its training, as the server decoded it: factors of the modules it trains."""
    weight: int
    """Samples that it counts with."""

    @classmethod
    def of(cls, received: Named, update: Named, weight: int) -> "SiteChange":
        """Return the training that changed `received` by `update`."""
        return cls(received, moved(without_side(received), update), weight)

    @classmethod
    def of_components(cls, components: Named, weight: int) -> "SiteChange":
        """Return the training whose change is the product of these factors, from nothing."""
        nothing = {
            name: tensor[:0] if factor(name) == "A" else tensor[:, :0]
            for name, tensor in components.items()
        }
        return cls(nothing, components, weight)

    @property
    def unchanged(self) -> bool:
        """True where the site sent back what it received."""
        return all(
            torch.equal(begin, end) or (not begin.numel() and not end.any())
            for begin, end in ((self.received[name], end) for name, end in self.trained.items())
        )


@dataclass(frozen=True)
class ModuleMeasures:
    """The quality of the aggregate of one module."""

    error: float
    """Distance of the aggregate that sites receive from the exact one, relative to the latter."""
    retained: float
    """Share of the exact one's energy that the aggregate explains: 1 - error^2. Under "svd" it is
    the share in the singular values that were taken."""
    dropped: float
    """Share of the energy that is neither in the adapter nor in the rest."""


@dataclass(frozen=True)
class Combined:
    """The result of a round's aggregation."""

    whole: WholeAdapter
    measures: Mapping[str, ModuleMeasures]
    """Measures by module that at least one site trained, in order of the names."""
    unchanged: tuple[str, ...]
    """Sites that sent back what they received, sorted; they count."""

    def metrics(self) -> dict[str, object]:
        """Return plain values for a round's record; those of all modules are means."""
        by_module = self.measures
        count = max(len(by_module), 1)
        metrics: dict[str, object] = {
            "aggregation_error": sum(each.error for each in by_module.values()) / count,
            "retained_energy": sum(each.retained for each in by_module.values()) / count,
            "dropped_energy": sum(each.dropped for each in by_module.values()) / count,
            "aggregation_error_by_module": {name: each.error for name, each in by_module.items()},
            "retained_energy_by_module": {name: each.retained for name, each in by_module.items()},
        }
        return metrics | ({"unchanged": list(self.unchanged)} if self.unchanged else {})


def combine(
    before: WholeAdapter,
    changes: Mapping[str, SiteChange],
    settings: AggregationSettings,
    *,
    fresh: Named,
) -> Combined:
    """Return the adapter after a round, in the ranks of the adapter `before`.

    Sites are taken in order of their names, so the order of arrival changes no bit. `fresh` is an
    adapter of that layout whose product is zero: it is what sites train under "stack", and under
    "svd" it fills components that are zero, which would never train. Raises `ConfigError` for ranks
    that a mode cannot take.
    """
    adapter = dict(before.adapter)
    rest = dict(before.rest)
    measures = {}
    samples = sum(change.weight for change in changes.values())
    norms = _norms(changes) if settings.mode == "pad" else {}
    trained = {name: set(modules_of(change.trained)) for name, change in sorted(changes.items())}

    for module in modules_of(before.adapter):
        training = [changes[name] for name, modules in trained.items() if module in modules]
        if not training:
            continue

        weights = _shares([change.weight for change in training])
        if settings.absent == "count":
            weights = [change.weight / samples for change in training]
        sizes = [norms[name] for name, modules in trained.items() if norms and module in modules]
        given = _Module(
            module,
            before,
            [read_factors(change.received, module) for change in training],
            [read_factors(change.trained, module) for change in training],
            weights,
            _shares(sizes) if any(sizes) else weights,
            read_factors(fresh, module),
        )
        result = given.combined(settings)
        adapter |= write_factors(result.adapter, module)
        rest |= write_factors(result.rest, module)
        measures[module] = result.measures

    unchanged = tuple(name for name, change in sorted(changes.items()) if change.unchanged)
    return Combined(WholeAdapter(adapter, rest), measures, unchanged)


@dataclass(frozen=True)
class _Result:
    adapter: LowRank
    rest: LowRank
    measures: ModuleMeasures


@dataclass(frozen=True)
class _Module:
    """The factors of one module, at the server and at the sites that train it."""

    name: str
    before: WholeAdapter
    received: Sequence[LowRank]
    trained: Sequence[LowRank]
    weights: Sequence[float]
    """Weights of the sites; their sum is below 1 where absent sites count."""
    padding_weights: Sequence[float]
    """Weights of the sites under "pad": HetLoRA's, or the others where every product is zero."""
    fresh: LowRank

    def combined(self, settings: AggregationSettings) -> _Result:
        """Return the aggregate by the mode of `settings`."""
        rank = self.fresh.rank
        nothing = self.fresh.first(0)

        if settings.mode in ("ab-mean", "pad", "ffa"):
            adapter = self._mean_of_factors(settings)
            target = self._mean_product()
            return _Result(adapter, nothing, _measures(target, adapter, nothing, adapter))

        target = self._exact(settings).sorted()
        kept = settings.residual_rank
        if settings.mode == "svd":
            adapter = _filled(target.first(rank), self.fresh)
            rest = target.after(rank).first(kept if settings.target == "changes" else 0)
            return _Result(adapter, rest, _measures(target, adapter, rest, adapter))

        adapter = self.fresh if settings.mode == "stack" else self._mean_of_factors(settings)
        rest = total([target, adapter.times(-1.0)]).sorted().first(kept)
        delivered = total([adapter, rest])
        return _Result(adapter, rest, _measures(target, adapter, rest, delivered))

    def _mean_product(self) -> LowRank:
        """Return the mean of the products; absent sites that count have the product of before."""
        terms = [t.times(w) for t, w in zip(self.trained, self.weights, strict=True)]
        present = sum(self.weights)
        if present < 1:
            before = read_factors(self.before.adapter, self.name)
            terms.append(before.times(1 - present))
        return total(terms)

    def _exact(self, settings: AggregationSettings) -> LowRank:
        """Return the matrix T that the aggregate shall be."""
        if settings.target == "products":
            return self._mean_product()

        terms = [self.before.product(self.name)]
        for received, trained, weight in zip(
            self.received, self.trained, self.weights, strict=True
        ):
            terms += [trained.times(weight), received.times(-weight)]
        return total(terms)

    def _mean_of_factors(self, settings: AggregationSettings) -> LowRank:
        """Return the product of the means of B and of A, with zeros up to the largest rank.

        Components beyond the largest rank of the round stay as they were.
        """
        ranks = {trained.rank for trained in self.trained}
        if settings.mode == "ab-mean" and len(ranks) > 1:
            raise ConfigError(
                f"method.aggregation.mode='ab-mean': sites train {self.name!r} with ranks "
                f"{sorted(ranks)}, whose factors have no mean; choose 'svd', or 'pad'"
            )
        if settings.mode == "ffa":
            self._check_shared_a()

        weights = self.padding_weights if settings.mode == "pad" else self.weights
        before = read_factors(self.before.adapter, self.name)
        most = max(ranks)
        rest_weight = 1 - sum(weights)
        left = before.left[:, :most] * rest_weight
        right = before.right[:most] * rest_weight

        for trained, weight in zip(self.trained, weights, strict=True):
            padded = trained.padded(most)
            left = left + padded.left * weight
            right = right + padded.right * weight

        if settings.mode == "ffa":
            right = max(self.trained, key=lambda trained: trained.rank).right
        return total([LowRank(left, right), before.after(most)])

    def _check_shared_a(self) -> None:
        """Raise `ConfigError` unless every site has the first rows of one A."""
        longest = max(self.trained, key=lambda trained: trained.rank).right
        if not all(torch.equal(one.right, longest[: one.rank]) for one in self.trained):
            raise ConfigError(
                "method.aggregation.mode='ffa': sites have trained A, and the mode needs one A "
                "for all; set method.factors='B'"
            )


def _measures(
    target: LowRank, adapter: LowRank, rest: LowRank, delivered: LowRank
) -> ModuleMeasures:
    """Return the measures of an aggregate, of which sites receive `delivered`."""
    size = target.norm()
    error = share_of(distance(target, delivered), size)
    dropped = share_of(distance(target, total([adapter, rest])), size) if rest.rank else error
    return ModuleMeasures(error, 1 - error**2, dropped**2)


def _shares(weights: Sequence[float]) -> list[float]:
    """Return weights that add up to 1."""
    whole = sum(weights)
    return [weight / whole for weight in weights]


def _norms(changes: Mapping[str, SiteChange]) -> dict[str, float]:
    """Return the norm of all products of each site, which is its weight in HetLoRA."""
    return {
        name: math.hypot(
            *(read_factors(change.trained, module).norm() for module in modules_of(change.trained))
        )
        for name, change in changes.items()
    }


def _filled(components: LowRank, fresh: LowRank) -> LowRank:
    """Return `components` with those of `fresh` behind them, up to the rank of `fresh`."""
    return total([components, fresh.after(components.rank)])
