"""ROUGE-1, ROUGE-2 and ROUGE-L by the package `rouge_score`: overlap of a text with its reference.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004. Each is F1 of precision and
recall. The words are those of the package: runs of a-z and 0-9, lower case, no stemming. The
package imports nltk, which takes a second, and is imported when the first text is scored.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple


class Rouge(NamedTuple):
    """Scores of one text, 0 to 1."""

    rouge_1: float
    rouge_2: float
    rouge_l: float


def rouge(text: str, references: Sequence[str]) -> Rouge:
    """Return the scores of a text, each against the reference that it meets best."""
    return _scores(_scorer().score_multi(references, text))


def has_pairs(texts: Iterable[str]) -> bool:
    """Return True if one of `texts` has two words, without which ROUGE-2 is 0 for each answer."""
    from rouge_score.tokenizers import DefaultTokenizer

    return any(len(DefaultTokenizer().tokenize(text)) > 1 for text in texts)


def rouge_of_ids(read: Sequence[int], sent: Sequence[int]) -> Rouge:
    """Return the scores of token ids in place of words."""
    return _scores(_scorer(words=False).score(sent, read))


class _AsGiven:
    """A tokenizer for `rouge_score` of sequences that are tokens already."""

    def tokenize(self, tokens: Sequence[int]) -> Sequence[int]:
        """Return the tokens."""
        return tokens


@cache
def _scorer(*, words: bool = True) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=None if words else _AsGiven())


def _scores(found: Any) -> Rouge:
    figures = (float(found[name].fmeasure) for name in ("rouge1", "rouge2", "rougeL"))
    return Rouge(*figures)
