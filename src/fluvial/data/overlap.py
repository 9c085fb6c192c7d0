"""Held-out records that several sites have in common, which are one observation and not several."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from fluvial.data.config import DataConfig
from fluvial.data.examples import Question
from fluvial.data.faults import listed
from fluvial.data.leaks import digest
from fluvial.data.partition import Files, Natural
from fluvial.data.texts import SiteData

LEAST_RECURRING = 0.5
"""Share of held-out questions with an answer of training records, from which answers recur."""
LEAST_UNKNOWN = 0.1
"""Share of the other sites' training records with an answer that a site does not train on, above
which the site could learn answers from them."""
LEAST_ASKED = 0.05
"""Share of a site's questions with an answer that only others train on, from which it is asked for
what others know."""


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


@dataclass(frozen=True)
class Asked:
    """Held-out records of a site beside what it trains on, as digests."""

    measured: frozenset[bytes]
    """Held-out sequences."""
    trained: Counter[bytes]
    """Answers of the training records, with the number of records of each."""
    questions: Sequence[frozenset[bytes]]
    """Right answers of each held-out question."""

    @classmethod
    def of(cls, site: SiteData, trained: Iterable[Question]) -> "Asked":
        """Return what `site` is asked, where its training records are `trained`."""
        return cls(
            measured=frozenset(map(digest, site.heldout)),
            trained=Counter(_answer(question.answer) for question in trained),
            questions=[
                frozenset(map(_answer, (question.answer, *question.references)))
                for question in site.questions
            ],
        )


def own_only(config: DataConfig, sites: Mapping[str, Asked]) -> list[str]:
    """Return a remark where sites with owners have no held-out record in common and are not asked
    for what only other sites train on, or none.

    Where answers recur, they decide it. Where they do not, held-out records that the user divided
    by a column or by files are taken as meant so.
    """
    owned = isinstance(config.partition, Natural | Files) and not config.heldout_source
    meant = config.bundled or bool(config.heldout_split) or not (config.by_site or owned)
    if meant or len(sites) < 2 or set.intersection(*(set(s.measured) for s in sites.values())):
        return []

    remedy = (
        "name one file for all, as heldout_source of each table data.by_site.NAME (`fluvial init` "
        "writes it for --heldout FILE)"
        if config.by_site
        else "name a data.heldout_source that has the same records for each site"
    )
    unasked = unasked_sites(sites)
    if unasked is None:
        if config.by_site and all(own.heldout_source for own in config.by_site.values()):
            return []
        return [
            "held-out records: each site is measured on its own only; these may or may not ask for "
            "what only other sites know, which their answers do not tell, since few of them recur "
            "in training records; if they do not ask for it, the run cannot show that a site "
            f"learns it, and to show it, {remedy}"
        ]

    return [
        f"held-out records: those of {listed(unasked)} do not ask for the answers that only other "
        f"sites train on, so the run cannot show that a site learns them; to show it, {remedy}"
    ] * bool(unasked)


def unasked_sites(sites: Mapping[str, Asked]) -> list[str] | None:
    """Return the sites that are not asked for answers that only other sites train on, though the
    others have such answers; None where too few held-out answers recur in training records."""
    trained = Counter[bytes]()
    for site in sites.values():
        trained.update(site.trained)
    questions = [answers for site in sites.values() for answers in site.questions]
    recurring = sum(not answers.isdisjoint(trained) for answers in questions)
    if recurring < LEAST_RECURRING * len(questions) or not all(s.questions for s in sites.values()):
        return None

    unasked = []
    for name, site in sites.items():
        elsewhere = trained.total() - site.trained.total()
        unknown = trained.total() - sum(trained[answer] for answer in site.trained)
        asked = sum(
            answers.isdisjoint(site.trained) and not answers.isdisjoint(trained)
            for answers in site.questions
        )
        if unknown > LEAST_UNKNOWN * elsewhere and asked < LEAST_ASKED * len(site.questions):
            unasked.append(name)

    return unasked


def independent(counts: Iterable[int]) -> float:
    """Return the independent observations that weigh as much as some that occur `counts` times."""
    known = list(counts)
    return sum(known) ** 2 / sum(count**2 for count in known) if known else 0.0


def _answer(text: str) -> bytes:
    """Return a digest of an answer, in which case and the width of spaces do not count."""
    words = " ".join(text.casefold().split())
    return blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _digest_of(question: Question) -> bytes:
    texts = (question.prompt, question.answer, *question.references)
    return blake2b(repr(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
