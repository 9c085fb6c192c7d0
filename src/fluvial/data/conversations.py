"""Conversations of rows: turns that are checked, and their weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fluvial.data.fields import Fields, checked_text, encodable, listed_value
from fluvial.data.forms import REQUIRED_FIELDS
from fluvial.data.records import Chat, Message, Numbers
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
NAMES_IN_A_TURN = ("name", "tool_call_id")
"""Fields of a turn that a chat template may render, and that are given to it."""
HARMLESS_IN_A_TURN = ("id", "index", "timestamp")
"""Fields of a turn that hold nothing to learn; any other that is not read is noted."""


def conversation(fields: Fields, unread: Counter[tuple[str, str]]) -> Chat:
    """Return the conversation of a row of the form "messages" or "sharegpt".

    Fields of turns that are not read are counted in `unread`. Raises `ConfigError`.
    """
    (field,) = REQUIRED_FIELDS[fields.form]
    place, name = fields.place, fields.name(field)
    turns = listed_value(place, name, fields.needed(field), "turns")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        held = "an empty list" if isinstance(turns, list) else described(turns)
        raise ConfigError(
            f"{place}: {name}: the conversation must be a list of turns, and is {held}; write a "
            "list of objects, or remove the record"
        )

    for key in UNSUPPORTED_IN_A_RECORD:
        if fields.cells.get(key):
            raise ConfigError(
                f"{place}: the record has {key!r}, which are not supported; remove the field or "
                "the record"
            )

    messages = list[Message]()
    unlearned = set[int]()
    for number, turn in enumerate(turns):
        message, learned = _turn(f"{place}: turn {number + 1}", turn, fields, unread)
        messages.append(message)
        if not learned:
            unlearned.add(number)

    return Chat(messages, frozenset(unlearned))


def _turn(
    place: str, turn: Any, fields: Fields, unread: Counter[tuple[str, str]]
) -> tuple[Message, bool]:
    """Return a turn, and false if its weight is 0."""
    sharegpt = fields.form == "sharegpt"
    who, what = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(turn, Mapping):
        raise ConfigError(
            f"{place} must be an object with {who!r} and {what!r}, and is {described(turn)}"
        )

    for key in (who, what):
        if key not in turn:
            raise ConfigError(f"{place} needs the texts {who!r} and {what!r}; {key!r} is missing")

    _refuse_fields(place, turn)
    role = turn[who]
    roles = SHAREGPT_ROLES if sharegpt else ROLES
    if not isinstance(role, str) or role not in roles:
        raise ConfigError(
            f"{place}: {who!r} is none of the known roles {', '.join(roles)}; rename it"
        )

    message = {
        "role": SHAREGPT_ROLES[role] if sharegpt else role,
        "content": _content(place, what, turn[what], fields.numbers),
    }
    learned = _weight(place, message["role"], turn.get("weight"))
    if message["role"] == "assistant" and learned and is_blank(message["content"]):
        raise ConfigError(
            f"{place}: the answer is empty ({what!r}), which would teach the model to say nothing; "
            "write the answer, or remove the turn or the record"
        )

    for key in NAMES_IN_A_TURN:
        if turn.get(key) is not None:
            message[key] = checked_text(place, repr(key), turn[key], fields.numbers)

    read = {who, what, "weight", *NAMES_IN_A_TURN, *HARMLESS_IN_A_TURN}
    unread.update(
        (key, "turns")
        for key, value in turn.items()
        if key not in read and value not in (None, "", [])
    )
    return message, learned


def _refuse_fields(place: str, turn: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a field whose content, or whose effect on the loss, would be lost."""
    for key in UNSUPPORTED_IN_A_TURN:
        if turn.get(key):
            raise ConfigError(
                f"{place} has {key!r}, which is not supported; remove the field or the record"
            )

    for key in OTHER_WEIGHTS:
        if turn.get(key) is not None:
            raise ConfigError(
                f'{place} has {key!r}, which is not supported; write "weight": 0 on a turn of the '
                "assistant without loss, and remove the field"
            )


def _content(place: str, name: str, value: Any, numbers: Numbers) -> str:
    """Return the text of a turn; a list of texts is joined, as chat templates join it."""
    if not isinstance(value, list):
        return checked_text(place, repr(name), value, numbers)

    for part in value:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise ConfigError(
                f'{place}: {name!r} is a list with a part that is not {{type: "text", text}}; only '
                "text can be learned here: remove the part or the record"
            )

    return encodable(place, repr(name), "".join(part["text"] for part in value))


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
