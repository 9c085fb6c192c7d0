"""Multiple choice by log-likelihood: what a model prefers among four answers, without letting it
write.

The prompt with `letter` is MMLU's (Hendrycks et al., ICLR 2021) or, for Chinese questions, C-Eval's
(Huang et al., NeurIPS 2023): it lists the four choices, and log P(letter | prompt) decides. With
`text` it does not list them, and log P(choice | prompt) in nats per UTF-8 byte decides (the
"continuation" form of lm-evaluation-harness), which tells something about models that are too small
to know what a letter stands for.
"""

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fluvial.data import Example
from fluvial.data.faults import Faults, listed, shown
from fluvial.data.readers import read_json
from fluvial.data.records import encodable
from fluvial.data.rows import Number, described
from fluvial.errors import ConfigError
from fluvial.models.encoding import Encoder
from fluvial.seeds import numpy_generator
from fluvial.training.train import collate

logger = logging.getLogger(__name__)

LETTERS = "ABCD"
CHANCE = 1 / len(LETTERS)
MAX_SHOTS = 5
BATCH_ROWS = 16
BATCH_TOKENS = 2048
"""Bounds of one forward pass; the logits of a large vocabulary are what fills the memory."""
RESAMPLES = 2000
ZH_KIND = {"letter": "单项选择题，请选出其中的正确答案", "text": "题目和答案"}  # noqa: RUF001 - Chinese punctuation
ZH_CUES = "题目：", "答案："  # noqa: RUF001 - Chinese punctuation

Scoring = Literal["letter", "text"]
Language = Literal["en", "zh"]


@dataclass(frozen=True)
class Choice:
    """A question with four choices, one of which is right."""

    name: str
    """Where it stands, for messages: file, line and id."""
    question: str
    choices: tuple[str, str, str, str]
    answer: int
    """0 for A to 3 for D."""
    subject: str | None = None
    subject_zh: str | None = None
    """The subject as a Chinese prompt names it (C-Eval)."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Prompt:
    """A question as tokens: what all choices begin with, and how each goes on."""

    prefix: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    """What a choice's log-probability is divided by: 1 for a letter, UTF-8 bytes for a text."""


@dataclass(frozen=True)
class Sheet:
    """All questions as tokens, with what did not fit into the model's context."""

    questions: tuple[Choice, ...]
    prompts: tuple[Prompt, ...]
    short_of_shots: int
    """Questions for whose subject there were fewer examples than asked for."""
    dropped_shots: int
    """Examples left out because the prompt was too long, over all questions."""
    cut_questions: int
    """Prompts cut on the left because they were too long without any example."""
    cut_tokens: int


def read_choices(path: Path, subject_field: str = "subject") -> list[Choice]:
    """The records of a JSON-lines file `{"question", "choices": [4], "answer": "A".."D"}`, optional
    `subject`, `id`.

    `subject_field` names the field that stands for `subject`. A file with the suffix .json holds a
    list of records. Raises `DataError` naming line and id of every record that is not of this form,
    without its text.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {str(path)!r} with questions")

    found = []
    faults = Faults()
    for row in read_json(path).rows:
        try:
            found.append(_choice(f"{row.place}", row.fields, subject_field))
        except ConfigError as error:
            faults.include(error)

    faults.raise_any()
    return found


def _choice(name: str, record: Mapping[str, Any], subject_field: str) -> Choice:
    if isinstance(record.get("id"), str | Number):
        name = f"{name}, id {_id(record['id'])}"

    for key in ("question", "choices", "answer"):
        if key not in record:
            raise ConfigError(
                f"{name}: field {key!r} is missing; found {listed(sorted(record)) or 'none'}"
            )

    question = record["question"]
    choices = record["choices"]
    if not (isinstance(question, str) and question.strip()):
        raise ConfigError(
            f"{name}: 'question' must be text that is not blank, and is {described(question)}"
        )

    texts = choices if isinstance(choices, list) else []
    if len(texts) != len(LETTERS) or not all(
        isinstance(text, str) and text.strip() for text in texts
    ):
        held = f"a list of {len(texts)}" if texts else described(choices)
        raise ConfigError(
            f"{name}: 'choices' must be a list of four texts, none blank, and is {held}"
        )

    if subject_field != "subject" and subject_field not in record:
        raise ConfigError(
            f"{name}: --subject-field {subject_field!r} is missing; found {listed(sorted(record))}"
        )

    for key in (subject_field, "subject_zh"):
        if not isinstance(record.get(key), str | None):
            raise ConfigError(
                f"{name}: {key!r} must be text or left out, and is {described(record[key])}"
            )

    for text in (question, *texts):
        encodable(name, "the question or a choice", text)
    a, b, c, d = (text.strip() for text in texts)
    return Choice(
        name,
        question.strip(),
        (a, b, c, d),
        _answer(name, record["answer"]),
        record.get(subject_field),
        record.get("subject_zh"),
    )


def _answer(name: str, answer: Any) -> int:
    """Return the number of the right choice, which is written as a letter or, in the hub's copies
    of MMLU, a number."""
    if isinstance(answer, Number) and answer.text in ("0", "1", "2", "3"):
        return int(answer.text)
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        return LETTERS.index(answer)
    other = " none of them" if isinstance(answer, str | Number) else f" {described(answer)}"
    raise ConfigError(f"{name}: 'answer' must be 'A', 'B', 'C' or 'D', or 0 to 3, and is{other}")


def _id(value: str | Number) -> str:
    return value.text[:40] if isinstance(value, Number) else shown(value)


def language_of(question: str) -> Language:
    """Chinese if there is a Chinese character (none in MMLU, one at least in every question of
    C-Eval and CMMLU)."""
    return "zh" if re.search("[\u4e00-\u9fff]", question) else "en"


def render(choice: Choice, shots: Sequence[Choice], scoring: Scoring, language: Language) -> str:
    """The prompt up to the answer, which follows as `ending` gives it."""
    solved = (
        _ask(shot, scoring, language) + ending(shot, shot.answer, scoring, language) + "\n\n"
        for shot in shots
    )
    return _header(choice, scoring, language) + "".join(solved) + _ask(choice, scoring, language)


def ending(choice: Choice, index: int, scoring: Scoring, language: Language) -> str:
    """What follows the prompt for the choice `index`."""
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
        f"\n{letter}. {text}" for letter, text in zip(LETTERS, choice.choices, strict=True)
    )
    return f"{choice.question}{listed}\n{cue}"


def prepare(
    questions: Sequence[Choice],
    tokenizer: Any,
    *,
    context: int | None,
    scoring: Scoring = "letter",
    shots: int = 0,
    examples: Sequence[Choice] = (),
    language: Literal["auto"] | Language = "auto",
) -> Sheet:
    """Tokens of `questions`, each after the first `shots` of `examples` of its subject.

    A prompt longer than `context` (tokens; None for any length) loses its last examples first, then
    its beginning. Raises `ConfigError` naming a record of which a choice alone is too long.
    """
    if not 0 <= shots <= MAX_SHOTS:
        raise ConfigError(f"shots={shots}: choose 0 to {MAX_SHOTS}")
    if (shots > 0) != bool(examples):
        lacking = (
            "--shots-from, a file to take the examples from"
            if shots
            else "--shots, how many examples to take"
        )
        raise ConfigError(f"solved examples need --shots and --shots-from; add {lacking}")

    encoder = Encoder.of(tokenizer)
    prompts = []
    short = 0
    dropped = 0
    cut = 0
    cut_tokens = 0

    for choice in questions:
        wording = language_of(choice.question) if language == "auto" else language
        own = [
            shot
            for shot in examples
            if shot.subject == choice.subject and shot.question != choice.question
        ]
        own = own[:shots]
        short += len(own) < shots
        kept = len(own)
        prompt = _tokens(choice, own, encoder, scoring, wording)

        while context is not None and kept and _length(prompt) > context:
            kept -= 1
            prompt = _tokens(choice, own[:kept], encoder, scoring, wording)

        dropped += len(own) - kept
        surplus = 0 if context is None else _length(prompt) - context
        if surplus > 0:
            cut = cut + 1
            cut_tokens = cut_tokens + surplus
            prompt = _cut_left(choice, prompt, surplus, encoder)

        prompts.append(prompt)

    return Sheet(tuple(questions), tuple(prompts), short, dropped, cut, cut_tokens)


def _tokens(
    choice: Choice, shots: Sequence[Choice], encoder: Encoder, scoring: Scoring, language: Language
) -> Prompt:
    """Prompt and choice are tokenised together, as they would stand in a text; they part where the
    tokens do.

    Nothing follows a choice: a tokenizer's EOS would be scored with it, and would stand between
    prompt and choice.
    """
    text = render(choice, shots, scoring, language)
    ways = [
        text,
        *(text + ending(choice, index, scoring, language) for index in range(len(LETTERS))),
    ]
    rows = [encoder.prompt(way) for way in ways]
    common = 0

    while all(common < len(row) and row[common] == rows[0][common] for row in rows):
        common += 1
    endings = tuple(tuple(row[common:]) for row in rows[1:])
    if common == 0 or not all(endings):
        raise ConfigError(
            f"{choice.name}: the tokenizer gives the same tokens with and without a choice, so it cannot be scored; "
            "remove the record"
        )

    sizes = tuple(1 if scoring == "letter" else len(text.encode()) for text in choice.choices)
    return Prompt(tuple(rows[0][:common]), endings, sizes)


def _length(prompt: Prompt) -> int:
    return len(prompt.prefix) + max(len(ending) for ending in prompt.endings)


def _cut_left(choice: Choice, prompt: Prompt, surplus: int, encoder: Encoder) -> Prompt:
    """Without `surplus` tokens after the special ones that the tokenizer puts first, such as
    BOS."""
    first = len(encoder.prefix) if prompt.prefix[: len(encoder.prefix)] == encoder.prefix else 0
    if len(prompt.prefix) - surplus < first + 1:
        raise ConfigError(
            f"{choice.name}: its longest choice has {max(len(ending) for ending in prompt.endings)} tokens, which "
            "leaves no room for the question in the model's context; remove the record, or score by letter"
        )

    return Prompt(
        prompt.prefix[:first] + prompt.prefix[first + surplus :], prompt.endings, prompt.sizes
    )


@torch.no_grad()
def score(model: nn.Module, sheet: Sheet, *, pad_token_id: int) -> list[list[float]]:
    """log P(choice | prompt) of every question's choices, nats, divided by `Prompt.sizes`."""
    # Choices that differ in their last token only, as letters do, share one row: its last position
    # scores them all.
    rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for number, prompt in enumerate(sheet.prompts):
        for index, tokens in enumerate(prompt.endings):
            rows.setdefault((*prompt.prefix, *tokens[:-1]), []).append((number, index))

    device = next(model.parameters()).device
    scores = [[math.nan] * len(prompt.endings) for prompt in sheet.prompts]
    model.eval()
    done = 0
    told = time.monotonic()

    for part in _batches(sorted(rows, key=len)):
        batch = collate([Example(row, row) for row in part], pad_token_id, device)
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        for place, row in enumerate(part):
            longest = max(len(sheet.prompts[number].endings[index]) for number, index in rows[row])
            since = len(row) - longest
            likely = logits[place, since : len(row)].float().log_softmax(-1)

            for number, index in rows[row]:
                prompt = sheet.prompts[number]
                targets = torch.tensor(prompt.endings[index], device=device)
                each = likely[longest - len(targets) :].gather(1, targets[:, None])
                scores[number][index] = float(each.sum()) / prompt.sizes[index]

                if math.isnan(scores[number][index]):
                    raise ConfigError(
                        f"{sheet.questions[number].name}: the model's logits are not numbers; its weights may be "
                        "damaged, or too large for model.dtype: choose 'float32'"
                    )

        done += len(part)
        if time.monotonic() - told > 1:
            told = time.monotonic()
            logger.info("multiple choice: %d of %d sequences", done, len(rows))

    return scores


def _batches(rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive `rows`, sorted by length, within the bounds of one forward pass; one row always
    fits."""
    batch: list[tuple[int, ...]] = []
    for row in rows:
        if batch and (len(batch) == BATCH_ROWS or (len(batch) + 1) * len(row) > BATCH_TOKENS):
            yield batch
            batch = []

        batch.append(row)

    if batch:
        yield batch


@dataclass(frozen=True)
class Marks:
    """Which questions a model got right, in the order of the sheet."""

    right: tuple[bool, ...]
    subjects: tuple[str | None, ...]

    @classmethod
    def of(cls, sheet: Sheet, scores: Sequence[Sequence[float]]) -> "Marks":
        """The highest score is the model's answer; of equal ones the first."""
        picked = [row.index(max(row)) for row in map(list, scores)]
        right = tuple(
            index == question.answer
            for index, question in zip(picked, sheet.questions, strict=True)
        )

        return cls(right, tuple(question.subject for question in sheet.questions))

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def standard_error(self) -> float:
        """sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.right))

    def interval(self, seed: int) -> Interval:
        """The accuracy with its bootstrap interval, or the exact (Clopper-Pearson) one where all
        answers are alike."""
        found = bootstrap(self.right, seed)
        if found is None:
            from scipy.stats import binomtest

            exact = binomtest(sum(self.right), len(self.right)).proportion_ci(0.95)
            found = Interval(self.accuracy, float(exact.low), float(exact.high))

        return found

    def by_subject(self) -> dict[str, tuple[int, int]]:
        """Right answers and questions of each subject, in alphabetical order; "" is no subject."""
        table: dict[str, tuple[int, int]] = {}
        pairs = zip(self.subjects, self.right, strict=True)

        for subject, right in sorted((subject or "", right) for subject, right in pairs):
            known, asked = table.get(subject, (0, 0))
            table[subject] = (known + right, asked + 1)

        return table


def bootstrap(values: Sequence[float], seed: int) -> Interval | None:
    """Mean of `values` with its 95 % BCa interval over questions (Efron 1987); None where all
    values are equal."""
    if len(set(values)) < 2:
        return None

    from scipy import stats

    result = stats.bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=100,  # resamples at a time, so that a full MMLU needs megabytes
        confidence_level=0.95,
        method="BCa",
        random_state=numpy_generator(seed, "bootstrap"),
    )
    low, high = (float(end) for end in result.confidence_interval)

    return Interval(math.fsum(values) / len(values), low, high)
