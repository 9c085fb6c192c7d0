"""The verdict on a run: its held-out measures, site by site, against those of its baselines."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from fluvial.data.faults import listed
from fluvial.runs.site_comparison import (
    LEAST_SITES,
    Answer,
    Comparison,
    compare_sites,
    correlation_of,
    losses,
    scores,
)
from fluvial.training.wilson import share_difference

Reference = Literal["local", "fedavg", "base"]

NAMES: dict[Reference, str] = {
    "local": "local training",
    "fedavg": "the uncompressed run",
    "base": "the base model",
}
"""The runs that a verdict compares with, the most telling first."""
MOST_SITES = 5
"""Sites that a verdict names; the others are counted."""


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
    answers: dict[Reference, Comparison] = field(default_factory=dict)
    """Comparisons of exact match, where each site has one of both runs; differences and
    intervals are over all questions where their number is known, else over the sites."""
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
        losses, in its mean or at most sites, and where the losses differ within their interval."""
        if self.decisive is None:
            return "not measured"
        answer = self.decisive.answer
        more, _, fewer = self.answered or (0, 0, 0)
        unclear = self.disagrees or self.decisive.clear is False
        return "partly" if unclear or (answer == "yes" and fewer > more) else answer

    @property
    def disagrees(self) -> bool:
        """True if mean exact match is worse than that of `against` and the mean loss is better, or
        better where the losses are not; never where either differs within its interval."""
        decisive, against = self.decisive, self.against
        if decisive is None or against not in self.exact_match or decisive.clear is False:
            return False
        right = self.right
        if right is not None and right.clear is False:
            return False
        gain = self.exact_match["final"] - self.exact_match[against]
        return gain > 0 if decisive.answer == "no" else gain < 0 and decisive.difference < 0

    @property
    def right(self) -> Comparison | None:
        """The comparison of exact match with `against`."""
        return None if self.against is None else self.answers.get(self.against)

    def sentences(self) -> list[str]:
        """Return the verdict as short sentences for people, the conclusion first."""
        if self.measured == 0:
            return ["Not measured: no site sent held-out measures of this run."]

        others: dict[Reference, Comparison | None]
        others = {"local": self.local, "fedavg": self.fedavg, "base": self.base}
        told = [(name, found) for name, found in others.items() if found is not None]
        unknown = [
            words for name, words in NAMES.items() if not others[name] and name != self.itself
        ]
        unmeasured = self.sites - self.measured
        return [
            f"{self._conclusion()}.",
            *self._score(),
            *(
                _loss_sentence("Loss against" if not number else "Against", NAMES[name], found)
                for number, (name, found) in enumerate(told)
            ),
            *self._without_gain(),
            *([f"All {self.measured} sites share one held-out set."] if self.one_set else []),
            *self._too_few(),
            *([f"Not measured: {' and '.join(unknown)}."] if unknown else []),
            *([f"{unmeasured} of {self.sites} sites not measured."] if unmeasured else []),
        ]

    def line(self) -> str:
        """Return the verdict as one paragraph for people."""
        return " ".join(self.sentences())

    def tile(self) -> str:
        """Return the verdict in the few words of a heading."""
        if self.decisive is None:
            return "not measured"
        return f"{self.decisive.better} of {self.decisive.sites} sites"

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON types, its line included."""
        values = json.loads(json.dumps(asdict(self)))  # a list for each tuple
        return {**values, "helped": self.helped, "against": self.against, "line": self.line()}

    def _conclusion(self) -> str:
        """Return whether the run helped, and how far it is from the uncompressed run."""
        if self.decisive is None or self.against is None:
            return "No run to compare with was measured"
        first = self._against(NAMES[self.against], self.decisive)
        further = self.fedavg
        if further is None:
            return first

        name = NAMES["fedavg"]
        if further.clear is False:
            right = self.answers.get("fedavg")
            only = " in loss" if right is not None and right.clear else ""
            return f"{first}, with no clear difference{only} from {name}"
        if _is_level(further):
            return f"{first}, level with {name}"
        better = further.difference < 0
        way = "lower" if better else "higher"
        if further.clear is None:
            apart = f"{abs(further.difference):.4f} nats {way}"
            return f"{first}; loss {apart} than {name}, {_no_interval(further)}"
        joined = "and" if better == (self.helped == "yes") else "but"
        if further.answer == "partly":
            return f"{first}, {joined} with a {way} loss than {name}"
        return f"{first}, {joined} {'better' if better else 'worse'} than {name}"

    def _against(self, name: str, found: Comparison) -> str:
        """Return whether the run is better than `name`, in losses and in right answers."""
        right = self.right
        if self.disagrees:
            return _disagreement(name, found)
        if found.clear is False:
            if right is not None and right.clear:
                more = "More" if right.difference > 0 else "Fewer"
                return f"{more} right answers than {name}, with no clear difference in loss"
            return f"No clear difference from {name}"

        if found.answer == "no":
            return f"Did not help against {name}"
        if found.answer == "partly":
            only = "" if 2 * found.better > found.sites else " only"
            way = "lower" if found.difference < 0 else "higher"
            at = f"Helped at {found.better} of {found.sites} sites{only}"
            return f"{at} against {name}, with a {way} mean loss"
        helped = self.helped == "yes"
        if right is not None and right.clear is False:
            lead = f"Helped against {name} in loss" if helped else f"Lower loss than {name}"
            return f"{lead}, with no clear difference in exact match"
        if not helped:
            return f"Lower loss than {name}, but more sites have fewer right answers than have more"
        return f"Helped against {name}"

    def _score(self) -> list[str]:
        """Return a sentence on exact match of this run and of those that it is compared with."""
        if not self.exact_match:
            return []
        others = [
            f"{100 * self.exact_match[name]:.1f} % of {words}{self._unclear(name)}"
            for name, words in NAMES.items()
            if name in self.exact_match
        ]
        against = f" against {', '.join(others)}" if others else ""
        return [f"Exact match {100 * self.exact_match['final']:.1f} %{against}."]

    def _unclear(self, name: Reference) -> str:
        found = self.answers.get(name)
        return " (no clear difference)" if found is not None and found.clear is False else ""

    def _without_gain(self) -> list[str]:
        """Return a sentence on the sites that gained nothing against `against`, by loss and by
        right answers; none where it is one comparison."""
        found, right = self.decisive, self.right
        lost = () if found is None or found.once else found.not_better
        missed = () if right is None or right.once else right.not_better
        words = {"No lower loss": lost, "No more right answers": missed}
        if lost == missed:
            words = {"Neither a lower loss nor more right answers": lost}
        than = NAMES[self.against or "base"]
        return [
            f"{what} than {than} at {listed(sites, MOST_SITES)}."
            for what, sites in words.items()
            if sites
        ]

    def _too_few(self) -> list[str]:
        """Return a sentence where too few sites are measured for an interval."""
        found = self.decisive
        if found is None or found.once or found.sites >= LEAST_SITES:
            return []
        sites = "site gives" if found.sites == 1 else "sites give"
        return [f"{found.sites} {sites} no interval: a small difference may be noise."]


def judge(result: Mapping[str, Any], compared: Mapping[str, Mapping[str, Any] | None]) -> Verdict:
    """Compare a run's `result` with those of its baselines, by name.

    Values that were not measured may be absent, None or not finite; they count nowhere.
    """
    final, right = losses(result, "final"), scores(result, "final")
    itself = next((name for name in NAMES if name == result.get("baseline")), None)
    tables: dict[Reference, dict[str, float]] = {"base": losses(result, "base")}
    answers: dict[Reference, dict[str, float]] = {"base": scores(result, "base")}

    for name in ("local", "fedavg"):
        other = (compared.get(name) or {}) if name != itself else {}
        tables[name], answers[name] = losses(other, "final"), scores(other, "final")
    one_set = bool((result.get("overlap") or {}).get("one_set"))
    found = {name: compare_sites(final, table, one_set=one_set) for name, table in tables.items()}
    scored = {
        name: compare_sites(right, table, lower_is_better=False, one_set=one_set)
        for name, table in answers.items()
        if table.keys() == right.keys()
    }
    return Verdict(
        sites=int(result.get("sites", len(final))),
        measured=len(final),
        local=found["local"],
        fedavg=found["fedavg"],
        base=found["base"],
        itself=itself,
        one_set=one_set,
        exact_match=_means(right, answers),
        answers={
            name: _over_questions(each, result, compared.get(name))
            for name, each in scored.items()
            if each is not None
        },
        answered=_answered(right, answers["local" if found["local"] else "base"]),
    )


def _means(
    right: Mapping[str, float], others: Mapping[Reference, Mapping[str, float]]
) -> dict[str, float]:
    """Return the mean over the sites of exact match, for this run and those that it is compared
    with; nothing where this run has none."""
    known = [("final", right), *others.items()]
    return {name: math.fsum(by.values()) / len(by) for name, by in known if by} if right else {}


def _over_questions(
    found: Comparison, result: Mapping[str, Any], other: Mapping[str, Any] | None
) -> Comparison:
    """Return a comparison of exact match over all questions of the sites, which the base model has
    in the `result` itself; `found` where results do not tell them.

    It is clear only where the mean over the sites has the same sign.
    """
    overlap = result.get("overlap") or {}
    questions = float(overlap.get("independent_questions") or result.get("questions") or 0)
    ours = _pooled(result, "final")
    theirs = _pooled(result, "base") if other is None else _pooled(other, "final")
    if not questions or ours is None or theirs is None:
        return found
    phi = correlation_of(result, other, questions)
    low, high = share_difference(ours, theirs, questions, phi)
    clear = not low <= 0 <= high and (ours > theirs) == (found.difference > 0)
    return replace(found, difference=ours - theirs, low=low, high=high, clear=clear)


def _pooled(result: Mapping[str, Any], which: Literal["base", "final"]) -> float | None:
    """Return the share of right answers to the questions of all sites together."""
    share = ((result.get("heldout_pooled") or {}).get(which) or {}).get("exact_match")
    return None if share is None else float(share)


def _answered(
    ours: Mapping[str, float], theirs: Mapping[str, float]
) -> tuple[int, int, int] | None:
    """Return the sites with more right answers than the other run, with as many, and with fewer;
    None where a site lacks one of the two."""
    if not ours or ours.keys() != theirs.keys():
        return None
    gains = [own - theirs[site] for site, own in ours.items()]
    signs = [(gain > 0) - (gain < 0) for gain in gains]
    return signs.count(1), signs.count(0), signs.count(-1)


def _no_interval(found: Comparison) -> str:
    """Return that the mean difference over the sites has no interval, and why."""
    why = "the difference is the same at all sites"
    if found.once:
        why = "all sites share one held-out set"
    elif found.sites < LEAST_SITES:
        why = f"it takes {LEAST_SITES} sites"
    return f"without an interval, because {why}"


def _is_level(found: Comparison) -> bool:
    """Return whether the difference is 0 in the digits that are shown."""
    return float(f"{found.difference:.4f}") == 0


def _disagreement(name: str, found: Comparison) -> str:
    """Return which of losses and right answers is better than `name`, where they disagree."""
    lower = found.answer != "no"
    sites = found.better if lower else found.sites - found.better
    at = "" if found.once else f" at {sites} of {found.sites} sites"
    losses, answers = ("lower", "fewer") if lower else ("no lower", "more")
    what = f"{losses} loss than {name}{at}, but {answers} right answers"
    return f"Loss and exact match disagree: {what}"


def _loss_sentence(lead: str, name: str, found: Comparison) -> str:
    """Return a sentence on the losses of the run against those of `name`."""
    way = "lower" if found.difference < 0 else "higher"
    apart = "level" if _is_level(found) else f"{abs(found.difference):.4f} nats {way}"
    if found.once:
        return f"{lead} {name}: {apart}."
    interval = ""
    if found.clear is False:
        interval = f" (95 % interval {found.low:+.4f} to {found.high:+.4f})"
    return f"{lead} {name}: {apart}, better at {found.better} of {found.sites} sites{interval}."
