"""Prompts that are read as conversations, and conversations of one question as prompts."""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from fluvial.data.forms import CONVERSATIONS, WORDED, Form
from fluvial.data.records import Answered, Chat, Record
from fluvial.errors import ConfigError

ReadAs = Literal["prompt_completion", "messages"]
SETTING = "data.read_as"
ONE_TURN = ("user", "assistant")
"""Roles of a conversation of one question with its answer."""
KINDS: dict[Form, str] = {
    "text": "plain text",
    "prompt_completion": "prompts with completions",
    "alpaca": "Alpaca records, with words of their own around the prompt",
    "choices": "questions with choices, in the prompt of an examination",
    "lettered_choices": "questions with choices, in the prompt of an examination",
    "messages": "conversations in a chat template",
    "sharegpt": "conversations in a chat template",
}
"""Text that the model reads of the records of a form, in words."""


def form_read(form: Form, wanted: ReadAs | None) -> Form:
    """Return the form that the records of a form have, once they are read as `wanted`."""
    if wanted == "prompt_completion" and form in CONVERSATIONS:
        return wanted
    if wanted == "messages" and (form == "prompt_completion" or form in WORDED):
        return wanted
    return form


def read_as(record: Record, wanted: ReadAs | None) -> Record:
    """Return a record as `wanted` reads it; plain text, and what has that form, stays as it is.

    Raises `ConfigError` for a conversation that is not one question with its answer.
    """
    content = record.content
    if wanted == "messages" and isinstance(content, Answered):
        reply = content.answer.strip() if content.joined else content.answer
        texts = zip(ONE_TURN, (content.prompt, reply), strict=True)
        messages = [{"role": role, "content": text} for role, text in texts]
        return replace(record, content=Chat(messages, references=content.references))
    if wanted == "prompt_completion" and isinstance(content, Chat):
        if not is_one_turn(content):
            raise ConfigError(
                f"{record.place}: {SETTING} = {wanted!r} reads conversations of one question of "
                "the user with its answer, and this one has other turns, names or weights; remove "
                "the record or the setting"
            )
        question, answer = content.messages
        return replace(record, content=Answered(question["content"], answer["content"]))

    return record


def is_one_turn(chat: Chat) -> bool:
    """Return whether a conversation is one question of the user with its answer, and no more."""
    plain = all(message.keys() == {"role", "content"} for message in chat.messages)
    roles = tuple(message["role"] for message in chat.messages)
    return plain and roles == ONE_TURN and not chat.unlearned


def kinds_apart(trained: Collection[Form], heldout: Collection[Form]) -> list[str]:
    """Return a remark where the records to train on and those held out are of different kinds."""
    kinds = [list(dict.fromkeys(KINDS[form] for form in forms)) for forms in (trained, heldout)]
    if not kinds[0] or set(kinds[1]) <= set(kinds[0]):
        return []

    remedy = "give both one form"
    if CONVERSATIONS & {*trained, *heldout} and "text" not in (*trained, *heldout):
        remedy = (
            f'read both alike, by {SETTING} = "prompt_completion" (for conversations of one '
            'question with its answer) or "messages" (all in the chat template)'
        )
    one, other = (" and ".join(each) for each in kinds)
    return [
        f"the records to train on are {one}, and those held out are {other}: the site alone is "
        f"measured in a form that it does not train, which counts as an advantage of the others; "
        f"{remedy}"
    ]
