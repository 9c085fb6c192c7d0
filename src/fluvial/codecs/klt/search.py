"""Rate control of `klt`: the search for the finest step whose frame is within the budget."""

import math

from fluvial.codecs.klt.encoder import Encoder
from fluvial.codecs.klt.settings import FINE, LOUD, MAX_STEP, QUIET

_STICKY = 8
"""Codes that `loud` may be off before the search starts again from there."""


def best_body(
    encoder: Encoder, *, room_bytes: int, room_bits: float, seed: int, epoch: int
) -> bytes:
    """Return the body with the finest step within `room_bytes`.

    `room_bits` is what the levels may take, by the tables.
    """
    step = finest_step(encoder, room_bits)
    while step <= MAX_STEP:
        body = encoder.write(step, seed, epoch=epoch)
        if len(body) <= room_bytes:
            return body
        step += 1

    encoder.silence()  # only with variances that no `fit` has published
    return encoder.write(0, seed, epoch=epoch)


def finest_step(encoder: Encoder, room_bits: float) -> int:
    """Return the finest step, in 1/256 octave, whose levels take at most `room_bits`.

    Expected bits give a first guess, exact bits of a few trials the rest. More than `MAX_STEP` if
    no step fits.
    """
    if encoder.is_silent:
        return 0

    codes, slope = _guess(encoder, room_bits)
    first = min(max(round(FINE * (encoder.top - codes)), -MAX_STEP), MAX_STEP)
    best = _search_from(encoder, first, room_bits, slope, strides=False)
    if best is None:  # bits of clipped values led far beyond every step that fits
        best = _search_from(encoder, first, room_bits, slope, strides=True)
    if best is None:
        return MAX_STEP + 1

    encoder.loud = best[1]
    return best[0]


def _search_from(
    encoder: Encoder, step: int, room_bits: float, slope: float, *, strides: bool
) -> tuple[int, int] | None:
    """Return the finest step that fits and its `loud`, sought from `step`; None if there is none.

    With `strides`, the search goes on at most `_STICKY` codes coarser, wherever it ended.
    """
    best: tuple[int, int] | None = None

    for _ in range(QUIET, LOUD, _STICKY):
        encoder.settle(step)
        begun = step
        fits, step = _search_at(encoder, step, room_bits, slope)
        if strides and fits is None:
            step = min(step, begun + FINE * _STICKY)
        if fits is not None:
            again = best is None and encoder.loud - encoder.top + step / FINE < -_STICKY
            best = (fits, encoder.loud)
            if not again:
                break
        elif best is not None:
            break

    return best


def _search_at(
    encoder: Encoder, step: int, room_bits: float, slope: float
) -> tuple[int | None, int]:
    """Search while what is coded at all stays, so that bits fall steadily with the step; return the
    finest step that fits and the last step tried.

    None if the step must be so much coarser that less should be coded.
    """
    if encoder.sum_bits(encoder.order.zero_bits, encoder.loud) > room_bits:
        return None, step + FINE * _STICKY

    fits = None
    fails = -MAX_STEP - 1
    before: tuple[int, float] | None = None

    for _ in range(16):
        if step / FINE > encoder.top - encoder.loud + _STICKY or step > MAX_STEP:
            return None, min(step, MAX_STEP)

        bits = encoder.bits(step)
        if bits <= room_bits:
            fits = step
        else:
            fails = step

        if 0.997 * room_bits - 16 <= bits <= room_bits or (fits is not None and fits - fails <= 1):
            break
        if before is not None and before[0] != step and before[1] != bits:
            slope = max((before[1] - bits) / (step - before[0]), slope / 4)

        before = step, bits
        step = max(step + math.ceil((bits - 0.998 * room_bits) / slope), fails + 1)
        step = step if fits is None else min(step, fits - 1)

    return fits, step if fits is None else fits


def _guess(encoder: Encoder, room_bits: float) -> tuple[float, float]:
    """Return where the loudest group stands above the step, in codes, to take `room_bits` bits, and
    bits per unit of step."""

    def expected(loud: int) -> float:
        return encoder.sum_bits(encoder.tables.expected_bits, loud)

    quiet = QUIET
    loud = LOUD
    while loud - quiet > 1:
        middle = (quiet + loud) // 2
        quiet, loud = (quiet, middle) if expected(middle) > room_bits else (middle, loud)

    below = expected(quiet)
    above = expected(loud)
    share = min(max((room_bits - below) / max(above - below, 1e-9), 0), 1)

    if (
        above > 1.1 * room_bits
    ):  # many coefficients are of one variance; better none than all of them
        share = 0.0

    rise = (expected(quiet + 2) - expected(quiet - 2)) / 4
    return quiet + share, max(rise, 1.0) / FINE
