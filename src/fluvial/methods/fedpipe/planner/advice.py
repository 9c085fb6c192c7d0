"""The method and the codec for a set of sites, from their plans and refusals, with the reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from fluvial.methods.fedpipe.planner.plan import Setting, SitePlan
from fluvial.methods.fedpipe.planner.refusal import Refusal

RATES = (1, 4, 16, 64)
"""Rates of a codec among which the advice chooses."""


@dataclass(frozen=True)
class Advice:
    """A choice, and the reason for it."""

    name: str | None
    """Name in the configuration; None where nothing fits."""
    why: str


def advised_method(plans: Mapping[str, SitePlan], refusals: Sequence[Refusal]) -> Advice:
    """Return the method for these sites.

    Where all have a plan it is LoRA: FedPipe for unequal plans, CG-FedLLM for equal ones. Where the
    memory of a site holds no base it is the first method that fits all sites that were refused.
    """
    if not refusals:
        return _lora(plans)

    timed = [each.site for each in refusals if each.limit in ("link", "deadline")]
    if timed:
        return Advice(
            "fedpipe" if plans else None,
            f"the deadline leaves out {_named(timed)}, which no other method would shorten enough; "
            "raise it, or go on without these sites",
        )

    for name in dict.fromkeys(other.method for each in refusals for other in each.fitting):
        fitting = [
            next((other for other in each.fitting if other.method == name), None)
            for each in refusals
        ]
        if all(fitting):
            first = fitting[0]
            assert first is not None
            return Advice(
                name,
                f"{_named([each.site for each in refusals])} cannot hold the base for LoRA; with "
                f"{name!r} a site has {first.why}, which fits",
            )

    without = [each.site for each in refusals if not each.fitting] or [refusals[0].site]
    return Advice(
        "fedpipe" if plans else None,
        f"no method fits {_named(without)}; give it more memory, or go on without it",
    )


@dataclass(frozen=True)
class Uncoded:
    """The round of a site at rate 1."""

    seconds: float
    link_share: float
    """Share of these seconds that messages take."""


def advised_codec(rates: Mapping[str, int], rounds: Mapping[str, Uncoded]) -> Advice:
    """Return the codec for the rate that the slowest site would choose on its own link, since a
    round waits for it.

    `rates` are those choices by site, and `rounds` their uncoded rounds.
    """
    slowest = max(sorted(rounds), key=lambda site: rounds[site].seconds)
    rate = rates[slowest]
    share = rounds[slowest].link_share
    words = f"a round waits for site {slowest!r}, and messages are {share:.0%} of its uncoded round"
    if rate == 1:
        return Advice("identity", f"{words}, so a coded update would gain less than it loses")
    name = "int8" if rate == 4 else "trellis"
    return Advice(name, f"{words}, and rate {rate} has the best value for each second")


def _lora(plans: Mapping[str, SitePlan]) -> Advice:
    values = list(plans.values())
    settings = [asdict(plan.setting) for plan in values]
    names = [each.name for each in fields(Setting)]
    differ = [name for name in names if len({each[name] for each in settings}) > 1]
    differ += ["ranks"] if len({plan.ranks for plan in values}) > 1 else []
    if not differ:
        return Advice(
            "cgfedllm",
            "all sites have the same plan, so one adapter of equal ranks and its codec serve all",
        )
    return Advice(
        "fedpipe", f"every site holds the base, and their plans differ in {', '.join(differ)}"
    )


def _named(sites: Sequence[str]) -> str:
    shown = ", ".join(map(repr, sites[:3]))
    more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
    return f"site{'s' if len(sites) > 1 else ''} {shown}{more}"
