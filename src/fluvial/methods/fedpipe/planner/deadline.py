"""The deadline of a round: the full-load time of the middle site, where the settings give none."""

from collections.abc import Mapping
from statistics import median_low

from fluvial.methods.fedpipe.planner.decision import Models, Planner

RANK = 8
"""Rank of all candidates in a full load: that of uniform LoRA, as FedIT has it."""


def full_load_s(planner: Planner, models: Models, rank: int = RANK) -> float | None:
    """Return the least seconds in which a site trains on all of its data with one rank for all
    candidates, or as many parameters of it as its memory holds; None where it holds none."""
    uniform = sum(
        candidate.width * min(rank, candidate.rows, candidate.columns)
        for candidate in planner.choice.candidates
    )
    least = planner.least
    loads = [
        (room.unprocessed, room.seconds(max(least, min(uniform, room.memory))))
        for room in planner.rooms(models)
        if room.memory >= least
    ]
    return min(loads)[1] if loads else None


def default_deadline_s(planner: Planner, sites: Mapping[str, Models]) -> float | None:
    """Return the deadline of all sites: the full-load time of the middle one, with the safety
    factor that plans are held to; None where no site holds a model."""
    loads = [full_load_s(planner, models) for _, models in sorted(sites.items())]
    known = [seconds for seconds in loads if seconds is not None]
    return median_low(known) * planner.settings.safety if known else None
