"""Measures of a model on held-out text of the sites, and on public text at the server."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from pydantic import Field

from fluvial.data import Example, SiteData
from fluvial.data.config import DataConfig
from fluvial.federation.fleet import Fleet
from fluvial.federation.meter import MEASURING
from fluvial.federation.replies import measured
from fluvial.federation.turns import Reply
from fluvial.models.pool import ModelPool
from fluvial.settings import Settings
from fluvial.training.answer_scores import AnswerSums
from fluvial.training.evaluate import Heldout, on_public_text
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named

SAMPLE_TOKENS = 40
"""Tokens of a sample that are shown where no setting says how many."""
PUBLIC_SEQUENCES = 256
"""Public sequences that the server measures on, where `data.max_heldout` says nothing else."""

SiteMeasures = dict[str, float]
"""Measures of one site, by name: loss, accuracy, and the scores of answers where asked for."""


class EvaluateConfig(Settings):
    """Measures on the held-out text of every site, before and after the run."""

    every: int = Field(0, ge=0, le=10**6)
    """Number of rounds from one measure of the global model to the next; 0 measures at the end
    only."""
    max_new_tokens: int = Field(0, ge=0, le=10**6)
    """Greedy tokens for exact match, token F1 and ROUGE of held-out answers; 0 leaves them out."""
    cross_site: bool = False
    """True measures the model of every site of the baseline `local`, and the final one, on
    the held-out data of all sites. It needs all sites in one process, and as many measures as the
    square of their number."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval, such as "mmlu", that the server measures at the end, on the base and on
    the final model. They use no data of the sites. Needs `pip install 'fluvial[evaluation]'`."""
    num_fewshot: int | None = Field(None, ge=0, le=1000)
    """Solved examples before each question of `tasks`; unset, the task's own number."""
    limit: float | None = Field(None, gt=0, le=1e9)
    """First documents of each of `tasks`, or a share of them below 1; unset, all."""
    include_path: str | None = None
    """Folder with tasks of your own for `tasks`, as YAML files of lm-eval."""
    sample_prompt: str | None = None
    """Text that base and tuned model continue at the end. Unset, it is the first held-out question
    where there are some, shown with the right answer. Where the server has no text of the sites,
    nothing is continued in a deployed run, and "Once upon a time" under `flglm`."""
    sample_tokens: int | None = Field(None, ge=1, le=10**6)
    """Tokens of that continuation. Unset, for a held-out question those of `max_new_tokens`, as
    its answer is scored, and 40 elsewhere."""

    def sample_length(self, *, question: bool = False) -> int:
        """Return the tokens of the continuation of a held-out question, or of another text."""
        scored = self.max_new_tokens if question else 0
        return self.sample_tokens or scored or SAMPLE_TOKENS

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        for name in ("num_fewshot", "limit", "include_path"):
            if getattr(self, name) is not None and not self.tasks:
                yield f"{name}: without effect, because tasks names none of lm-eval; remove it"


class Texts(Protocol):
    """The sites' data, as far as a server knows it."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the sites."""
        ...

    def public(self) -> dict[str, list[Example]]:
        """Return text that belongs to no site; raises `ConfigError` if there is none."""
        ...

    @property
    def sample_from(self) -> Literal["site", "public"] | None:
        """Owner of what `sample` returns; None for a fixed text, which shows nothing of the run."""
        ...

    def sample(self) -> SiteData:
        """Return held-out text to show the model on."""
        ...


@dataclass(frozen=True)
class Measures:
    """Held-out measures of one model."""

    total: Heldout | None = None
    """Sums over all sites that were measured; None without any."""
    answers: AnswerSums = field(default_factory=AnswerSums)
    """Sums over the answers of all these sites."""
    by_site: dict[str, SiteMeasures] = field(default_factory=dict)

    def mean(self) -> SiteMeasures | None:
        """Return the mean over the sites, each counting the same; None without any."""
        rows = list(self.by_site.values())
        if not rows:
            return None

        keys = sorted(set.intersection(*(set(row) for row in rows)))
        return {key: sum(row[key] for row in rows) / len(rows) for key in keys}

    def worst(self) -> tuple[str, float] | None:
        """Return the site of the largest loss, of equal ones the last by name, and its loss; None
        without any."""
        losses = {site: row["loss"] for site, row in self.by_site.items()}
        if not losses:
            return None
        site = max(losses, key=lambda each: (losses[each], each))
        return site, losses[site]

    def spread(self) -> float:
        """Return the largest less the smallest loss of a site, nats per label token."""
        losses = [row["loss"] for row in self.by_site.values()]
        return max(losses) - min(losses) if losses else 0.0

    def pooled(self) -> SiteMeasures | None:
        """Return the means over label tokens and over questions of all sites together; None
        without any site."""
        return None if self.total is None else _means(self.total, self.answers)


def ask_heldout(fleet: Fleet, message: Payload, *, round: int) -> Measures:
    """Ask every site to measure the model of `message` on its held-out text.

    `message` has the values `which` and `generate` of the task `evaluate`.
    """
    read = partial(measured, answers=message.value("generate", int) > 0)
    messages = dict.fromkeys(fleet.sites, message)
    return measures_of(fleet.ask(MEASURING, messages, round=round, read=read))


def measures_of(replies: Iterable[Reply[tuple[Heldout, AnswerSums]]]) -> Measures:
    """Return the measures of replies that `replies.measured` has read."""
    sums = []
    answers = AnswerSums()
    rows: dict[str, SiteMeasures] = {}

    for reply in replies:
        heldout, scores = reply.content
        sums.append(heldout)
        answers += scores
        rows[reply.site] = _means(heldout, scores)

    return Measures(Heldout.sum(sums) if sums else None, answers, dict(sorted(rows.items())))


def _means(heldout: Heldout, answers: AnswerSums) -> SiteMeasures:
    means = {"loss": heldout.loss, "accuracy": heldout.accuracy}
    return means | (answers.means(answers.questions) if answers.questions else {})


def measure_public(
    pool: ModelPool, adapter: Named, data: DataConfig, texts: Texts
) -> dict[str, Any] | None:
    """Return measures of `adapter` on public text; None where the configuration has none."""
    if data.public_source is None and not data.bundled:
        return None

    examples = [example for some in texts.public().values() for example in some]
    return on_public_text(pool, adapter, examples[: data.max_heldout or PUBLIC_SEQUENCES])
