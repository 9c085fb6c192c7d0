"""Records made from rows: texts that are checked, and no guesses."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fluvial.data.faults import shown
from fluvial.data.forms import Form
from fluvial.data.json_document import json_list
from fluvial.data.rows import Number, described, typed
from fluvial.errors import ConfigError
from fluvial.formatting import is_blank

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
UNSUPPORTED_IN_A_TURN = (
    "tool_calls",
    "tool_plan",
    "tool_responses",
    "function_call",
    "reasoning",
    "reasoning_content",
    "reasoning_details",
    "thinking",
    "thoughts",
    "refusal",
    "audio",
    "audios",
    "image",
    "images",
    "video",
    "videos",
    "documents",
)
"""Fields of a turn with a content that a chat template may render; a record with one is refused,
since its text would be lost."""
OTHER_WEIGHTS = ("train", "train_detail", "training", "loss", "loss_mask", "mask", "masked")
"""Fields of a turn by which other programs choose what has loss; a record with one is refused."""
UNSUPPORTED_IN_A_RECORD = ("tools", "functions")
"""Fields of a conversation that a chat template may render; a record with one is refused."""
UNREAD_IN_A_RECORD = ("system", "history")
"""Fields of a record that other programs put into the prompt; one that is not read is noted."""
NAMES_IN_A_TURN = ("name", "tool_call_id")
"""Fields of a turn that a chat template may render, and that are given to it."""
HARMLESS_IN_A_TURN = ("id", "index", "timestamp")
"""Fields of a turn that hold nothing to learn; any other that is not read is noted."""

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
    unlearned: frozenset[int] = frozenset()
    """Numbers of the turns of weight 0, from 0 on, which have no loss."""
    references: tuple[str, ...] = ()
    """Further answers that the last turn is scored against; without loss."""


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
    unread: Counter[tuple[str, str]] = field(default_factory=Counter, compare=False)
    """Counts of a field that is not read, by its name and "turns" or "records"; they grow with each
    record."""

    def read(self, place: object, fields: Mapping[str, Any]) -> Record:
        """Return the record of a row.

        Raise `ConfigError` naming place, field and remedy, without text of the row.
        """
        if self.form == "text":
            return Record(place, Text(self._text(place, fields, "text")))
        if self.form == "prompt_completion":
            prompt = self._text(place, fields, "prompt")
            answer = self._answer(place, fields, "completion")
            references = self._references(place, fields, "completion")
            return Record(place, Answered(prompt, answer, references))

        self.unread.update(
            (key, "records")
            for key in UNREAD_IN_A_RECORD
            if fields.get(key) and key not in self.columns.values()
        )
        if self.form == "alpaca":
            return Record(place, self._alpaca(place, fields))

        return Record(place, self._chat(place, fields))

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
        column = self._column(field)
        value = fields.get(column)
        if isinstance(value, list) and column != self._column("references"):
            raise ConfigError(
                f"{place}: {self._name(field)} must be text, and is a list; if each of its texts "
                "is a right answer, and the first the one to learn, set data.columns = "
                f"{{{field} = {shown(column)}, references = {shown(column)}}}, else write one text"
            )
        if isinstance(value, list) and not value:
            raise ConfigError(
                f"{place}: {self._name(field)} lists no answer; write one, or remove the record"
            )
        if isinstance(value, list):
            answer = self._value(place, f"text 1 of {self._name(field)}", value[0])
        else:
            answer = self._text(place, fields, field)
        if is_blank(answer):
            raise ConfigError(
                f"{place}: the answer is empty ({self._name(field)}), which would teach the model "
                "to say nothing; write the answer, or remove the record"
            )

        return answer

    def _references(self, place: object, fields: Mapping[str, Any], field: str) -> tuple[str, ...]:
        column = self._column("references")
        value = fields.get(column)
        listed = column == self._column(field)
        if value is None or (listed and not isinstance(value, list)):
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
        if any(is_blank(text) for text in texts):
            raise ConfigError(
                f"{place}: {name} has a blank text, which an empty answer would equal; remove it"
            )

        return texts[1:] if listed else texts

    def _alpaca(self, place: object, fields: Mapping[str, Any]) -> Answered:
        instruction = self._text(place, fields, "instruction")
        answer = self._answer(place, fields, "output")
        value = fields.get(self._column("input"))
        given = "" if value is None else self._value(place, self._name("input"), value)
        template = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT

        prompt = template.format(instruction=instruction, input=given)
        return Answered(prompt, answer, self._references(place, fields, "output"))

    def _chat(self, place: object, fields: Mapping[str, Any]) -> Chat:
        field = "messages" if self.form == "messages" else "conversations"
        if self._column(field) not in fields:
            raise ConfigError(
                f"{place}: {self._name(field)} is missing; form {self.form!r} needs it"
            )

        turns = _listed(place, self._name(field), fields[self._column(field)])
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            held = "an empty list" if isinstance(turns, list) else described(turns)
            raise ConfigError(
                f"{place}: {self._name(field)}: the conversation must be a list of turns, and is "
                f"{held}; write a list of objects, or remove the record"
            )

        for key in UNSUPPORTED_IN_A_RECORD:
            if fields.get(key):
                raise ConfigError(
                    f"{place}: the record has {key!r}, which are not supported; remove the field "
                    "or the record"
                )

        messages = list[Message]()
        unlearned = set[int]()
        for number, turn in enumerate(turns):
            message, learned = self._turn(f"{place}: turn {number + 1}", turn)
            messages.append(message)
            if not learned:
                unlearned.add(number)

        return Chat(messages, frozenset(unlearned))

    def _turn(self, place: str, turn: Any) -> tuple[Message, bool]:
        """Return a turn, and false if its weight is 0."""
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

        self._refuse_fields(place, turn)
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
        learned = _weight(place, message["role"], turn.get("weight"))
        if message["role"] == "assistant" and learned and is_blank(message["content"]):
            raise ConfigError(
                f"{place}: the answer is empty ({what!r}), which would teach the model to say "
                "nothing; write the answer, or remove the turn or the record"
            )

        for key in NAMES_IN_A_TURN:
            if turn.get(key) is not None:
                message[key] = self._value(place, repr(key), turn[key])

        read = {who, what, "weight", *NAMES_IN_A_TURN, *HARMLESS_IN_A_TURN}
        self.unread.update(
            (key, "turns")
            for key, value in turn.items()
            if key not in read and value not in (None, "", [])
        )
        return message, learned

    def _refuse_fields(self, place: str, turn: Mapping[str, Any]) -> None:
        """Raise `ConfigError` for a field whose content, or whose effect on the loss, would be
        lost."""
        for key in UNSUPPORTED_IN_A_TURN:
            if turn.get(key):
                raise ConfigError(
                    f"{place} has {key!r}, which is not supported; remove the field or the record"
                )

        for key in OTHER_WEIGHTS:
            if turn.get(key) is not None:
                raise ConfigError(
                    f'{place} has {key!r}, which is not supported; write "weight": 0 on a turn '
                    "of the assistant without loss, and remove the field"
                )

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


def _listed(place: object, name: str, value: Any) -> Any:
    """Return the list that a text is as JSON, as a column of CSV holds it; any other value as it
    is."""
    if not isinstance(value, str):
        return value
    try:
        turns = json_list(value)
    except ValueError as error:
        raise ConfigError(
            f"{place}: {name}: the text of the conversation {error}; write the list of turns as "
            "JSON, as Python's json.dumps does and its str does not"
        ) from None
    return value if turns is None else turns


def _weight(place: str, role: str, value: Any) -> bool:
    """Return false for a turn of weight 0.

    Raise `ConfigError` for anything but 0 and 1, and for 1 where the role is not the assistant's.
    """
    if value is None:
        return True

    number = typed(value)
    weight = float(number.text) if isinstance(number, Number) and number.finite else None
    if weight not in (0, 1):
        raise ConfigError(
            f"{place}: 'weight' must be 0 (no loss on the turn) or 1; write one of them, or remove "
            "the field"
        )
    if weight == 1 and role != "assistant":
        raise ConfigError(
            f"{place} has 'weight' 1 and the role {role!r}; only a turn of the assistant may have "
            "it; write 0, or remove the field"
        )

    return weight == 1


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
