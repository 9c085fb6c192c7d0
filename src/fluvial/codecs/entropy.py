"""Entropy coding of small-alphabet symbols with known frequencies: ANS, by `constriction`.

One stream holds several parts, each with its own table of frequencies, and is read in the order in
which it was written. Tables are whole numbers, so that they travel as uint16 and both ends have the
same model.
"""

from collections.abc import Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from fluvial.errors import WireError

Counts = NDArray[np.integer]
"""Frequencies of symbols 0, 1, ...; whole numbers >= 0, not all zero."""

UNIT = 1 << 16
"""Sum of the two frequencies of a mask."""


def frequencies(symbols: NDArray[np.integer], size: int) -> NDArray[np.uint16]:
    """Return how often each of `size` symbols occurs, scaled to fit uint16; what occurs at all
    keeps at least 1."""
    counts = np.bincount(symbols, minlength=size)
    assert len(counts) == size, "symbol outside the alphabet"

    if counts.max() < UNIT:
        return counts.astype(np.uint16)

    scaled = counts * (UNIT - 1) // counts.max()
    return np.where(counts > 0, np.maximum(scaled, 1), 0).astype(np.uint16)


def densities(kept: NDArray[np.integer], sizes: NDArray[np.integer]) -> NDArray[np.uint16]:
    """Return the frequency of ones, in 1 / 2^16, for masks of `sizes` values with `kept` ones;
    neither 0 nor 2^16."""
    return np.clip(np.rint(UNIT * kept / sizes), 1, UNIT - 1).astype(np.uint16)


def mask_counts(ones: int) -> Counts:
    """Return the frequencies of zero and one for one of `densities`, 1 to 2^16 - 1."""
    return np.array([UNIT - ones, ones])


def mask_bits(kept: NDArray[np.integer], sizes: NDArray[np.integer]) -> float:
    """Return the bits that masks of `sizes` with `kept` ones take; a mask without ones is not sent
    and takes none."""
    used = kept > 0
    kept = kept[used]
    sizes = sizes[used]
    share = densities(kept, sizes) / UNIT

    return -float((kept * np.log2(share) + (sizes - kept) * np.log2(1 - share)).sum())


def encode(parts: Sequence[tuple[NDArray[np.integer], Counts]]) -> bytes:
    """Return one stream of all parts (symbols, frequencies); whole 32-bit words, about 4 bytes
    above the entropy."""
    return encode_with(
        [(symbols, model(counts)) for symbols, counts in parts if len(symbols) and len(counts) > 1]
    )


def encode_with(parts: Sequence[tuple[NDArray[np.integer], Any]]) -> bytes:
    """Encode one stream of all parts (symbols, model) with tables that `model` made; no part is
    empty."""
    coder = constriction.stream.stack.AnsCoder()
    for symbols, table in reversed(parts):
        coder.encode_reverse(np.ascontiguousarray(symbols, dtype=np.int32), table)
    return np.asarray(coder.get_compressed()).astype("<u4").tobytes()


class Stream:
    """Reads what `encode` wrote. Damaged bytes give `WireError` or as many, but wrong, symbols."""

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise WireError(
                f"frame: entropy-coded stream of {len(data)} bytes is not whole 32-bit words"
            )

        words = np.frombuffer(data, dtype="<u4").astype(np.uint32)
        if len(words) and words[-1] == 0:
            raise WireError("frame: entropy-coded stream ends in a zero word")

        self._coder = constriction.stream.stack.AnsCoder(words)

    def take(self, counts: Counts, number: int) -> NDArray[np.int32]:
        """Return the next `number` symbols, coded with these frequencies; allocates O(number)."""
        if number and not counts.any():
            raise WireError(f"frame: {number} symbols without frequencies")
        if number == 0 or len(counts) == 1:
            return np.zeros(number, dtype=np.int32)
        return self.take_with(model(counts), number)

    def take_with(self, table: Any, number: int) -> NDArray[np.int32]:
        """Return the next `number` symbols, coded with a table that `model` made; allocates
        O(number)."""
        try:
            return np.asarray(self._coder.decode(table, number), dtype=np.int32)
        except BaseException as error:
            # A panic of the Rust side derives from BaseException and has no importable name.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise WireError(f"frame: entropy-coded stream is damaged: {error}") from None
            raise

    def finish(self) -> None:
        """Raise `WireError` unless the stream is used up; a damaged one nearly always is not."""
        if not self._coder.is_empty():
            raise WireError("frame: entropy-coded stream is damaged or longer than its symbols")


def model(counts: Counts) -> Any:
    """Return the coder's table for at least two frequencies: symbol s has one share of 2^24, and
    its part of the rest.

    With n frequencies of sum T it starts at s + floor((2^24 - n) / T * (sum of those before s)), in
    fp64 and in this order; sums of whole numbers are exact, so that every machine has the same
    table.
    """
    return constriction.stream.model.Categorical(counts.astype(np.float64), perfect=False)
