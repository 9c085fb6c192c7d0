"""Records made from rows: texts that are checked, and no guesses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fluvial.data.faults import shown
from fluvial.data.forms import Form
from fluvial.data.rows import Number, described
from fluvial.errors import ConfigError

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
ROLES = ("system", "developer", "user", "assistant", "tool")
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
UNSUPPORTED_IN_A_TURN = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""Fields of a turn that a chat template may render; a record with one is refused, since its text
would be lost."""

Numbers = Literal["refuse", "text"]
Message = dict[str, str]


@dataclass(frozen=True)
class Text:
    """Plain text with loss on all of it."""

    text: str


@dataclass(frozen=True)
class Answered:
    """A prompt, and the answer with loss."""

    prompt: str
    answer: str
    references: tuple[str, ...] = ()
    """Further answers that a held-out answer is scored against; without loss."""


@dataclass(frozen=True)
class Chat:
    """Turns of a conversation, each with `role` and `content`; the assistant's have loss."""

    messages: Sequence[Message]


@dataclass(frozen=True)
class Record:
    """The content of a row, and its place."""

    place: object
    """Place for messages; its `str` has file and line."""
    content: Text | Answered | Chat


@dataclass(frozen=True)
class RecordReader:
    """A reader of rows of one form."""

    form: Form
    columns: Mapping[str, str]
    """Names of columns that differ: our field = the file's column."""
    numbers: Numbers = "refuse"

    def read(self, place: object, fields: Mapping[str, Any]) -> Record:
        """Return the record of a row.

        Raise `ConfigError` naming place, field and remedy, without text of the row.
        """
        if self.form == "text":
            return Record(place, Text(self._text(place, fields, "text")))
        if self.form == "prompt_completion":
            prompt = self._text(place, fields, "prompt")
            answer = self._answer(place, fields, "completion")
            return Record(place, Answered(prompt, answer, self._references(place, fields)))

        if self.form == "alpaca":
            return Record(place, self._alpaca(place, fields))

        return Record(place, Chat(self._messages(place, fields)))

    def _text(self, place: object, fields: Mapping[str, Any], field: str) -> str:
        name = self._name(field)
        if self._column(field) not in fields:
            raise ConfigError(
                f"{place}: {name} is missing; form {self.form!r} needs it; add it, or remove the "
                "record"
            )

        return self._value(place, name, fields[self._column(field)])

    def _value(self, place: object, name: str, value: Any) -> str:
        if self.numbers == "text" and isinstance(value, bool):
            return "true" if value else "false"
        if self.numbers == "text" and isinstance(value, Number) and value.finite:
            return value.text
        if isinstance(value, str):
            return encodable(place, name, value)
        if isinstance(value, bool | Number) and (isinstance(value, bool) or value.finite):
            remedy = 'put it in quotes, or set data.numbers = "text" to take it as it is written'
        else:
            remedy = "write a text, or remove the record"

        raise ConfigError(f"{place}: {name} must be text, and is {described(value)}; {remedy}")

    def _answer(self, place: object, fields: Mapping[str, Any], field: str) -> str:
        answer = self._text(place, fields, field)
        if not answer.strip():
            raise ConfigError(
                f"{place}: the answer is empty ({self._name(field)}), which would teach the model "
                "to say nothing; write the answer, or remove the record"
            )

        return answer

    def _references(self, place: object, fields: Mapping[str, Any]) -> tuple[str, ...]:
        value = fields.get(self._column("references"))
        if value is None:
            return ()

        name = self._name("references")
        if not isinstance(value, list):
            raise ConfigError(
                f"{place}: {name} must be a list of texts, further answers to score against, and "
                f"is {described(value)}; write a list, or remove the field"
            )

        texts = tuple(
            self._value(place, f"text {number} of {name}", text)
            for number, text in enumerate(value, start=1)
        )
        if not all(text.strip() for text in texts):
            raise ConfigError(
                f"{place}: {name} has a blank text, which an empty answer would equal; remove it"
            )

        return texts

    def _alpaca(self, place: object, fields: Mapping[str, Any]) -> Answered:
        instruction = self._text(place, fields, "instruction")
        answer = self._answer(place, fields, "output")
        value = fields.get(self._column("input"))
        given = "" if value is None else self._value(place, self._name("input"), value)
        template = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT

        prompt = template.format(instruction=instruction, input=given)
        return Answered(prompt, answer, self._references(place, fields))

    def _messages(self, place: object, fields: Mapping[str, Any]) -> list[Message]:
        field = "messages" if self.form == "messages" else "conversations"
        if self._column(field) not in fields:
            raise ConfigError(
                f"{place}: {self._name(field)} is missing; form {self.form!r} needs it"
            )

        turns = fields[self._column(field)]
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            held = "an empty list" if isinstance(turns, list) else described(turns)
            raise ConfigError(
                f"{place}: {self._name(field)}: the conversation must be a list of turns, and is "
                f"{held}; write a list of objects, or remove the record"
            )

        if fields.get("tools"):
            raise ConfigError(
                f"{place}: the record has 'tools', which are not supported; remove the field or "
                "the record"
            )

        return [
            self._turn(f"{place}: turn {number}", turn)
            for number, turn in enumerate(turns, start=1)
        ]

    def _turn(self, place: str, turn: Any) -> Message:
        who, what = ("role", "content") if self.form == "messages" else ("from", "value")
        if not isinstance(turn, Mapping):
            raise ConfigError(
                f"{place} must be an object with {who!r} and {what!r}, and is {described(turn)}"
            )

        for key in (who, what):
            if key not in turn:
                raise ConfigError(
                    f"{place} needs the texts {who!r} and {what!r}; {key!r} is missing"
                )

        for key in UNSUPPORTED_IN_A_TURN:
            if turn.get(key):
                raise ConfigError(
                    f"{place} has {key!r}, which is not supported; remove the field or the record"
                )

        role = turn[who]
        roles = SHAREGPT_ROLES if self.form == "sharegpt" else ROLES
        if not isinstance(role, str) or role not in roles:
            raise ConfigError(
                f"{place}: {who!r} is none of the known roles {', '.join(roles)}; rename it"
            )

        message = {
            "role": SHAREGPT_ROLES[role] if self.form == "sharegpt" else role,
            "content": self._content(place, what, turn[what]),
        }
        named = {
            key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)
        }
        return message | named

    def _content(self, place: str, name: str, value: Any) -> str:
        """Return the text of a turn; a list of texts is joined, as chat templates join it."""
        if not isinstance(value, list):
            return self._value(place, repr(name), value)

        for part in value:
            if (
                not isinstance(part, Mapping)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise ConfigError(
                    f'{place}: {name!r} is a list with a part that is not {{type: "text", text}}; '
                    "only text can be learned here: remove the part or the record"
                )

        return encodable(place, repr(name), "".join(part["text"] for part in value))

    def _column(self, field: str) -> str:
        return self.columns.get(field, field)

    def _name(self, field: str) -> str:
        """Return a field as messages name it."""
        column = self._column(field)
        return (
            f"field {field!r}" if column == field else f"field {field!r} (column {shown(column)})"
        )


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
