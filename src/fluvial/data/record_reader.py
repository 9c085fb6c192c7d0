"""Records made from rows, by the form of the file."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fluvial.data.choice_records import multiple_choice
from fluvial.data.conversations import conversation
from fluvial.data.fields import Fields
from fluvial.data.forms import Form
from fluvial.data.records import Answered, Chat, Numbers, Record, Text

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
UNREAD_IN_A_RECORD = ("system", "history")
"""Fields of a record that other programs put into the prompt; one that is not read is noted."""


@dataclass(frozen=True)
class RecordReader:
    """A reader of rows of one form."""

    form: Form
    columns: Mapping[str, str]
    """Names of columns that differ: our field = the file's column."""
    numbers: Numbers = "refuse"
    unread: Counter[tuple[str, str]] = field(default_factory=Counter, compare=False)
    """Counts of a field that is not read, by its name and "turns" or "records"; they grow with each
    record."""

    def read(self, place: object, cells: Mapping[str, Any]) -> Record:
        """Return the record of a row.

        Raise `ConfigError` naming place, field and remedy, without text of the row.
        """
        fields = Fields(place, cells, self.form, self.columns, self.numbers)
        return Record(place, self._content(fields))

    def _content(self, fields: Fields) -> Text | Answered | Chat:
        match self.form:
            case "text":
                return Text(fields.text("text"))
            case "prompt_completion":
                prompt = fields.text("prompt")
                answer = fields.answer("completion")
                return Answered(prompt, answer, fields.references("completion"))
            case "choices" | "lettered_choices":
                return multiple_choice(fields)
            case "alpaca":
                self._note_unread(fields)
                return _alpaca(fields)
            case _:
                self._note_unread(fields)
                return conversation(fields, self.unread)

    def _note_unread(self, fields: Fields) -> None:
        self.unread.update(
            (key, "records")
            for key in UNREAD_IN_A_RECORD
            if fields.cells.get(key) and key not in self.columns.values()
        )


def _alpaca(fields: Fields) -> Answered:
    instruction = fields.text("instruction")
    answer = fields.answer("output")
    value = fields.value("input")
    given = "" if value is None else fields.checked(fields.name("input"), value)
    template = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT

    prompt = template.format(instruction=instruction, input=given)
    return Answered(prompt, answer, fields.references("output"))
