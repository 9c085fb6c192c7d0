"""Records of sites, and held-out records, that are read in the same form."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fluvial.data.forms import WORDED
from fluvial.data.read_as import ReadAs, form_read, is_one_turn
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
    """Return records and held-out records (see `heldout.fitted`) with `read_as` where some of them
    are conversations and others are not; `has_template` says that the tokenizer has one."""
    if not isinstance(data, SeparateFacts):
        parts, alike = parts_in_one_form({ALL: data}, heldout, has_template=has_template)
        return parts[ALL], alike
    parts, alike = parts_in_one_form(data.parts, heldout, has_template=has_template)
    return replace(data, parts=parts), alike


def parts_in_one_form(
    parts: Mapping[str, DataFacts], heldout: Mapping[str, Heldout], *, has_template: bool
) -> tuple[dict[str, DataFacts], dict[str, Heldout]]:
    """Return the same for the records of each site, all in one form where sites have several."""
    common = _common([*parts.values()], [own.facts for own in heldout.values()])
    converse = has_template and all(part.is_conversation for part in parts.values())
    read = dict(parts)
    apart = dict(heldout)
    for name, part in parts.items():
        both = [part, *([heldout[name].facts] if name in heldout else [])]
        wanted = common or _wanted(both, converse=converse)
        if wanted is None or all(form_read(each.form, wanted) == each.form for each in both):
            continue
        read[name] = replace(part, read_as=wanted)
        if name in heldout:
            facts = replace(heldout[name].facts, read_as=wanted)
            apart[name] = replace(heldout[name], facts=facts)

    return read, apart


def _wanted(both: Sequence[DataFacts], *, converse: bool) -> ReadAs | None:
    """Return the form in which records and held-out records of a site are read where one of them
    are conversations and the other are not; `converse` prefers these."""
    chats = [facts for facts in both if facts.is_conversation]
    if len(chats) in (0, len(both)):
        return None
    return "messages" if converse or not _one_turn(chats[0]) else "prompt_completion"


def _common(parts: Sequence[DataFacts], heldout: Sequence[DataFacts]) -> ReadAs | None:
    """Return the form in which the records of sites are read where some sites have conversations,
    and others questions with answers; None where they have one form, or a text."""
    forms = {"chat" if part.is_conversation else part.form for part in parts}
    if len(forms) < 2 or not forms > {"chat"} or "text" in forms:
        return None
    chats = [facts for facts in (*parts, *heldout) if facts.is_conversation]
    plain = not forms & WORDED and all(map(_one_turn, chats))
    return "prompt_completion" if plain else "messages"


def _one_turn(facts: DataFacts) -> bool:
    """Return whether each conversation is one question with its answer."""
    contents = (record.content for record in facts.records())
    return all(isinstance(content, Chat) and is_one_turn(content) for content in contents)
