"""The format in which a site holds the base beside its training by a plan.

A site measures itself, probes the weights and measures held-out text in the run's own format of the
base. Where its memory has no room for that, it does so in the smallest format that its plan may
have.
"""

from collections.abc import Sequence

from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.planner.formats import formats_named, layered
from fluvial.methods.fedpipe.planner.memory import base_bytes
from fluvial.methods.fedpipe.planner.sizes import sizes_of
from fluvial.methods.fedpipe.site_configuration import format_of, layers_of, with_format
from fluvial.methods.planning import OPTIMIZER_BYTES
from fluvial.models.assignment import Assignment
from fluvial.models.pool import ModelPool

WIDTHS = {"float32": 4, "bfloat16": 2}
"""Bytes of a value of a base by its precision."""


def smallest(run: Assignment, ranks: Sequence[int]) -> Assignment:
    """Return the assignment with which sites measure: all weights at the smallest of the planner's
    `ranks`, because a site may have no room for the run's own."""
    least = min(ranks)
    return run.with_ranks({name: min(least, rank) for name, rank in run.ranks})


def holdings(config: FedPipeConfig, pool: ModelPool, memory: int) -> list[Assignment]:
    """Return the run's assignment in the formats in which a site with `memory` bytes may hold the
    base, the preferred one first: the run's own, where it fits beside the smallest adapter, and the
    smallest of the planner's, where that is smaller."""
    run = pool.outline.assignment
    sizes = sizes_of(pool.outline.base, WIDTHS[run.precision], pool.config.quantization_correction)
    own_bytes = base_bytes(sizes, layered(format_of(run), layers_of(run)))
    formats = formats_named(config.planner.formats)
    if not formats:
        return [run]

    least_bytes, name = min((base_bytes(sizes, format), format.name) for format in formats)
    if least_bytes >= own_bytes:
        return [run]

    adapter_bytes = OPTIMIZER_BYTES * smallest(run, config.planner.ranks).layout.numel
    other = with_format(run, name)
    return [run, other] if own_bytes + adapter_bytes <= memory else [other]
