"""Guesses about a table of questions with choices."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile

from fluvial.data.forms import FORMS_OF_CHOICES, REQUIRED_FIELDS, Form, objects_of
from fluvial.data.multiple_choice import LETTERS
from fluvial.data.record_reader import RecordReader
from fluvial.data.rows import Row
from fluvial.errors import ConfigError
from fluvial.runs.proposal.usual_names import plain_names, usual_name

MOST_READ = 100
"""Rows that are read as questions with choices before that form is guessed."""


def with_choices(columns: Sequence[str], rows: Sequence[Row]) -> tuple[Form, dict[str, str]] | None:
    """Return the form of questions with choices and the columns to rename, None where the names or
    the values suggest another one."""
    for form in FORMS_OF_CHOICES:
        renamed = _by_name(form, columns)
        alone = len(set(renamed.values())) == len(renamed)
        if renamed.keys() >= {*REQUIRED_FIELDS[form]} and alone and _readable(form, renamed, rows):
            return form, {field: name for field, name in renamed.items() if field != name}

    return None


def _by_name(form: Form, columns: Sequence[str]) -> dict[str, str]:
    """Return the columns with usual names for the fields of a form; of choices with a column each,
    those up to the first that has none."""
    plain = plain_names(columns)
    names = {field: usual_name(plain, field) for field in ("context", "question", "answer")}
    if form == "choices":
        objects = plain_names(sorted(objects_of(columns)))
        names["choices"] = usual_name(plain | objects, "choices")
    else:
        usual = ((letter, usual_name(plain, letter)) for letter in LETTERS)
        names |= dict(takewhile(lambda pair: pair[1] is not None, usual))

    return {field: name for field, name in names.items() if name is not None}


def _readable(form: Form, columns: Mapping[str, str], rows: Sequence[Row]) -> bool:
    """Return whether most of the first rows are records of this form, or have the text of a list,
    which may be no JSON."""
    reader = RecordReader(form, columns, "text")
    some = rows[:MOST_READ]
    lists = [row.cells.get(columns["choices"]) for row in some] if form == "choices" else []
    if lists and all(isinstance(each, str) and each.startswith("[") for each in lists):
        return True

    num_read = 0
    for row in some:
        with suppress(ConfigError):
            reader.read(row.place, row.cells)
            num_read += 1

    return 2 * num_read > len(some)
