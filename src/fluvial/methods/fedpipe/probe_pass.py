"""The passes of a probe: the rank, batch and checkpointing that a site's memory has room for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.deciding import Deciding
from fluvial.methods.fedpipe.measure import tokens_within
from fluvial.methods.fedpipe.planner.memory import MemoryModel
from fluvial.methods.fedpipe.planner.profile import Peak, Profile
from fluvial.methods.planning import OPTIMIZER_BYTES
from fluvial.models.assignment import Assignment


@dataclass(frozen=True)
class ProbePass:
    """Ranks, batch and checkpointing of a probe at one site."""

    assignment: Assignment
    """Ranks of all candidates, and the batch."""
    checkpointing: bool
    """True where layers are recomputed."""
    room: int
    """Tokens of a pass that the memory has room for."""


def probe_pass(
    config: FedPipeConfig,
    deciding: Deciding,
    run: Assignment,
    profile: Profile,
    longest: int,
    *,
    checkpointing: bool,
) -> ProbePass:
    """Return the probe's pass: at the largest rank at which a sequence of `longest` tokens fits
    whole, in the largest batch up to that of `run`.

    Passes were measured with the smallest adapter of a plan, and the probe's own is larger. Layers
    are recomputed where `checkpointing` says so, or where more fits then and one sequence does not
    fit without. Where no sequence fits whole at any rank, the rank is the smallest.
    """
    model = replace(deciding.models(profile).memory, lora_bytes=OPTIMIZER_BYTES)
    for rank in _ranks(config):
        assignment = run.with_ranks({name: min(rank, run.width(name)) for name, _ in run.ranks})
        more = assignment.layout.numel - deciding.measured
        peaks = with_parameters(profile.peaks, model, more)
        recomputed = checkpointing
        room = tokens_within(peaks, profile.memory_bytes, longest)
        if room < longest and config.planner.checkpointing != "never":
            tokens = tokens_within(peaks, profile.memory_bytes, longest, checkpointing=True)
            recomputed = recomputed or tokens > room
            room = max(room, tokens)
        if room >= longest:
            break

    batch = max(1, min(run.batch, room // longest))
    return ProbePass(replace(assignment, batch=batch), recomputed, room)


def with_parameters(peaks: Sequence[Peak], model: MemoryModel, more: int) -> list[Peak]:
    """Return measured passes as they would be with `more` parameters of the adapter."""
    return [
        replace(
            peak,
            bytes=peak.bytes
            + ceil(
                more * model.for_each(peak.batch, peak.length, checkpointing=peak.checkpointing)
            ),
        )
        for peak in peaks
    ]


def _ranks(config: FedPipeConfig) -> Iterator[int]:
    """Yield the rank of the probe and its halves, down to the smallest of a plan."""
    rank = config.probe_rank
    while rank > min(config.planner.ranks):
        yield rank
        rank //= 2
    yield min(config.probe_rank, min(config.planner.ranks))
