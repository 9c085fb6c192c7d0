"""Held-out records that are read in the same form as the records to train on."""

from collections.abc import Mapping
from dataclasses import replace

from fluvial.data.read_as import ReadAs, is_one_turn
from fluvial.data.records import Chat
from fluvial.runs.proposal.heldout import ALL, Heldout
from fluvial.runs.proposal.records import DataFacts, SeparateFacts

WHY: dict[ReadAs, str] = {
    "prompt_completion": "questions with answers without a chat template, in training and held out",
    "messages": "in the chat template, in training and held out",
}
"""Reasons for `data.read_as`."""


def in_one_form(
    data: DataFacts, heldout: Mapping[str, Heldout], *, has_template: bool
) -> tuple[DataFacts, dict[str, Heldout]]:
    """Return records and held-out records (see `heldout.fitted`) with `read_as` where one of them
    are conversations and the other are not; `has_template` says that the tokenizer has one."""
    if not isinstance(data, SeparateFacts):
        parts, alike = parts_in_one_form({ALL: data}, heldout, has_template=has_template)
        return parts[ALL], alike
    parts, alike = parts_in_one_form(data.parts, heldout, has_template=has_template)
    return replace(data, parts=parts), alike


def parts_in_one_form(
    parts: Mapping[str, DataFacts], heldout: Mapping[str, Heldout], *, has_template: bool
) -> tuple[dict[str, DataFacts], dict[str, Heldout]]:
    """Return the same for the records of each site."""
    converse = has_template and all(part.is_conversation for part in parts.values())
    read = dict(parts)
    apart = dict(heldout)
    for name, own in heldout.items():
        part = parts[name]
        if own.facts.is_conversation == part.is_conversation:
            continue
        chats = part if part.is_conversation else own.facts
        wanted: ReadAs = "messages" if converse or not _one_turn(chats) else "prompt_completion"
        read[name] = replace(part, read_as=wanted)
        apart[name] = replace(own, facts=replace(own.facts, read_as=wanted))

    return read, apart


def _one_turn(facts: DataFacts) -> bool:
    """Return whether each conversation is one question with its answer."""
    contents = (record.content for record in facts.records())
    return all(isinstance(content, Chat) and is_one_turn(content) for content in contents)
