"""Measures of a model on held-out text of the sites, and on public text at the server."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from pydantic import Field

from fluvial.data import Example, SiteData
from fluvial.data.config import STDLIB, DataConfig
from fluvial.federation.fleet import Fleet
from fluvial.federation.meter import MEASURING
from fluvial.federation.replies import measured
from fluvial.federation.turns import Reply
from fluvial.models.pool import ModelPool
from fluvial.settings import Settings
from fluvial.training.evaluate import Heldout, on_public_text
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named

PUBLIC_SEQUENCES = 256
"""Public sequences that the server measures on, where `data.max_heldout` says nothing else."""

SiteMeasures = dict[str, float]
"""Measures of one site, by name: loss, accuracy, and exact_match where it was asked for."""


class EvaluateConfig(Settings):
    """Measures on the held-out text of every site, before and after the run."""

    every: int = Field(0, ge=0, le=10**6)
    """Number of rounds from one measure of the global model to the next; 0 measures at the end
    only."""
    max_new_tokens: int = Field(0, ge=0, le=10**6)
    """Greedy tokens for the exact match of held-out answers; 0 leaves it out."""
    sample_prompt: str | None = None
    """Text that base and tuned model continue at the end; the first held-out question where there
    are some."""
    sample_tokens: int = Field(40, ge=1, le=10**6)
    """Tokens of that continuation."""


class Texts(Protocol):
    """The sites' data, as far as a server knows it."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the sites."""
        ...

    def public(self) -> dict[str, list[Example]]:
        """Return text that belongs to no site; raises `ConfigError` if there is none."""
        ...

    def sample(self) -> SiteData:
        """Return held-out text to show the model on."""
        ...


@dataclass(frozen=True)
class Measures:
    """Held-out measures of one model."""

    total: Heldout | None = None
    """Sums over all sites that were measured; None without any."""
    by_site: dict[str, SiteMeasures] = field(default_factory=dict)

    def mean(self) -> SiteMeasures | None:
        """Return the mean over the sites, each counting the same; None without any."""
        rows = list(self.by_site.values())
        if not rows:
            return None

        keys = sorted(set.intersection(*(set(row) for row in rows)))
        return {key: sum(row[key] for row in rows) / len(rows) for key in keys}

    def pooled(self) -> SiteMeasures | None:
        """Return the means over the label tokens of all sites together; None without any."""
        if self.total is None:
            return None
        return {"loss": self.total.loss, "accuracy": self.total.accuracy}


def ask_heldout(fleet: Fleet, message: Payload, *, round: int) -> Measures:
    """Ask every site to measure the model of `message` on its held-out text.

    `message` has the values `which` and `generate` of the task `evaluate`.
    """
    read = partial(measured, answers=message.value("generate", int) > 0)
    messages = dict.fromkeys(fleet.sites, message)
    return measures_of(fleet.ask(MEASURING, messages, round=round, read=read))


def measures_of(replies: Iterable[Reply[tuple[Heldout, int, int]]]) -> Measures:
    """Return the measures of replies that `replies.measured` has read."""
    sums = []
    rows: dict[str, SiteMeasures] = {}

    for reply in replies:
        heldout, right, questions = reply.content
        sums.append(heldout)
        row = {"loss": heldout.loss, "accuracy": heldout.accuracy}
        rows[reply.site] = row | ({"exact_match": right / questions} if questions else {})

    return Measures(Heldout.sum(sums) if sums else None, dict(sorted(rows.items())))


def measure_public(
    pool: ModelPool, adapter: Named, data: DataConfig, texts: Texts
) -> dict[str, Any] | None:
    """Return measures of `adapter` on public text; None where the configuration has none."""
    if data.public_source is None and data.source != STDLIB:
        return None

    examples = [example for some in texts.public().values() for example in some]
    return on_public_text(pool, adapter, examples[: data.max_heldout or PUBLIC_SEQUENCES])
