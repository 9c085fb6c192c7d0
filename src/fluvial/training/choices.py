"""Multiple-choice questions: the form of their files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluvial.data.choice_records import choices_of, question_about, question_of, right_choice
from fluvial.data.faults import DataError, Faults, listed, shown
from fluvial.data.fields import encodable
from fluvial.data.multiple_choice import Choice
from fluvial.data.readers import read_json
from fluvial.data.rows import Number, described
from fluvial.errors import ConfigError
from fluvial.storage.files import exists, refuse_endless

JSON = (".json", ".jsonl", ".ndjson")
"""Suffixes of files of questions."""


def read_choices(path: Path, subject_field: str = "subject") -> list[Choice]:
    """Read records `{"question", "choices": [2 to 10], "answer"}`, one a line, from a file.

    The answer is a letter, the text of a choice, or a number from 0. `context` (the text that a
    question is about), `subject` and `id` are optional fields; `subject_field` names another field
    for `subject`. A file with the suffix .json holds a list of records. Raises `ConfigError` naming
    line and id of every record that is not of this form, without its text.
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

    if subject_field != "subject" and subject_field not in record:
        raise ConfigError(
            f"{name}: --subject-field {subject_field!r} is missing; found {listed(sorted(record))}"
        )

    for key in (subject_field, "subject_zh", "context"):
        if not isinstance(record.get(key), str | None):
            raise ConfigError(
                f"{name}: {key!r} must be text or left out, and is {described(record[key])}"
            )

    labels, texts = choices_of(name, "'choices'", record["choices"])
    return Choice(
        name,
        question_about(
            encodable(name, "'context'", record.get("context") or ""),
            question_of(name, "'question'", record["question"]),
        ),
        texts,
        right_choice(name, "'answer'", record["answer"], labels, texts),
        record.get(subject_field),
        record.get("subject_zh"),
    )


def _id(value: str | Number) -> str:
    return value.text[:40] if isinstance(value, Number) else shown(value)
