"""Records as they are learned: plain text, prompts with answers, conversations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    joined: bool = False
    """True where prompt and answer are encoded as one text, as choices are scored."""


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
