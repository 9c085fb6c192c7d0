"""Held-out records that several sites have in common, which are one observation and not several."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from fluvial.data.examples import Question
from fluvial.data.leaks import digest
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


def independent(counts: Iterable[int]) -> float:
    """Return the independent observations that weigh as much as some that occur `counts` times."""
    known = list(counts)
    return sum(known) ** 2 / sum(count**2 for count in known) if known else 0.0


def _digest_of(question: Question) -> bytes:
    texts = (question.prompt, question.answer, *question.references)
    return blake2b(repr(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
