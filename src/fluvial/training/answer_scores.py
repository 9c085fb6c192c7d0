"""Scores of generated answers against references: exact match, token F1 and ROUGE, as sums.

Token F1 is that of SQuAD (Rajpurkar et al., 2016) and CoQA (Reddy et al., 2019): overlap of the
words once case, punctuation and the articles are gone. With several references an answer counts by
its best one, for each score apart. Each score is rounded to millionths, so that sums are integers:
they are the same in any order and add up over sites.
"""

import logging
import re
import string
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from fluvial.data import Question
from fluvial.models.generation import Continuation
from fluvial.training.rouge import rouge

logger = logging.getLogger(__name__)

MILLION = 10**6

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class AnswerSums:
    """Sums of scores over answers; all but the counts in millionths."""

    questions: int = 0
    right: int = 0
    """Answers equal to a reference, white space at both ends aside."""
    f1: int = 0
    rouge_1: int = 0
    rouge_2: int = 0
    rouge_l: int = 0
    too_long: int = 0
    """Questions whose prompt leaves less of the model's context than was asked for, so that their
    answers are shorter or empty."""
    without_end: int = 0
    """Answers that stop at the number of tokens that was asked for, without an end token."""

    @classmethod
    def of(cls, answer: str, references: Sequence[str]) -> Self:
        """Return the scores of one answer, each against the reference that it meets best.

        Raises `ValueError` without any reference.
        """
        overlap = rouge(answer, references)

        return cls(
            questions=1,
            right=int(any(exact_match(answer, reference) for reference in references)),
            f1=_millionths(max(token_f1(answer, reference) for reference in references)),
            rouge_1=_millionths(overlap.rouge_1),
            rouge_2=_millionths(overlap.rouge_2),
            rouge_l=_millionths(overlap.rouge_l),
        )

    @classmethod
    def over(
        cls, answers: Iterable[Continuation], questions: Sequence[Question], of: str = "the model"
    ) -> Self:
        """Return the sums over the answers to `questions`, in their order, with the number of those
        without an end.

        Lines about progress name the model that wrote them as `of`.
        """
        sums = cls()
        logged_s = time.monotonic()

        for answer, question in zip(answers, questions, strict=True):
            scores = cls.of(answer, [question.answer, *question.references])
            sums += replace(scores, without_end=int(answer.cut))
            if time.monotonic() - logged_s > 1:
                logged_s = time.monotonic()
                logger.info("greedy answers of %s: %d of %d", of, sums.questions, len(questions))

        return sums

    def __add__(self, other: Self) -> Self:
        """Return the sums over the answers of both."""
        return type(self)(
            questions=self.questions + other.questions,
            right=self.right + other.right,
            f1=self.f1 + other.f1,
            rouge_1=self.rouge_1 + other.rouge_1,
            rouge_2=self.rouge_2 + other.rouge_2,
            rouge_l=self.rouge_l + other.rouge_l,
            too_long=self.too_long + other.too_long,
            without_end=self.without_end + other.without_end,
        )

    def means(self, questions: int) -> dict[str, float]:
        """Return the mean of each score over `questions`; one without an answer counts 0."""
        scale = questions * MILLION
        return {
            "exact_match": self.right / questions,
            "f1": self.f1 / scale,
            "rouge_1": self.rouge_1 / scale,
            "rouge_2": self.rouge_2 / scale,
            "rouge_l": self.rouge_l / scale,
        }


def right_answers(answers: Iterable[str], questions: Iterable[Question]) -> str:
    """Return a 1 for each answer that equals a reference of its question, else a 0, in order."""
    return "".join(
        "01"[any(exact_match(answer, each) for each in (question.answer, *question.references))]
        for answer, question in zip(answers, questions, strict=True)
    )


def exact_match(answer: str, reference: str) -> bool:
    """Return True if both texts are equal, white space at both ends aside.

    Nothing else is normalised: case, punctuation, articles and the width of inner spaces count.
    """
    return answer.strip() == reference.strip()


def token_f1(answer: str, reference: str) -> float:
    """Return F1 of the words of both texts, as SQuAD 2.0 counts it; 0 to 1.

    Where one of them has no word left, the score is 1 if neither has, else 0; see `compared_words`.
    """
    ours, theirs = compared_words(answer, reference)
    if not ours or not theirs:
        return float(ours == theirs)

    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def equal_in_squad(answer: str, reference: str) -> bool:
    """Return True if the words of both texts are equal, see `compared_words`."""
    ours, theirs = compared_words(answer, reference)
    return ours == theirs


def compared_words(answer: str, reference: str) -> tuple[list[str], list[str]]:
    """Return the words of both texts by which they are compared.

    Those are SQuAD's, but where it leaves nothing of a reference, as of the choice "A", which is an
    article, or of "+": its script would count an empty answer as right. Articles, or punctuation
    too, then stay in both texts.
    """
    for words in (squad_words, _words_with_articles, _lower_words):
        if theirs := words(reference):
            return words(answer), theirs

    return squad_words(answer), []


def squad_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without ASCII punctuation and English articles."""
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _words_with_articles(text: str) -> list[str]:
    return text.lower().translate(_NO_PUNCTUATION).split()


def _lower_words(text: str) -> list[str]:
    return text.lower().split()


def _millionths(score: float) -> int:
    return round(score * MILLION)
