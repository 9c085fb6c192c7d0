"""Measures of a run beside those of another, paired by site, with the interval of their mean."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fluvial.training.wilson import correlation

Answer = Literal["yes", "partly", "no", "not measured"]

LEAST_SITES = 3
"""Sites from which the mean over them has an interval."""
LEAST_OF_ONE_SIGN = 6
"""Sites that must all move one way for that alone to be clear: a sign test at 5 %, 2 / 2^6."""


@dataclass(frozen=True)
class Comparison:
    """Held-out measures of a run against those of one other, at the sites where both were
    measured."""

    sites: int
    better: int
    """Sites whose measure is better than the other run's."""
    difference: float
    """Mean over these sites of this run's measure less the other's: nats per token, or a share of
    answers."""
    once: bool = False
    """True where all sites compare the same two models on one held-out set."""
    low: float | None = None
    """Lower end of the 95 % interval of `difference`, by Student's t over the sites; None without
    one."""
    high: float | None = None
    """Upper end, likewise."""
    clear: bool | None = None
    """True where the interval leaves 0 out, or all of enough sites moved one way; None without an
    interval."""
    not_better: tuple[str, ...] = ()
    """Sites whose measure is not better than the other run's."""

    @property
    def answer(self) -> Answer:
        """Return "yes" if most sites and the mean of the losses gained, "no" if neither did."""
        gained = (2 * self.better > self.sites, self.difference < 0)
        return "yes" if all(gained) else "partly" if any(gained) else "no"


def compare_sites(
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    *,
    lower_is_better: bool = True,
    one_set: bool = False,
) -> Comparison | None:
    """Return the comparison of measures by site; None where no site has both.

    `one_set` says that all sites measure on the same held-out records.
    """
    pairs = {site: (ours[site], theirs[site]) for site in ours if site in theirs}
    if not pairs:
        return None

    gains = {site: own - other for site, (own, other) in pairs.items()}
    sign = -1 if lower_is_better else 1
    not_better = tuple(site for site, gain in gains.items() if sign * gain <= 0)
    once = one_set and len(set(pairs.values())) == 1
    interval = None if once else mean_interval(list(gains.values()))
    return Comparison(
        len(gains),
        len(gains) - len(not_better),
        math.fsum(gains.values()) / len(gains),
        once=once,
        low=interval and interval[0],
        high=interval and interval[1],
        clear=interval and (not interval[0] <= 0 <= interval[1] or _one_way(gains.values())),
        not_better=not_better,
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the ends of the 95 % interval of a mean by Student's t; None for fewer values than
    `LEAST_SITES`, and for values that are all equal."""
    if len(values) < LEAST_SITES or len(set(values)) == 1:
        return None

    from fluvial.runs.comparison.statistics import interval

    _, low, high = interval(values)
    return None if low is None or high is None else (low, high)


def losses(result: Mapping[str, Any], which: Literal["base", "final"]) -> dict[str, float]:
    """Return the finite held-out loss of each measured site, nats per token."""
    rows = result.get("heldout_by_site") or {}
    found = {site: loss_of((row or {}).get(which)) for site, row in rows.items()}
    return {site: loss for site, loss in found.items() if loss is not None}


def loss_of(measures: Mapping[str, Any] | None) -> float | None:
    """Return the loss in a table of measures, or None where there is no finite one."""
    loss = (measures or {}).get("loss")
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def scores(result: Mapping[str, Any], which: Literal["base", "final"]) -> dict[str, float]:
    """Return the exact match of each site; nothing where a site that was measured has none."""
    rows = result.get("heldout_by_site") or {}
    found = {
        site: row[which].get("exact_match") for site, row in rows.items() if (row or {}).get(which)
    }
    known = {site: score for site, score in found.items() if isinstance(score, int | float)}
    finite = {site: float(score) for site, score in known.items() if math.isfinite(score)}
    return finite if len(finite) == len(found) else {}


def correlation_of(
    result: Mapping[str, Any], other: Mapping[str, Any] | None, questions: float
) -> float:
    """Return how far both runs are right on the same questions, or a run and its base model where
    `other` is None; 0 where results do not tell which answers were right.

    `questions` is the number of independent ones.
    """
    ours = (result.get("right_answers") or {}).get("final") or {}
    known = (result if other is None else other).get("right_answers") or {}
    theirs = known.get("base" if other is None else "final") or {}
    counts = [{site: len(marks) for site, marks in each.items()} for each in (ours, theirs)]
    if not ours or counts[0] != counts[1]:
        return 0.0
    pairs = "".join(ours.values()), "".join(theirs[site] for site in ours)
    return correlation(*pairs, questions)


def _one_way(gains: Iterable[float]) -> bool:
    known = list(gains)
    same = all(gain > 0 for gain in known) or all(gain < 0 for gain in known)
    return same and len(known) >= LEAST_OF_ONE_SIGN
