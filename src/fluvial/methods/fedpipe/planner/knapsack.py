"""The multiple-choice knapsack, solved exactly for all capacities at once by dynamic programming.

Kellerer, Pferschy, Pisinger, "Knapsack Problems", Springer 2004, chapter 11. Costs are multiples of
(d_in + d_out) * rank, so after division by their greatest common divisor the table is small and the
solution exact. Where it would have more than `MOST_UNITS` columns, costs are rounded up to a larger
unit: every solution still keeps its capacity, `exact` is false, and `bound` limits what was lost.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

MOST_UNITS = 2**18
"""Columns of the table at most."""


@dataclass(frozen=True)
class Item:
    """A choice of one option; option 0 costs nothing and is worth nothing."""

    costs: tuple[int, ...]
    """Costs of the options, in ascending order."""
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.costs[0] == 0
        assert self.values[0] == 0
        assert len(self.costs) == len(self.values) < 256
        assert all(a < b for a, b in zip(self.costs, self.costs[1:], strict=False))


class Knapsack:
    """The best value of items for each capacity."""

    def __init__(self, items: Sequence[Item], most_units: int = MOST_UNITS) -> None:
        """Solve for every capacity up to that of the most costly options."""
        self.items = tuple(items)
        self.total = sum(item.costs[-1] for item in items)
        divisor = math.gcd(*(cost for item in items for cost in item.costs)) or 1
        self.exact = self.total // divisor <= most_units
        """True where costs are whole multiples of the unit."""
        self.unit = divisor if self.exact else math.ceil(self.total / most_units)
        """Cost of one column."""
        self._costs = [[-(-cost // self.unit) for cost in item.costs] for item in self.items]
        columns = sum(costs[-1] for costs in self._costs) + 1
        self.values: npt.NDArray[np.int64] = np.zeros(columns, dtype=np.int64)
        """Best value by capacity, in units of cost; it never falls."""
        self._options = np.zeros((len(self.items), columns), dtype=np.uint8)
        self._solve()

    def _solve(self) -> None:
        reached = 0
        for number, item in enumerate(self.items):
            before = self.values.copy()
            options = self._options[number]
            costs = self._costs[number]
            reached += costs[-1]

            for option in range(1, len(costs)):
                cost = costs[option]
                candidate = before[: reached + 1 - cost] + item.values[option]
                best = self.values[cost : reached + 1]
                better = candidate > best
                np.copyto(best, candidate, where=better)
                np.copyto(options[cost : reached + 1], option, where=better)

            # Beyond what these items can cost, the value is that of all they cost.
            self.values[reached + 1 :] = self.values[reached]
            options[reached + 1 :] = options[reached]

    def column(self, capacity: int) -> int:
        """Return the least column with the best value within `capacity`: of solutions of equal
        value the one that costs least."""
        last = min(capacity // self.unit, len(self.values) - 1)
        return int(np.searchsorted(self.values[: last + 1], self.values[last]))

    def value(self, capacity: int) -> int:
        """Return the best value within `capacity`."""
        return int(self.values[min(capacity // self.unit, len(self.values) - 1)])

    def solution(self, column: int) -> list[int]:
        """Return the option of each item in the best solution of a column."""
        chosen = [0] * len(self.items)
        for number in range(len(self.items) - 1, -1, -1):
            option = int(self._options[number, column])
            chosen[number] = option
            column -= self._costs[number][option]
        return chosen

    @cached_property
    def steps(self) -> npt.NDArray[np.int64]:
        """Return the columns at which the best value rises."""
        return np.flatnonzero(np.diff(self.values, prepend=-1)).astype(np.int64)

    def bound(self, capacity: int) -> float:
        """Return an upper bound of the exact optimum: that of the linear relaxation, which takes
        the increments of the items' concave hulls in descending order of value for cost."""
        increments = sorted(
            (increment for item in self.items for increment in _hull(item)),
            key=lambda pair: pair[1] / pair[0],
            reverse=True,
        )
        value = 0.0
        for cost, gain in increments:
            if cost > capacity:
                return value + gain * capacity / cost
            capacity -= cost
            value += gain
        return value


def _hull(item: Item) -> list[tuple[int, int]]:
    """Return the increments (cost, value) of the upper concave hull of an item's options."""
    hull: list[tuple[int, int]] = []
    for point in zip(item.costs, item.values, strict=True):
        if hull and point[1] <= hull[-1][1]:
            continue  # more cost for no more value
        while len(hull) > 1 and _below(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [
        (after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(hull)
    ]


def _below(first: tuple[int, int], middle: tuple[int, int], last: tuple[int, int]) -> bool:
    """Return whether `middle` lies on or under the line from `first` to `last`."""
    return (middle[1] - first[1]) * (last[0] - first[0]) <= (last[1] - first[1]) * (
        middle[0] - first[0]
    )
