"""Training sequences: token ids and labels, and their cuts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

IGNORE_INDEX = -100
"""Label of a position without loss (PyTorch's and Hugging Face's convention)."""

Overlong = Literal["cut", "shorten_prompt", "drop", "refuse"]


@dataclass(frozen=True)
class Example:
    """One training sequence; each label is its input id or `IGNORE_INDEX` (unshifted)."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    lengths: tuple[int, ...] = ()
    """Lengths of the records that share the sequence, none of which reads another; empty for a
    sequence that is not packed."""

    @property
    def label_tokens(self) -> int:
        """Labels that are predicted: all but the first, which has no token before it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])

    @property
    def learns(self) -> bool:
        """True if a position is predicted."""
        return self.label_tokens > 0

    def cut(self, start: int, end: int | None = None) -> "Example":
        """Return the positions from `start` to `end`."""
        stop = len(self.input_ids) if end is None else end
        ends = list(accumulate(self.lengths))
        kept = [
            min(last, stop) - max(last - length, start)
            for last, length in zip(ends, self.lengths, strict=True)
        ]
        lengths = tuple(length for length in kept if length > 0)
        return Example(self.input_ids[start:end], self.labels[start:end], lengths)


@dataclass(frozen=True)
class Question:
    """A prompt with the expected greedy answer."""

    prompt: str
    answer: str
    references: tuple[str, ...] = ()
    """Further answers that are right."""
    prompt_ids: tuple[int, ...] = ()
    """Tokens of a prompt that a chat template wrote; empty for any other."""

    @property
    def asked(self) -> str | tuple[int, ...]:
        """Return the prompt as a model is given it."""
        return self.prompt_ids or self.prompt


def windows(example: Example, length: int) -> list[Example]:
    """Return consecutive windows of `length` tokens; those without a label to predict are
    dropped."""
    starts = range(0, len(example.input_ids), length)
    parts = [example.cut(start, start + length) for start in starts]
    return [part for part in parts if part.learns]


def without_beginning(example: Example, surplus: int, first: int) -> Example:
    """Return `example` without `surplus` tokens after its `first` ones, as far as they carry no
    loss.

    One token before the first label stays, since a label needs something before it.
    """
    labelled = (place for place, label in enumerate(example.labels) if label != IGNORE_INDEX)
    free = next(labelled, 0) - 1 - first
    taken = min(surplus, max(0, free))
    ids = list(example.input_ids)
    labels = list(example.labels)

    return Example(ids[:first] + ids[first + taken :], labels[:first] + labels[first + taken :])
