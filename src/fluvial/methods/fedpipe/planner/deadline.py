"""The deadline of a round, and the data that uniform LoRA would leave untrained by it."""

from collections.abc import Mapping
from statistics import median_low

from fluvial.methods.fedpipe.planner.decision import Models, Planner
from fluvial.methods.fedpipe.planner.plan import Setting
from fluvial.methods.fedpipe.planner.time import under_training

RANK = 8
"""Rank of all candidates in a full load: that of uniform LoRA, as FedIT has it."""


def full_load_s(planner: Planner, models: Models, rank: int = RANK) -> float | None:
    """Return the least seconds in which a site trains on all of its data with one rank for all
    candidates, or as many parameters of it as its memory holds; None where it holds none."""
    uniform = uniform_parameters(planner, rank)
    least = planner.least
    loads = [
        (room.unprocessed, room.most_seconds(max(least, min(uniform, room.memory))))
        for room in planner.rooms(models)
        if room.memory >= least
    ]
    return min(loads)[1] if loads else None


def uniform_parameters(planner: Planner, rank: int) -> int:
    """Return the parameters of an adapter of one rank for all candidates, or of their smaller
    dimension where that is less."""
    return sum(
        candidate.width * min(rank, candidate.rows, candidate.columns)
        for candidate in planner.choice.candidates
    )


def default_deadline_s(planner: Planner, sites: Mapping[str, Models]) -> float | None:
    """Return the deadline of all sites: the full-load time of the middle one, with the safety
    factor that plans are held to; None where no site holds a model."""
    loads = [full_load_s(planner, models) for _, models in sorted(sites.items())]
    known = [seconds for seconds in loads if seconds is not None]
    return median_low(known) * planner.settings.safety if known else None


def uniform_under_training(
    planner: Planner, models: Models, deadline_s: float, *, batch: int, length: int, rank: int
) -> float:
    """Return the share of a site's data that uniform LoRA leaves untrained: one rank for all
    candidates, a fixed batch, the first format, no checkpointing; 1 where memory has no room."""
    steps = -(-models.profile.samples // batch)
    wire = planner.wires[0]
    format = planner.formats[0]
    setting = Setting(format.name, batch, length, False, wire.rate, steps, format.layers)
    room = planner.room(models, setting)
    lora = uniform_parameters(planner, rank)
    if room.memory < lora:
        return 1.0
    return under_training(deadline_s / planner.settings.safety, room.seconds(lora))
