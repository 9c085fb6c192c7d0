"""Kinds of records, as they are asked: conversations, prompts with completions, plain text."""

from collections import Counter
from collections.abc import Iterable

from fluvial.data.records import Chat, Record, Text

CHAT = "conversation"
PROMPT = "prompt and completion"
TEXT = "plain text"


def commonest(records: Iterable[Record]) -> str:
    """Return the kind of most records: `CHAT`, `PROMPT` or `TEXT`."""
    kinds = {Text: TEXT, Chat: CHAT}
    counts = Counter(kinds.get(type(record.content), PROMPT) for record in records)
    return max(counts, key=lambda kind: (counts[kind], kind))
