"""Means over the updates of a round, the same in any order of arrival."""

from typing import Any, Protocol

from fluvial.wire.tensors import Named, WeightedMean, norm


class Weighed(Protocol):
    """One site's update, as it counts."""

    @property
    def tensors(self) -> Named:
        """Difference to what the site received."""
        ...

    @property
    def weight(self) -> int:
        """Samples that it counts with."""
        ...

    @property
    def loss(self) -> float | None:
        """Mean training loss, nats per label token; None where the site sends none."""
        ...


class WeightedLoss:
    """Weighted mean of the sites' losses: terms are rounded to 2^-40 and summed exactly."""

    def __init__(self) -> None:
        self._sum = 0
        self._weight = 0

    def add(self, loss: float, weight: int) -> None:
        """Fold one site in."""
        self._sum += round(loss * 2**40) * weight
        self._weight += weight

    def mean(self) -> float:
        """Return nats per label token."""
        return self._sum / self._weight / 2**40


class Aggregate:
    """The mean update and the mean loss of a round; each update is folded in and dropped."""

    def __init__(self) -> None:
        self._mean = WeightedMean()
        self._loss = WeightedLoss()
        self._with_loss = 0
        self.weights: list[int] = []
        """Weight of each update, in order of arrival."""

    def add(self, update: Weighed) -> None:
        """Fold one update in."""
        self._mean.add(update.tensors, update.weight)
        self.weights.append(update.weight)
        if update.loss is not None:
            self._loss.add(update.loss, update.weight)
            self._with_loss += 1

    def mean(self) -> Named:
        """Return the weighted mean of the updates."""
        return self._mean.mean()

    def metrics(self, mean: Named) -> dict[str, Any]:
        """Return the `loss` (None where no site sends one), `sites` and `update_norm` of the round.

        `mean` is what became of the mean update.
        """
        return {
            "loss": self._loss.mean() if self._with_loss else None,
            "sites": self._mean.count,
            "update_norm": norm(mean),
        }
