"""Packing: short records share a sequence, and none of them reads another.

A packed sequence knows the lengths of its records. Positions begin again with each record,
attention stays within it (see `training.train.collate`), and its first token is not predicted.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from fluvial.data.examples import IGNORE_INDEX, Example


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Return sequences of at most `max_length` tokens that hold all `examples`, none of them cut.

    The longest is placed first, each where it leaves the least room: best-fit decreasing, as TRL's
    "bfd".
    """
    order = sorted(examples, key=lambda example: -len(example.input_ids))
    sequences: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []
    """Free tokens and number of each sequence that has some, in this order."""

    for example in order:
        length = len(example.input_ids)
        place = bisect_left(rooms, (length, 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
            sequences[number].append(example)
        else:
            room, number = max_length, len(sequences)
            sequences.append([example])

        if room > length:
            insort(rooms, (room - length, number))

    return [_joined(sequence) for sequence in sequences]


def _joined(examples: Sequence[Example]) -> Example:
    """Return one sequence of `examples`; what stands before a record does not predict it."""
    ids = [token for example in examples for token in example.input_ids]
    labels = [label for example in examples for label in (IGNORE_INDEX, *list(example.labels)[1:])]
    return Example(ids, labels, tuple(len(example.input_ids) for example in examples))
