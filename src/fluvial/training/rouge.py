"""ROUGE-1, ROUGE-2 and ROUGE-L: overlap of a text with its reference.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004. F1 of precision and recall,
as in the package `rouge_score`, on the words that it forms: runs of a-z and 0-9, lower case, no
stemming.
"""

import re
from collections import Counter
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return _WORD.findall(text.lower())


def rouge_n(read: Sequence[Hashable], sent: Sequence[Hashable], n: int) -> float:
    """Return F1 of the runs of `n` words, each counted as often as both texts have it; 0 to 1."""
    ours = _runs(read, n)
    theirs = _runs(sent, n)
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(read: Sequence[Hashable], sent: Sequence[Hashable]) -> float:
    """Return F1 of the longest common subsequence of words; 0 to 1."""
    lengths = [0] * (len(sent) + 1)

    for word in read:
        before = lengths
        lengths = [0]
        for index, other in enumerate(sent):
            best = before[index] + 1 if word == other else max(before[index + 1], lengths[index])
            lengths.append(best)

    return _f1(lengths[-1], len(read), len(sent))


def _runs(text: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(text[start : start + n]) for start in range(len(text) - n + 1))


def _f1(common: int, read: int, sent: int) -> float:
    return 2 * common / (read + sent) if common else 0.0
