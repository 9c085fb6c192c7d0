"""Multiple-choice questions: the form of their files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluvial.data.faults import DataError, Faults, listed, shown
from fluvial.data.readers import read_json
from fluvial.data.records import encodable
from fluvial.data.rows import Number, described
from fluvial.errors import ConfigError
from fluvial.storage.files import exists, refuse_endless

LETTERS = "ABCD"
JSON = (".json", ".jsonl", ".ndjson")
"""Suffixes of files of questions."""
CHANCE = 1 / len(LETTERS)
"""Accuracy of a model that guesses."""


@dataclass(frozen=True)
class Choice:
    """A question with four choices, one of which is right."""

    name: str
    """Place of the record for messages: file, line and id."""
    question: str
    choices: tuple[str, str, str, str]
    answer: int
    """Number of the right choice: 0 for A to 3 for D."""
    subject: str | None = None
    subject_zh: str | None = None
    """The subject in Chinese, for a Chinese prompt (C-Eval)."""


def read_choices(path: Path, subject_field: str = "subject") -> list[Choice]:
    """Read records `{"question", "choices": [4], "answer": "A".."D"}`, one a line, from a file.

    `subject` and `id` are optional fields; `subject_field` names another field for `subject`. A
    file with the suffix .json holds a list of records. Raises `ConfigError` naming line and id of
    every record that is not of this form, without its text.
    """
    refuse_endless(path)
    if not (exists(path) and path.is_file()):
        raise ConfigError(f"there is no file {str(path)!r} with questions")

    if path.suffix.lower() not in JSON:
        raise ConfigError(
            f"{path}: questions are read from JSON, one record a line (.jsonl) or a list (.json), "
            "each with 'question', 'choices' and 'answer'; write the file anew in that form"
        )

    try:
        return _choices(path, subject_field)
    except DataError as error:  # about records, which --set reads in another way, as no questions
        raise ConfigError(str(error)) from error


def _choices(path: Path, subject_field: str) -> list[Choice]:
    choices = []
    faults = Faults()
    for row in read_json(path).rows:
        try:
            choices.append(_choice(f"{row.place}", row.fields, subject_field))
        except ConfigError as error:
            faults.include(error, row.place)

    faults.raise_any()
    return choices


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
        found = "blank" if isinstance(question, str) else described(question)
        raise ConfigError(f"{name}: 'question' must be text that is not blank, and is {found}")

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
    """Return the number of the right choice, written as a letter, or a number as the hub's MMLU has
    it."""
    if isinstance(answer, Number) and answer.text in ("0", "1", "2", "3"):
        return int(answer.text)
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        return LETTERS.index(answer)
    other = " none of them" if isinstance(answer, str | Number) else f" {described(answer)}"
    raise ConfigError(f"{name}: 'answer' must be 'A', 'B', 'C' or 'D', or 0 to 3, and is{other}")


def _id(value: str | Number) -> str:
    return value.text[:40] if isinstance(value, Number) else shown(value)
