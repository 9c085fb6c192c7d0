"""Visits of a cycle, their answers, and their lines in the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fluvial.methods.interface import Metrics
from fluvial.wire.tensors import Named, cosine, norm


@dataclass(frozen=True)
class Visit:
    """One site trains one block once."""

    name: str
    """Unique in a run; a visit is counted once, however often its answer comes."""
    site: str
    block: int


@dataclass(frozen=True)
class Answer:
    """The answer to a visit."""

    visit: Visit
    frame: bytes
    update: Named
    samples: int
    loss: float


_RESOLVED = {
    "sequential": "one after the other",
    "average": "averaged",
    "overwrite": "the last one wins",
}
"""Words of a report, by the way in which visits to one block are merged."""


def conflicts(
    block: str, answers: Sequence[Answer], before: Answer | None, *, merging: str
) -> list[Metrics]:
    """Return the pairs of visits that trained one block in one cycle, with the cosine of their
    updates and how the conflict was resolved.

    `before` is the last answer for the block of an earlier group of this cycle.
    """
    sequence = [*([before] if before else []), *answers]
    return [
        {
            "block": block,
            "sites": [first.visit.site, second.visit.site],
            "cosine": cosine(first.update, second.update),
            "resolved": _RESOLVED[merging],
        }
        for first, second in pairwise(sequence)
    ]


def record(answer: Answer, block: str, share: float) -> Metrics:
    """Return the line of a visit in the report; `share` of its step was taken."""
    return {
        "visit": answer.visit.name,
        "site": answer.visit.site,
        "block": block,
        "loss": answer.loss,
        "norm": norm(answer.update),
        "bytes": len(answer.frame),
        "share": share,
    }
