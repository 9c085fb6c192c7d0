"""Rate control of `klt_trellis`: which profile of variances, and how faint the faintest class
is."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from fluvial.codecs.klt.tables import Doubles
from fluvial.codecs.rotated.trellis import rotate

Ints = NDArray[np.int64]

OCTAVE = 8
"""Codes of a class per factor of 2."""
SILENT = 255
"""Level of a group that is zero."""
FAINT = 24
"""Values that a bit serves on average, at most."""
FAINTEST = 32
"""Values that a bit serves where bits are fewest, before rounding."""
NOTHING = -(1 << 20)
"""Class of a cell without coefficients."""


def best_layout(
    profiles: Iterable[Ints],
    counts: NDArray[np.integer],
    energies: Doubles,
    *,
    room_bits: int,
    most_bits: int,
) -> tuple[int, int]:
    """Return the profile and the floor (1/8 octave) that leave the least error.

    `profiles` are the classes (groups, cells) that each profile gives; of the coefficients in every
    cell there are `counts` with `energies` (groups, cells). A value gets at most `most_bits`.
    """
    largest_gain = 0.0
    layout = 0, 0

    for profile, classes in enumerate(profiles):
        loudest = int(classes.max())
        if loudest == NOTHING:
            break

        below = np.where(classes > NOTHING, loudest - classes, SILENT + 1)
        below = below.clip(max=SILENT + 1).ravel()
        available = np.bincount(below, counts.ravel(), SILENT + 2)[: SILENT + 1]
        total = np.minimum(np.cumsum(available), FAINT * room_bits)
        used = np.flatnonzero(np.diff(total, prepend=0))
        total = total[used]
        count = np.diff(total, prepend=0)  # of every class, loudest first
        energy = np.bincount(below, energies.ravel(), SILENT + 2)[used] * count / available[used]

        # Reverse water-filling over the first 1, 2, ... classes: (floors, classes).
        level = (np.cumsum(-used * count) - OCTAVE * room_bits) / total
        rate = (-used - level[:, None]) / OCTAVE
        sent = (np.arange(len(used)) <= np.arange(len(used))[:, None]) & (rate > 0)
        square = np.where(sent, 1 - 4.0 ** -worth(rate.clip(0, most_bits)), 0)

        foreseen = count * 4.0 ** ((loudest - used) / OCTAVE)
        gain = (square @ np.sqrt(energy * foreseen)) ** 2 / np.maximum(square @ foreseen, 1e-30)
        gain[np.diagonal(rate) < 1 / FAINTEST] = 0
        choice = int(gain.argmax())

        if gain[choice] > largest_gain:
            largest_gain = float(gain[choice])
            layout = profile, int(used[choice])

    return layout


def worth(bits: Doubles) -> Doubles:
    """Return what `bits` for a value are worth on the trellis; measured on Gaussian numbers, with a
    memory of 10."""
    effective: Doubles = np.maximum(0.9 * bits - 0.008, 0)
    return effective


def rotated(values: Doubles, classes: Ints, *, back: bool = False) -> Doubles:
    """Return `values` (n,) with those of every class behind one fixed rotation, so that none stands
    out."""
    pieces = np.split(values, np.flatnonzero(np.diff(classes)) + 1)
    turned = [
        rotate(torch.from_numpy(piece), number, back=back).numpy()
        for number, piece in enumerate(pieces)
    ]

    return np.concatenate(turned)


def water_level(variance: Doubles, counts: NDArray[np.integer], bits: int) -> float:
    """Return the error of every value that is worth bits, by reverse water-filling."""
    order = np.argsort(-variance, axis=None)
    order = order[counts.ravel()[order] > 0]
    logs = np.log2(variance.ravel()[order])
    number = counts.ravel()[order]
    level = (np.cumsum(logs * number) - 2 * bits) / np.cumsum(number)

    return float(2.0 ** level[np.flatnonzero(level < logs)[-1]])


def loudness(powers: Doubles) -> tuple[int, Ints]:
    """Code of the loudest group's RMS, and how far below it each group is."""
    if not powers.any():
        return 0, np.full(len(powers), SILENT, dtype=np.int64)
    codes = OCTAVE / 2 * np.log2(np.maximum(powers, 1e-300))
    top = round(codes.max())
    return top, np.where(powers > 0, np.rint(top - codes).clip(0, SILENT), SILENT).astype(np.int64)
