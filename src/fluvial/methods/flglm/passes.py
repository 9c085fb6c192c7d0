"""Passes of B over rows of real tokens: of all sequences together, or of those of like length."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluvial.codecs.activations.rows import pack, unpack
from fluvial.models.split import Part
from fluvial.seeds import derive

PASS_TOKENS = 128
"""Tokens of padding that cost as much as a further pass does on a CPU. Measured on one core: about
130 for the embedded model, and about 20 for layers of width 512."""


def pass_rows(part: Part, rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return B's hidden states of A's `rows`, both (tokens, width); `lengths` are of sequences."""
    counts = torch.tensor(lengths, device=part.device)
    before, mask = unpack(rows, counts, max(lengths), "right")
    return pack(part.middle(before, mask), mask)


def length_groups(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return the places of sequences that share a pass, the longest sequences first.

    A new group begins where the sequences that are left would have more than `PASS_TOKENS` of
    padding in the present one that they do not have in theirs. Other devices than a CPU have
    all in one pass, because they are as fast with some padding as without.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    if device.type != "cpu":
        return [list(range(len(lengths)))]

    groups: list[list[int]] = []
    for number, place in enumerate(order):
        left = len(order) - number
        if groups and (lengths[groups[-1][0]] - lengths[place]) * left <= PASS_TOKENS:
            groups[-1].append(place)
        else:
            groups.append([place])

    return [sorted(group) for group in groups]


def pass_groups(
    part: Part, rows: Tensor, lengths: Sequence[int], groups: Sequence[list[int]], seed: int
) -> Tensor:
    """Return B's hidden states of A's `rows`, both (tokens, width), made group by group.

    `lengths` are those of all sequences. The masks of dropout follow from `seed` and from the
    number of the group.
    """
    pieces = torch.split(rows, list(lengths))
    made = list(pieces)

    for number, group in enumerate(groups):
        part.reseed_dropout(derive(seed, number) if number else seed)
        inside = [lengths[place] for place in group]
        hidden = pass_rows(part, torch.cat([pieces[place] for place in group]), inside)
        for place, piece in zip(group, torch.split(hidden, inside), strict=True):
            made[place] = piece

    return torch.cat(made)
