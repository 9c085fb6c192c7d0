"""Fields of one row: texts that are checked, by our names of fields, and no guesses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluvial.data.faults import shown
from fluvial.data.forms import Form
from fluvial.data.json_document import json_list
from fluvial.data.records import Numbers
from fluvial.data.rows import Number, described
from fluvial.errors import ConfigError
from fluvial.formatting import is_blank


@dataclass(frozen=True)
class Fields:
    """The fields of a row, under our names.

    Each method raises `ConfigError` naming place, field and remedy, without text of the row.
    """

    place: object
    """Place for messages; its `str` has file and line."""
    cells: Mapping[str, Any]
    """Values of the row by the file's own names of columns."""
    form: Form
    columns: Mapping[str, str]
    """Names of columns that differ: our field = the file's column."""
    numbers: Numbers

    def text(self, field: str) -> str:
        """Return the text of a field that must be there."""
        return self.checked(self.name(field), self.needed(field))

    def needed(self, field: str) -> Any:
        """Return the value of a field that must be there, unchecked."""
        if self.column(field) not in self.cells:
            raise ConfigError(
                f"{self.place}: {self.name(field)} is missing; form {self.form!r} needs it; add "
                "it, or remove the record"
            )

        return self.cells[self.column(field)]

    def value(self, field: str) -> Any:
        """Return the value of a field, unchecked; None where there is none."""
        return self.cells.get(self.column(field))

    def checked(self, name: str, value: Any) -> str:
        """Return a value as text, if it is one that can be written."""
        return checked_text(self.place, name, value, self.numbers)

    def answer(self, field: str) -> str:
        """Return the answer to learn: a text, or the first of a list of right ones."""
        value = self.value(field)
        if isinstance(value, list) and self.column(field) != self.column("references"):
            column = shown(self.column(field))
            raise ConfigError(
                f"{self.place}: {self.name(field)} must be text, and is a list; if each of its "
                "texts is a right answer, and the first the one to learn, set data.columns = "
                f"{{{field} = {column}, references = {column}}}, else write one text"
            )
        if isinstance(value, list) and not value:
            raise ConfigError(
                f"{self.place}: {self.name(field)} lists no answer; write one, or remove the record"
            )
        if isinstance(value, list):
            answer = self.checked(f"text 1 of {self.name(field)}", value[0])
        else:
            answer = self.text(field)
        if is_blank(answer):
            raise ConfigError(
                f"{self.place}: the answer is empty ({self.name(field)}), which would teach the "
                "model to say nothing; write the answer, or remove the record"
            )

        return answer

    def references(self, field: str) -> tuple[str, ...]:
        """Return further right answers to that of `field`."""
        value = self.value("references")
        listed = self.column("references") == self.column(field)
        if value is None or (listed and not isinstance(value, list)):
            return ()

        name = self.name("references")
        if not isinstance(value, list):
            raise ConfigError(
                f"{self.place}: {name} must be a list of texts, further answers to score against, "
                f"and is {described(value)}; write a list, or remove the field"
            )

        texts = tuple(
            self.checked(f"text {number} of {name}", text)
            for number, text in enumerate(value, start=1)
        )
        if any(is_blank(text) for text in texts):
            raise ConfigError(
                f"{self.place}: {name} has a blank text, which an empty answer would equal; "
                "remove it"
            )

        return texts[1:] if listed else texts

    def column(self, field: str) -> str:
        """Return the file's name of a field."""
        return self.columns.get(field, field)

    def name(self, field: str) -> str:
        """Return a field as messages name it."""
        column = self.column(field)
        return (
            f"field {field!r}" if column == field else f"field {field!r} (column {shown(column)})"
        )


def checked_text(place: object, name: str, value: Any, numbers: Numbers) -> str:
    """Return a value as text, if it is one that can be written; raise `ConfigError`."""
    if numbers == "text" and isinstance(value, bool):
        return "true" if value else "false"
    if numbers == "text" and isinstance(value, Number) and value.finite:
        return value.text
    if isinstance(value, str):
        return encodable(place, name, value)
    if isinstance(value, bool | Number) and (isinstance(value, bool) or value.finite):
        remedy = 'put it in quotes, or set data.numbers = "text" to take it as it is written'
    else:
        remedy = "write a text, or remove the record"

    raise ConfigError(f"{place}: {name} must be text, and is {described(value)}; {remedy}")


def listed_value(place: object, name: str, value: Any, of: str) -> Any:
    """Return the list that a text is as JSON, as a column of CSV holds it; any other value as it
    is.

    Raise `ConfigError`, naming what the list is `of`, for a text that begins as a list and is no
    JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        found = json_list(value)
    except ValueError as error:
        raise ConfigError(
            f"{place}: {name}: the text {error}; write the list of {of} as JSON, as Python's "
            "json.dumps does and its str does not"
        ) from None
    return value if found is None else found


def encodable(place: object, name: str, text: str) -> str:
    """Return `text`; raise `ConfigError` for half of a surrogate pair, which no encoding has."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{place}: {name} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}) at "
            "character "
            f"{error.start + 1}; write the whole character"
        ) from None

    return text
