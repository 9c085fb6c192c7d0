"""Multiple-choice questions of rows: choices that are checked, and the right one of them.

Choices are a list of texts or of objects with `text` and `label` (CommonsenseQA), an object of
letters and texts (MedQA), or an object with the lists `text` and `label` (ARC); or each has a
column of its own (C-Eval, CMMLU, MedMCQA).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fluvial.data.fields import Fields, checked_text, encodable, listed_value
from fluvial.data.multiple_choice import LETTERS, Choice, ending, language_of, render
from fluvial.data.records import Answered, Numbers
from fluvial.data.rows import Number, described
from fluvial.errors import ConfigError
from fluvial.formatting import is_blank

FEWEST = 2
"""Choices of a question, at least."""
REMEDY = "correct it, or remove the record"


def multiple_choice(fields: Fields) -> Answered:
    """Return the question of a row as a prompt that lists the choices, and the right letter.

    The prompt is that of `fluvial evaluate --choices` with letters and without examples.
    """
    if fields.form == "choices":
        name, value = fields.name("choices"), fields.needed("choices")
        labels, texts = choices_of(fields.place, name, value, fields.numbers)
    else:
        labels, texts = _in_columns(fields)

    subject = fields.value("subject")
    choice = Choice(
        str(fields.place),
        _question(fields),
        texts,
        right_choice(fields.place, fields.name("answer"), fields.needed("answer"), labels, texts),
        None if subject is None else fields.checked(fields.name("subject"), subject),
    )
    language = language_of(choice.question)
    return Answered(
        render(choice, (), "letter", language),
        ending(choice, choice.answer, "letter", language),
        joined=True,
    )


def _question(fields: Fields) -> str:
    """Return the question, after the text that it is about where there is one."""
    question = question_of(fields.place, fields.name("question"), fields.needed("question"))
    context = fields.value("context")
    about = "" if context is None else fields.checked(fields.name("context"), context)
    return question_about(about, question)


def question_about(context: str, question: str) -> str:
    """Return a question after the text that it is about; the question alone where that is blank."""
    return question if is_blank(context) else f"{context.strip()}\n\n{question}"


def question_of(place: object, name: str, value: Any) -> str:
    """Return the text of a question without blanks around it; raise `ConfigError` naming it."""
    if not isinstance(value, str) or is_blank(encodable(place, name, value)):
        found = "blank" if isinstance(value, str) else described(value)
        raise ConfigError(f"{place}: {name} must be text that is not blank, and is {found}")

    return value.strip()


def choices_of(
    place: object, name: str, value: Any, numbers: Numbers = "refuse"
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the labels and the texts of choices; raise `ConfigError` naming place and field."""
    labels, texts = _labelled(listed_value(place, name, value, "choices"))
    if not isinstance(texts, list) or not FEWEST <= len(texts) <= len(LETTERS):
        held = f"a list of {len(texts)}" if isinstance(texts, list) else described(value)
        raise ConfigError(
            f"{place}: {name} must be a list of {FEWEST} to {len(LETTERS)} texts, and is {held}; "
            f"{REMEDY}"
        )

    checked = []
    for letter, text in zip(LETTERS, texts, strict=False):
        named = f"choice {letter} of {name}"
        checked.append(checked_text(place, named, text, numbers).strip())
        if is_blank(checked[-1]):
            raise ConfigError(f"{place}: {named} is blank; {REMEDY}")

    if labels is None:
        return tuple(LETTERS[: len(texts)]), tuple(checked)
    if not (
        isinstance(labels, list)
        and all(isinstance(label, str) for label in labels)
        and len(set(labels)) == len(labels) == len(texts)
    ):
        raise ConfigError(
            f"{place}: {name}: each choice needs a label of its own, as text; {REMEDY}"
        )
    return tuple(labels), tuple(checked)


def _labelled(value: Any) -> tuple[Any, Any]:
    """Return the labels, None without any, and the texts."""
    if isinstance(value, list) and value and all(_is_labelled(each) for each in value):
        return [each["label"] for each in value], [each["text"] for each in value]
    if not isinstance(value, Mapping):
        return None, value
    if _is_labelled(value):
        return value["label"], value["text"]
    return list(value), list(value.values())


def _is_labelled(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() == {"text", "label"}


def right_choice(
    place: object, name: str, value: Any, labels: Sequence[str], texts: Sequence[str]
) -> int:
    """Return the number of the right choice: by a label of the record's own, by its letter or its
    text, or by its number from 0, as the hub's MMLU has it.

    Raise `ConfigError` where it is none of them, or may be two.
    """
    letters = tuple(LETTERS[: len(texts)])
    if isinstance(value, Number) and value.text in map(str, range(len(texts))):
        return int(value.text)

    wanted = value.strip() if isinstance(value, str) else ""
    if tuple(labels) != letters and wanted in labels:
        return labels.index(wanted)
    found = {number for number, text in enumerate(texts) if text == wanted}
    if wanted.upper() in letters:
        found.add(letters.index(wanted.upper()))
    if len(found) == 1:
        return found.pop()

    ways = f"a letter from A to {letters[-1]}, the text of a choice, or 0 to {len(texts) - 1}"
    if found:
        held = "may be several of them: a letter or text that two choices have"
    elif isinstance(value, Number) or (isinstance(value, str) and value.strip().isdecimal()):
        held = "is none of them: numbers count from 0, as JSON numbers; else write letters"
    elif isinstance(value, str):
        held = "is none of them"
    else:
        held = f"is {described(value)}"
    raise ConfigError(f"{place}: {name} must be {ways}, and {held}; {REMEDY}")


def _in_columns(fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the labels and the texts of choices that have a column each; those after the last one
    with a text are none."""
    found = [letter for letter in LETTERS if fields.column(letter) in fields.cells]
    values = [fields.value(letter) for letter in found]
    while values and (values[-1] is None or values[-1] == ""):
        values.pop()
    if found[: len(values)] != list(LETTERS[: len(values)]):
        raise ConfigError(
            f"{fields.place}: choices need the columns A, B and so on, none left out; found "
            f"{', '.join(found)}"
        )

    return choices_of(fields.place, "the columns of choices", values, fields.numbers)
