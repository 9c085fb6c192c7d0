"""The choice of ranks within a capacity: by importance, or a baseline at equal bytes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fluvial.errors import ConfigError
from fluvial.methods.fedpipe.planner.candidates import Candidate, Granularity, normalised
from fluvial.methods.fedpipe.planner.knapsack import Item, Knapsack
from fluvial.methods.fedpipe.planner.settings import Selection
from fluvial.seeds import derive


@dataclass(frozen=True)
class Ranks:
    """Ranks of the candidates."""

    ranks: tuple[tuple[str, int], ...]
    """Ranks by module, in order of the names; modules without an adapter are absent."""
    lora: int
    """Parameters of the adapter."""
    value: int
    """Importance covered, V, in units."""


@dataclass(frozen=True)
class Group:
    """Candidates that get one rank together: one weight, or all weights of a name."""

    candidates: tuple[Candidate, ...]
    options: tuple[int, ...]
    """Ranks to choose from, 0 first, in ascending order."""

    @property
    def width(self) -> int:
        """Return the parameters for each rank."""
        return sum(candidate.width for candidate in self.candidates)

    @cached_property
    def item(self) -> Item:
        """The group as an item of the knapsack."""
        return Item(
            tuple(self.width * rank for rank in self.options),
            tuple(
                sum(candidate.value(rank) for candidate in self.candidates) for rank in self.options
            ),
        )


class RankChoice:
    """Ranks of all candidates for any capacity."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        ranks: Sequence[int],
        granularity: Granularity = "instance",
        *,
        seed: int = 0,
    ) -> None:
        """Group the candidates; `seed` draws the random choice."""
        self.candidates = normalised(candidates)
        self.seed = seed
        members: dict[str, list[Candidate]] = {}
        for candidate in self.candidates:
            key = candidate.module if granularity == "instance" else candidate.type
            members.setdefault(key, []).append(candidate)

        self.groups = [_group(members[key], ranks) for key in sorted(members)]

    @cached_property
    def knapsack(self) -> Knapsack:
        """The best value for each capacity."""
        return Knapsack([group.item for group in self.groups])

    def least(self, selection: Selection) -> int:
        """Return the parameters of the smallest adapter; raises `ConfigError` where no rank fits
        any candidate."""
        first = [group.item.costs[1] for group in self.groups if len(group.options) > 1]
        if not first:
            raise ConfigError(
                "method.planner.ranks: each is larger than a dimension of every weight; choose "
                "smaller ones"
            )
        return sum(first) if selection == "all" else min(first)

    def within(self, capacity: int, selection: Selection) -> Ranks:
        """Return ranks with at most `capacity` parameters."""
        if selection == "importance":
            return self.at(self.knapsack.column(capacity))
        if selection == "random":
            return self._ranks(self._random(capacity))
        return self._ranks(self._uniform(capacity, filled=selection == "uniform"))

    def at(self, column: int) -> Ranks:
        """Return the best ranks of a column of the knapsack."""
        return self._ranks(self.knapsack.solution(column))

    def of(self, ranks: dict[str, int]) -> Ranks:
        """Return given ranks by module with their value, for a plan made before."""
        chosen = [candidate for candidate in self.candidates if ranks.get(candidate.module)]
        return Ranks(
            tuple((candidate.module, ranks[candidate.module]) for candidate in chosen),
            sum(candidate.width * ranks[candidate.module] for candidate in chosen),
            sum(candidate.value(ranks[candidate.module]) for candidate in chosen),
        )

    def _ranks(self, options: Sequence[int]) -> Ranks:
        return self.of(
            {
                candidate.module: group.options[option]
                for group, option in zip(self.groups, options, strict=True)
                for candidate in group.candidates
            }
        )

    def _uniform(self, capacity: int, *, filled: bool) -> list[int]:
        """Return the highest option that all groups can have, and where the rest is `filled`, the
        next one for groups that are spread evenly."""
        levels = max(len(group.options) for group in self.groups)
        options = [0] * len(self.groups)
        spare = capacity
        for level in range(1, levels):
            raised = [min(level, len(group.options) - 1) for group in self.groups]
            cost = sum(
                group.item.costs[option] for group, option in zip(self.groups, raised, strict=True)
            )
            if cost > capacity:
                break
            options = raised
            spare = capacity - cost

        if filled:
            self._raise(options, spare, _spread(len(self.groups)))
        return options

    def _random(self, capacity: int) -> list[int]:
        """Return options that rise one by one, in a random order, as long as they fit."""
        order = [
            number
            for number, group in enumerate(self.groups)
            for _ in range(len(group.options) - 1)
        ]
        random.Random(derive(self.seed, "random ranks")).shuffle(order)
        options = [0] * len(self.groups)
        self._raise(options, capacity, order)
        return options

    def _raise(self, options: list[int], spare: int, order: Sequence[int]) -> None:
        """Raise the options of groups in place, each time by one, where `spare` parameters allow
        it."""
        for number in order:
            costs = self.groups[number].item.costs
            option = options[number]
            if option + 1 < len(costs) and costs[option + 1] - costs[option] <= spare:
                spare -= costs[option + 1] - costs[option]
                options[number] += 1


def _group(candidates: Sequence[Candidate], ranks: Sequence[int]) -> Group:
    """Return a group with the ranks that its smallest weight allows."""
    most = min(min(candidate.rows, candidate.columns) for candidate in candidates)
    return Group(tuple(candidates), (0, *(rank for rank in sorted(ranks) if rank <= most)))


def _spread(count: int) -> list[int]:
    """Return the numbers below `count` in an order whose every start is spread evenly: by their
    bits in reverse (van der Corput's sequence)."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: f"{number:0{bits}b}"[::-1])
