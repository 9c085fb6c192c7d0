"""The verdict on a run: its held-out losses, site by site, against those of its baselines."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Reference = Literal["local", "fedavg", "base"]
Answer = Literal["yes", "partly", "no", "not measured"]

NAMES: dict[Reference, str] = {
    "local": "local training",
    "fedavg": "the uncompressed run",
    "base": "the base model",
}
"""The runs that a verdict compares with, the most telling first."""


@dataclass(frozen=True)
class Comparison:
    """Held-out losses of a run against one other, at the sites where both were measured."""

    sites: int
    better: int
    """Sites whose loss is lower than the other run's."""
    difference: float
    """Mean over these sites of this run's loss less the other's, nats per token."""
    once: bool = False
    """True where all sites compare the same two models on one held-out set."""

    @property
    def answer(self) -> Answer:
        """Return "yes" if most sites and the mean gained, "no" if neither did."""
        gained = (2 * self.better > self.sites, self.difference < 0)
        return "yes" if all(gained) else "partly" if any(gained) else "no"


@dataclass(frozen=True)
class Verdict:
    """One answer about a run, and the comparisons that it rests on; None where a baseline is
    unknown."""

    sites: int
    """Sites of the run, measured or not."""
    measured: int
    """Sites whose loss under this run is known."""
    local: Comparison | None
    fedavg: Comparison | None
    base: Comparison | None
    itself: Reference | None = None
    """The baseline that this run is, which it is not compared with."""
    one_set: bool = False
    """True where all sites measure on the same held-out records."""
    exact_match: dict[str, float] = field(default_factory=dict)
    """Share of right greedy answers, mean over the sites, of this run ("final") and of the others;
    empty where this run has no answers."""
    answered: tuple[int, int, int] | None = None
    """Sites with more right answers than `against`, with as many, and with fewer; None where some
    site has no exact match of both."""

    @property
    def against(self) -> Reference | None:
        """The baseline that decides: local training, or the base model where that was not run."""
        return "local" if self.local else "base" if self.base else None

    @property
    def decisive(self) -> Comparison | None:
        """The comparison with `against`."""
        return self.local or self.base

    @property
    def helped(self) -> Answer:
        """Return the answer against `against`, "partly" where exact match disagrees with the
        losses, in its mean or at most sites."""
        if self.decisive is None:
            return "not measured"
        answer = self.decisive.answer
        more, _, fewer = self.answered or (0, 0, 0)
        return "partly" if self.disagrees or (answer == "yes" and fewer > more) else answer

    @property
    def disagrees(self) -> bool:
        """True if mean exact match is worse than that of `against` and the mean loss is better, or
        better where the losses are not."""
        decisive, against = self.decisive, self.against
        if decisive is None or against not in self.exact_match:
            return False
        gain = self.exact_match["final"] - self.exact_match[against]
        return gain > 0 if decisive.answer == "no" else gain < 0 and decisive.difference < 0

    def line(self) -> str:
        """Return the verdict as one line for people."""
        if self.measured == 0:
            return "Not measured: no site sent held-out measures of this run"

        first, found = self.against, self.decisive
        others = {"local": self.local, "fedavg": self.fedavg, "base": self.base}
        where = f"one held-out set that all {self.measured} sites share" if self.one_set else ""
        parts = [self._leading(NAMES[first], found, where)] if first and found else []
        if first and found and self.disagrees:
            parts = [_disagreement(found), self._score(), _further(NAMES[first], found)]
        elif self.exact_match:
            parts = [self._score(), *(part[:1].lower() + part[1:] for part in parts)]
        parts += [
            _further(words, others[name])
            for name, words in NAMES.items()
            if name not in (first, self.itself)
        ]

        if self.measured < self.sites:
            parts.append(f"{self.sites - self.measured} of {self.sites} sites not measured")

        return "; ".join(parts)

    def _leading(self, name: str, found: Comparison, where: str) -> str:
        """Return the comparison that decides; where loss and exact match are better at different
        numbers of sites, say what each is."""
        words = _leading(name, found, where)
        helped = f"Helped at {found.better} of {found.sites} sites"
        if self.answered is None or not words.startswith(helped):
            return words
        more, equal, fewer = self.answered
        if more == found.better:
            return words
        others = f", as many at {equal}" * bool(equal) + f", fewer at {fewer}" * bool(fewer)
        lower = f"Lower loss at {found.better} of {found.sites} sites"
        return f"{lower}{words.removeprefix(helped)}; more right answers at {more}{others}"

    def _score(self) -> str:
        """Return exact match of this run and of those that it is compared with."""
        others = [
            f"{100 * self.exact_match[name]:.1f} % of {words}"
            for name, words in NAMES.items()
            if name in self.exact_match
        ]
        against = f" against {', '.join(others)}" if others else ""
        words = "exact match" if self.disagrees else "Exact match"
        return f"{words} {100 * self.exact_match['final']:.1f} %{against}"

    def tile(self) -> str:
        """Return the verdict in the few words of a heading."""
        if self.decisive is None:
            return "not measured"
        return f"{self.decisive.better} of {self.decisive.sites} sites"

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON types, its line included."""
        return {**asdict(self), "helped": self.helped, "against": self.against, "line": self.line()}


def judge(result: Mapping[str, Any], compared: Mapping[str, Mapping[str, Any] | None]) -> Verdict:
    """Compare a run's `result` with those of its baselines, by name.

    Values that were not measured may be absent, None or not finite; they count nowhere.
    """
    final = losses(result, "final")
    itself = next((name for name in NAMES if name == result.get("baseline")), None)
    tables: dict[Reference, dict[str, float]] = {"base": losses(result, "base")}

    for name in ("local", "fedavg"):
        tables[name] = losses(compared.get(name) or {}, "final") if name != itself else {}
    one_set = bool((result.get("overlap") or {}).get("one_set"))
    found = {name: _compare(final, table, one_set) for name, table in tables.items()}
    return Verdict(
        sites=int(result.get("sites", len(final))),
        measured=len(final),
        local=found["local"],
        fedavg=found["fedavg"],
        base=found["base"],
        itself=itself,
        one_set=one_set,
        exact_match=_scores(result, {name: compared.get(name) or {} for name in tables}, itself),
        answered=_answered(result, compared.get("local") if found["local"] else None),
    )


def losses(result: Mapping[str, Any], which: Literal["base", "final"]) -> dict[str, float]:
    """Return the finite held-out loss of each measured site, nats per token."""
    rows = result.get("heldout_by_site") or {}
    found = {site: loss_of((row or {}).get(which)) for site, row in rows.items()}
    return {site: loss for site, loss in found.items() if loss is not None}


def _scores(
    result: Mapping[str, Any],
    compared: Mapping[Reference, Mapping[str, Any]],
    itself: Reference | None,
) -> dict[str, float]:
    """Return the mean over the sites of exact match, for this run, the base and the baselines.

    As in the table of results, there is none where a site that was measured has none.
    """
    found = {"final": _mean_score(result, "final"), "base": _mean_score(result, "base")}
    found |= {
        name: _mean_score(other, "final") for name, other in compared.items() if name != "base"
    }
    known = {name: score for name, score in found.items() if score is not None and name != itself}
    return known if "final" in known else {}


def _answered(
    result: Mapping[str, Any], local: Mapping[str, Any] | None
) -> tuple[int, int, int] | None:
    """Return the sites with more right answers than `local`, with as many, and with fewer; against
    the base model where `local` is None. Return None where a site lacks one of the two."""
    ours = _by_site(result, "final")
    theirs = _by_site(result, "base") if local is None else _by_site(local, "final")
    if not ours or ours.keys() != theirs.keys():
        return None
    gains = [own - theirs[site] for site, own in ours.items()]
    signs = [(gain > 0) - (gain < 0) for gain in gains]
    return signs.count(1), signs.count(0), signs.count(-1)


def _by_site(result: Mapping[str, Any], which: Literal["base", "final"]) -> dict[str, float]:
    """Return the exact match of each site; nothing where a site that was measured has none."""
    rows = (result.get("heldout_by_site") or {}).items()
    scores = {
        site: (row[which] or {}).get("exact_match") for site, row in rows if (row or {}).get(which)
    }
    known = {site: float(score) for site, score in scores.items() if score is not None}
    return known if len(known) == len(scores) else {}


def _mean_score(result: Mapping[str, Any], which: Literal["base", "final"]) -> float | None:
    rows = [(row or {}).get(which) for row in (result.get("heldout_by_site") or {}).values()]
    scores = [row.get("exact_match") for row in rows if row]
    known = [score for score in scores if isinstance(score, int | float) and math.isfinite(score)]
    return math.fsum(known) / len(known) if known and len(known) == len(scores) else None


def loss_of(measures: Mapping[str, Any] | None) -> float | None:
    """Return the loss in a table of measures, or None where there is no finite one."""
    loss = (measures or {}).get("loss")
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def _compare(
    ours: Mapping[str, float], theirs: Mapping[str, float], one_set: bool
) -> Comparison | None:
    pairs = [(ours[site], theirs[site]) for site in ours if site in theirs]
    if not pairs:
        return None
    gains = [own - other for own, other in pairs]
    return Comparison(
        len(gains),
        sum(gain < 0 for gain in gains),
        math.fsum(gains) / len(gains),
        once=one_set and len(set(pairs)) == 1,
    )


def _disagreement(found: Comparison) -> str:
    """Return which of losses and right answers is better, where they disagree."""
    lower = found.answer != "no"
    sites = found.better if lower else found.sites - found.better
    at = "" if found.once else f" at {sites} of {found.sites} sites"
    losses, answers = ("lower", "fewer") if lower else ("no lower", "more")
    return f"Loss and exact match disagree: {losses} loss{at}, but {answers} right answers"


def _leading(name: str, found: Comparison, where: str) -> str:
    """Return the comparison that decides; `where` names a held-out set that all sites share."""
    distance = f"{abs(found.difference):.4f}"
    way = "lower" if found.difference < 0 else "higher"
    mean = "mean loss level" if float(distance) == 0 else f"mean loss {distance} nats {way}"
    if found.once:
        verb = "Helped" if found.better else "Did not help"
        return f"{verb} against {name} on {where} ({mean.removeprefix('mean ')})"
    mean += f", on {where}" if where else ""

    if found.answer == "no":
        verb = "Did not help against"
        return f"{verb} {name}: better at {found.better} of {found.sites} sites ({mean})"

    only = " only" if found.answer == "partly" and 2 * found.better <= found.sites else ""
    return f"Helped at {found.better} of {found.sites} sites{only} against {name} ({mean})"


def _further(name: str, found: Comparison | None) -> str:
    if found is None:
        return f"{name} not measured"
    sites = "" if found.once else f" (better at {found.better} of {found.sites} sites)"
    distance = f"{abs(found.difference):.4f}"
    if float(distance) == 0:
        return f"level with {name}{sites}"
    return f"{distance} nats {'ahead of' if found.difference < 0 else 'behind'} {name}{sites}"
