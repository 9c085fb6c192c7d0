"""Multiple-choice questions, and the prompts that ask them.

The prompt with `letter` is MMLU's (Hendrycks et al., ICLR 2021) or, for Chinese questions, C-Eval's
(Huang et al., NeurIPS 2023): it lists the choices, and the answer is a letter. With `text` it does
not list them, and the answer is the choice.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

LETTERS = "ABCDEFGHIJ"
"""Letters of the choices; a question has two choices or more, and at most as many as these."""
ZH_KIND = {"letter": "单项选择题，请选出其中的正确答案", "text": "题目和答案"}  # noqa: RUF001 - Chinese punctuation
ZH_CUES = "题目：", "答案："  # noqa: RUF001 - Chinese punctuation

Scoring = Literal["letter", "text"]
Language = Literal["en", "zh"]


@dataclass(frozen=True)
class Choice:
    """A question with choices, one of which is right."""

    name: str
    """Place of the record for messages: file, line and id."""
    question: str
    choices: tuple[str, ...]
    answer: int
    """Number of the right choice, 0 for A."""
    subject: str | None = None
    subject_zh: str | None = None
    """The subject in Chinese, for a Chinese prompt (C-Eval)."""


def chance(questions: Sequence[Choice]) -> float:
    """Return the accuracy of a model that guesses."""
    return fmean(1 / len(question.choices) for question in questions)


def language_of(question: str) -> Language:
    """Return Chinese if there is a Chinese character.

    MMLU has none, and every question of C-Eval and CMMLU has at least one.
    """
    return "zh" if re.search("[\u4e00-\u9fff]", question) else "en"


def render(choice: Choice, shots: Sequence[Choice], scoring: Scoring, language: Language) -> str:
    """Return the prompt up to the answer, which follows as `ending` gives it."""
    solved = (
        _ask(shot, scoring, language) + ending(shot, shot.answer, scoring, language) + "\n\n"
        for shot in shots
    )
    return _header(choice, scoring, language) + "".join(solved) + _ask(choice, scoring, language)


def ending(choice: Choice, index: int, scoring: Scoring, language: Language) -> str:
    """Return the text that follows the prompt for the choice `index`."""
    text = LETTERS[index] if scoring == "letter" else choice.choices[index]
    return f" {text}" if language == "en" else text


def _header(choice: Choice, scoring: Scoring, language: Language) -> str:
    subject = choice.subject.replace("_", " ") if choice.subject else None
    if language == "en":
        kind = "multiple choice questions" if scoring == "letter" else "questions"
        return (
            f"The following are {kind} (with answers){f' about {subject}' if subject else ''}.\n\n"
        )

    subject = choice.subject_zh or subject
    about = f"中国关于{subject}考试的" if subject else ""
    return f"以下是{about}{ZH_KIND[scoring]}。\n\n"


def _ask(choice: Choice, scoring: Scoring, language: Language) -> str:
    title, cue = ("Question: ", "Answer:") if language == "en" else ZH_CUES
    if scoring == "text":
        return f"{title}{choice.question}\n{cue}"
    listed = "".join(
        f"\n{letter}. {text}" for letter, text in zip(LETTERS, choice.choices, strict=False)
    )
    return f"{choice.question}{listed}\n{cue}"
