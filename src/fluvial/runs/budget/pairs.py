"""Codecs of both ways that are tried together, and their order."""

from dataclasses import dataclass

from fluvial.codecs import CodecSettings, read_settings
from fluvial.runs.budget.config import BudgetConfig
from fluvial.runs.budget.settled import Open

EXACT = "exact"
"""Candidate of the downlink that codes nothing."""
FINEST = 8.0
"""Least rate of a codec with a rate: above it, `int4` and `int8` need no more bytes."""
COARSEST = 1024.0
"""Largest rate of a codec with a rate."""
_BITS = {None: 32.0, EXACT: 32.0, "int8": 8.0, "int4": 4.0, "nf4": 4.0}
"""Bits of a value under what has no rate; the configuration's own counts as exact."""
_BELOW_NF4 = 3.99


@dataclass(frozen=True)
class Pair:
    """Names of a codec for each way; None stands for what the configuration sets."""

    up: str | None
    down: str | None

    @property
    def rated(self) -> bool:
        """Return whether one of the two has a rate."""
        return self.rated_up or self.rated_down

    @property
    def rated_up(self) -> bool:
        """Return whether the codec of the uplink has a rate."""
        return self.up not in _BITS

    @property
    def rated_down(self) -> bool:
        """Return whether the codec of the downlink has a rate."""
        return self.down not in _BITS

    @property
    def is_one_codec(self) -> bool:
        """Return whether one codec with a rate carries both ways."""
        return self.rated_up and self.up == self.down

    @property
    def coarseness(self) -> tuple[float, float, float]:
        """Return a key that is least for the pair whose coarser codec is the most exact.

        Of two such pairs it is the one with the more exact downlink: what the uplink loses differs
        between sites, and their mean loses less.
        """
        up, down = (_BITS.get(name, _BELOW_NF4) for name in (self.up, self.down))
        return -min(up, down), -max(up, down), -down

    def codec(self, rate: float) -> CodecSettings | None:
        """Return the settings of the uplink, at `rate` where its codec has one."""
        return None if self.up is None else _settings(self.up, rate, {"error_feedback": True})

    def downlink(self, rate: float) -> CodecSettings | None:
        """Return the settings of the downlink, at `rate` where its codec has one."""
        return None if self.down in (None, EXACT) else _settings(str(self.down), rate, {})


def _settings(name: str, rate: float, more: dict[str, object]) -> CodecSettings:
    rated = {} if name in _BITS else {"rate": rate}
    return read_settings({"name": name, **more, **rated})


def pairs(budget: BudgetConfig, free: Open) -> list[Pair]:
    """Return all pairs of what is open, the one whose coarser codec is the most exact first.

    Where the downlink is not open, the order is that of the settings.
    """
    ups = budget.tried_codecs if free.codec else (None,)
    downs = budget.tried_downlinks if free.downlink else (None,)
    found = [Pair(up, down) for up in ups for down in downs]
    return sorted(found, key=lambda pair: pair.coarseness) if free.downlink else found


def num_starts(budget: BudgetConfig, free: Open) -> int:
    """Return the number of pairs with which the trials of an adapter begin, at most."""
    return max(1, sum(pair.is_one_codec for pair in pairs(budget, free)))


def other_downlinks(winner: Pair, budget: BudgetConfig, free: Open) -> list[Pair]:
    """Return the winner with each other candidate of the downlink; none where that is not open."""
    if not free.downlink:
        return []
    return [Pair(winner.up, name) for name in budget.tried_downlinks if name != winner.down]


def other_codecs(winner: Pair, budget: BudgetConfig, free: Open) -> list[Pair]:
    """Return the winner with each other candidate of the uplink; none where that is not open."""
    if not free.codec:
        return []
    return [Pair(name, winner.down) for name in budget.tried_codecs if name != winner.up]
