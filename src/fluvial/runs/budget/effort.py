"""Optimizer steps of all trials: how many there are at most, and how many of them are done."""

import logging
import math
from collections.abc import Sequence

from fluvial.runs.budget.config import BudgetConfig
from fluvial.runs.budget.pairs import num_starts
from fluvial.runs.budget.settled import Open

logger = logging.getLogger(__name__)

KEEP = 3
"""One of so many adapters goes on after a part of the rounds."""
FINALISTS = 2
"""Adapters whose numbers of steps are tried."""


def part_rounds(rounds: int) -> tuple[int, int]:
    """Return the rounds after which the worse adapters end, of `rounds` in all."""
    return max(1, rounds // 4), max(1, rounds // 2)


def stages(
    budget: BudgetConfig, free: Open, num_adapters: int, steps: Sequence[int]
) -> tuple[int, ...]:
    """Return the steps of one simulated site in each stage of the trials, at most.

    `steps` are the numbers of steps of a round that are tried, first that of all adapters. The
    stages are two parts and the rest of `num_adapters`, other steps, other codecs of the downlink
    and of the uplink, and sites that train alone.
    """
    rounds = budget.trial_rounds
    longest = [budget.trial_of(rounds, each) * each for each in steps]
    most = max(longest)
    starts = num_starts(budget, free)
    going = num_adapters * starts
    done = 0
    found = []
    for until in (*part_rounds(rounds), rounds):
        found.append(going * (until - done) * steps[0])
        going = min(going, max(FINALISTS, math.ceil(going / KEEP)))
        done = until

    others = (
        len(budget.tried_downlinks) - 1 if free.downlink else 0,
        len(budget.tried_codecs) - 1 if free.codec else 0,
    )
    finalists = starts * min(FINALISTS, num_adapters)
    found.append(finalists * sum(longest[1:]))
    return (*found, *(number * most for number in others), most)


class Effort:
    """Progress of all trials, in steps of one simulated site times their number."""

    def __init__(self, planned: Sequence[int], sites: int, unit: str) -> None:
        """Take the steps of each stage at most (see `stages`), or rounds where these have as many
        steps as the data gives; `unit` names which."""
        self.sites = sites
        self.unit = unit
        self.done = 0
        self.total = 0
        self._planned = list(planned)

    def begin(self, steps: int) -> None:
        """Begin the next stage, of which one site makes `steps`."""
        self._planned = self._planned[1:]
        self.total = self.done + self.sites * (steps + sum(self._planned))

    def add(self, steps: int, words: str) -> None:
        """Note `steps` of all sites together, and say in `words` where they were made."""
        self.done += steps
        logger.info(
            "budget: trials at %d of %d %s at most, %s", self.done, self.total, self.unit, words
        )
