"""Bounds on the effect of one site on a round: on the length of its update, and on its weight.

A site says itself how many records it has and how far its weights moved, so both are bounded where
replies meet. Every update that is `fleet.max_update_growth` times longer than the median of its
round is its site's failure, so sites that lie together fail together, as long as they are a
minority. A site that has more than `fleet.max_weight_share` of a round's weight counts with that
share, and the round's record says so; several sites that claim too many records are not bounded
together. Sites within these bounds count exactly as they would without them.
"""

import logging
import math
import statistics
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from fluvial.errors import WireError
from fluvial.federation.failures import Failure
from fluvial.federation.fleet import Fleet
from fluvial.federation.waiting import on_disk
from fluvial.training.config import TrainConfig
from fluvial.wire.tensors import Named, WeightedMean, energy

logger = logging.getLogger(__name__)
T = TypeVar("T")

FEWEST_COMPARED = 3
"""Least number of replies among which one can be called too long."""
_IN_MEMORY = 2
"""Updates in memory that wait for the others of their round."""
_SPARE = 100.0
"""Factor by which a decoded update may exceed what training can reach: codecs and error feedback
make updates longer."""
_ADAM = 4.0
"""Least upper bound on Adam's change of a weight in one step, in learning rates: (1 - beta_1) /
sqrt(1 - beta_2) is 3.2 with the usual decays, and more with others."""


@dataclass(frozen=True)
class Counted(Generic[T]):
    """A reply that counts."""

    site: str
    weight: int
    """Samples that the site's update counts with; at most its share of the round."""
    content: T


@dataclass(frozen=True)
class _Held(Generic[T]):
    """A reply that waits for the others of its round."""

    site: str
    length: float
    weight: int
    content: T


class BoundedReplies(Generic[T]):
    """The replies of one round, counted as soon as it is known that they do.

    The heaviest so far waits until all have come, and so does each that may still turn out to be
    too long: until more than half of the cohort has answered, that is every one. Of those that
    wait, two are in memory and the others in temporary files. The order of arrival changes nothing.
    """

    def __init__(self, fleet: Fleet, task: str, round: int, *, asked: int) -> None:
        self._fleet = fleet
        self._task = task
        self._round = round
        self._asked = asked
        self._held: list[_Held[T]] = []
        self._lengths: list[float] = []
        """Lengths of all replies so far, in ascending order."""
        self._weights: dict[str, int] = {}
        self.clipped: list[dict[str, Any]] = []
        """Sites whose weight was lowered, with both weights; complete after `close`."""

    def add(self, site: str, length: float, weight: int, content: T) -> list[Counted[T]]:
        """Take one reply; return those that count from now on, with the weight that they have."""
        insort(self._lengths, length)
        self._weights[site] = weight
        self._held.append(_Held(site, length, weight, content))
        heaviest = max(self._held, key=lambda held: (held.weight, held.site))
        longest = self._longest_for_sure()
        ready = [held for held in self._held if held is not heaviest and held.length <= longest]
        self._held = [held for held in self._held if held is heaviest or held.length > longest]
        if len(self._held) > _IN_MEMORY and self._held[-1].site == site:
            self._held[-1] = replace(self._held[-1], content=on_disk(content))

        return [Counted(held.site, held.weight, held.content) for held in ready]

    def close(self) -> Iterator[Counted[T]]:
        """Return the rest of those that count; raise `ClientError` as `Fleet.ask` does."""
        self._refuse_too_long()
        self.clipped = lower_heaviest(
            self._weights, self._fleet.config.max_weight_share, self._round
        )
        answered = len(self._weights)
        self._fleet.require_quorum(self._task, self._round, answered=answered, asked=self._asked)

        return (Counted(held.site, self._weights[held.site], held.content) for held in self._held)

    def _longest_for_sure(self) -> float:
        """Return the length up to which no update is too long, whatever comes from those that have
        not answered."""
        if self._asked < FEWEST_COMPARED:
            return math.inf

        # The median is least where all others answer, with updates of length 0.
        middle = len(self._lengths) - 1 - self._asked // 2
        least = self._lengths[middle] if middle >= 0 else 0.0
        return least * self._fleet.config.max_update_growth

    def _refuse_too_long(self) -> None:
        for held in sorted(self._held, key=lambda held: held.site):
            reason = too_long(held.length, self._lengths, self._fleet.config.max_update_growth)
            if reason is not None:
                self._held.remove(held)
                del self._weights[held.site]
                self._fleet.reject(Failure(held.site, self._round, self._task, reason, 0))


def lower_heaviest(weights: dict[str, int], share: float, round: int) -> list[dict[str, Any]]:
    """Lower, in `weights`, that of a site above its `share` of all; return its name and both
    weights, nothing where no site is above."""
    if share >= 1 or len(weights) < 2:
        return []

    heaviest = max(weights, key=lambda site: (weights[site], site))
    weight = weights[heaviest]
    others = sum(weights.values()) - weight
    most = max(1, math.floor(share / (1 - share) * others))
    if weight <= most:
        return []

    weights[heaviest] = most
    logger.warning(
        "round %d: site %r says it has %d records, more than fleet.max_weight_share=%g of all; "
        "it counts with %d",
        round,
        heaviest,
        weight,
        share,
        most,
    )
    return [{"site": heaviest, "weight": weight, "counted": most}]


def too_long(length: float, lengths: Sequence[float], growth: float) -> str | None:
    """Return why an update of this length is refused among `lengths`, None where it is not."""
    if len(lengths) < FEWEST_COMPARED:
        return None

    middle = statistics.median_low(lengths)
    if not 0 < middle * growth < length:
        return None

    return (
        f"its update has length {length:.4g}, over fleet.max_update_growth={growth:g} times the "
        f"median of {len(lengths)} updates ({middle:.4g}); raise that setting where sites differ "
        "so much"
    )


def reach(train: TrainConfig, samples: int) -> float:
    """Return the root mean square that no honest change of a weight exceeds; infinite for SGD.

    Adam, fused or not, moves a weight by a small multiple of the learning rate in a step, and
    weight decay by a share of it. A step of SGD is as long as its gradient.
    """
    if train.optim == "sgd":
        return math.inf
    step = max(_ADAM, (1 - train.adam_beta1) / math.sqrt(1 - train.adam_beta2))
    return _SPARE * step * train.learning_rate * train.steps(samples) * (1 + train.weight_decay)


def check_update(update: Named, weight: int, train: TrainConfig) -> None:
    """Raise `WireError` for an update that cannot be folded into a mean, or that no training of a
    site can make."""
    WeightedMean.check(update, weight)
    check_length(rms(update), weight, train)


def check_length(size: float, weight: int, train: TrainConfig) -> None:
    """Raise `WireError` for a root mean square `size` of an update that no training of a site with
    `weight` samples can make."""
    far = reach(train, weight)
    if size > far:
        raise WireError(
            f"update: its values are {size:.4g} (root mean square), and training with these "
            f"settings reaches no {far:.4g}"
        )


def rms(update: Named) -> float:
    """Return the root mean square over all values of an update."""
    return math.sqrt(energy(update) / sum(tensor.numel() for tensor in update.values()))
