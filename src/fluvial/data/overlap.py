"""Held-out records that several sites have in common, which are one observation and not several."""

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from hashlib import blake2b

from fluvial.data.config import DataConfig
from fluvial.data.examples import Question
from fluvial.data.leaks import digest
from fluvial.data.partition import Files, Natural
from fluvial.data.texts import SiteData


@dataclass(frozen=True)
class Overlap:
    """The held-out records of some sites, with those that are the same counted once."""

    one_set: bool
    """True where several sites all measure on the same held-out records."""
    distinct_questions: int
    """Questions of all these sites together, each counted once."""
    independent_questions: float
    """Number of independent questions with the same standard error: the square of the number of
    answers over the sum of squares of the answers to each question (Kish, "Survey Sampling",
    1965, sec. 11.7)."""

    @classmethod
    def of(cls, sites: Iterable[SiteData]) -> "Overlap":
        """Return the overlap of the held-out records that `sites` are measured on."""
        sets: list[Counter[bytes]] = []
        questions: Counter[bytes] = Counter()
        for site in sites:
            sets.append(Counter(map(digest, site.heldout)))
            questions.update(map(_digest_of, site.questions))

        return cls(
            one_set=len(sets) > 1 and all(each == sets[0] for each in sets[1:]),
            distinct_questions=len(questions),
            independent_questions=independent(questions.values()),
        )


def own_only(config: DataConfig, measured: Mapping[str, Set[bytes]]) -> list[str]:
    """Return a remark where sites with owners have no held-out record in common, or none.

    `measured` has the digests of the held-out sequences of each site. Held-out records that the
    user divided by a column or by files are taken as meant so.
    """
    owned = isinstance(config.partition, Natural | Files) and not config.heldout_source
    meant = config.bundled or bool(config.heldout_split) or not (config.by_site or owned)
    if meant or len(measured) < 2 or set.intersection(*map(set, measured.values())):
        return []

    remedy = (
        "name one file for all, as heldout_source of each table data.by_site.NAME (`fluvial init` "
        "writes it for --heldout FILE)"
        if config.by_site
        else "name a data.heldout_source that has the same records for each site"
    )
    return [
        "held-out records: each site is measured on its own only; where these do not ask for what "
        f"only the others know, the run cannot show that a site learns it; to show it, {remedy}"
    ]


def independent(counts: Iterable[int]) -> float:
    """Return the independent observations that weigh as much as some that occur `counts` times."""
    known = list(counts)
    return sum(known) ** 2 / sum(count**2 for count in known) if known else 0.0


def _digest_of(question: Question) -> bytes:
    texts = (question.prompt, question.answer, *question.references)
    return blake2b(repr(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
