"""Blocks of values that look Gaussian: one quantiser step for all, and tables of N(0, 1) for the
entropy coder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from fluvial.codecs import compiled, entropy
from fluvial.errors import WireError
from fluvial.wire.frame import Reader

Doubles = NDArray[np.float64]
Reals = NDArray[np.float32] | NDArray[np.float64]
"""Values to code; those in fp32 are computed with as fp64, without a copy where loops are
compiled."""
Ints = NDArray[np.int64]
Levels = NDArray[np.int16]

OCTAVE = 1500
"""Codes of a step per factor of 2."""
_CLASS = 4
"""Classes of loudness (RMS over step) per factor of 2."""
_UNIT = 12
"""The class whose RMS is one step; class 0 is silent, class 1 almost so."""
_CLASSES = _UNIT + 6 * _CLASS + 1
_NUMBERS = np.arange(_CLASSES)
_LEVELS = 255
_TOTAL = 1 << 22
COARSEST = (1 << 24) // _CLASSES // 2 - 1
FINEST = -COARSEST
_FEW = 1 << 15
"""Values below which threads cost more time than they save."""
_PIECE = 1 << 16
"""Values that the entropy coder gets at a time, because it needs memory for each."""
_LARGEST_UNIT_FP32 = 2.0**80
"""Step below which sums of values stay within fp32: a value has at most 256 steps."""


@dataclass(frozen=True)
class Table:
    """The quantiser of values of one class of loudness; levels -limit to limit, in steps."""

    limit: int
    frequencies: entropy.Counts
    """Frequencies of the levels (2 limit + 1,)."""
    centroids: Doubles
    """Values that the levels stand for (2 limit + 1,), in steps."""

    @cached_property
    def model(self) -> Any:
        """The entropy coder's view of `frequencies`."""
        return entropy.model(self.frequencies)


@cache
def tables() -> tuple[Table, ...]:
    """Return the table of every class, for values of N(0, 1) rounded to whole steps; the silent
    class has level 0 only."""
    made = [Table(0, np.ones(1, dtype=np.int64), np.zeros(1))]
    for number in range(1, _CLASSES):
        sigma = 2.0 ** ((number - _UNIT) / _CLASS)
        limit = min(_LEVELS, int(16 * sigma) + 2)
        edges = np.append(np.arange(limit) + 0.5, np.inf) / sigma
        mass = ndtr(-edges[:-1]) - ndtr(-edges[1:])
        first = (
            sigma
            * (np.exp(-(edges[:-1] ** 2) / 2) - np.exp(-(edges[1:] ** 2) / 2))
            / np.sqrt(2 * np.pi)
        )
        lowest = np.arange(limit) + 0.5
        centres = np.divide(first, mass, out=lowest.copy(), where=mass > 1e-12).clip(
            lowest, lowest + 0.5
        )
        frequencies = np.rint(
            np.concatenate([mass[::-1], [1 - 2 * mass.sum()], mass]) * _TOTAL
        ).astype(np.int64)
        made.append(
            Table(limit, frequencies.clip(1), np.concatenate([-centres[::-1], [0.0], centres]))
        )

    return tuple(made)


@cache
def _costs() -> Doubles:
    """Return the bits of a magnitude, sign included (classes, 256)."""
    costs = np.zeros((_CLASSES, _LEVELS + 1))
    for row, table in zip(costs, tables(), strict=True):
        row[: table.limit + 1] = -np.log2(
            table.frequencies[table.limit :] / table.frequencies.sum()
        )

    return costs


@cache
def _rates() -> Doubles:
    """Return the bits of a value of N(0, 1), by class (classes,)."""
    rates = []
    for table in tables():
        share = table.frequencies / table.frequencies.sum()
        rates.append(-float((share * np.log2(share)).sum()))

    return np.array(rates)


class Blocks:
    """Codes blocks of zero-mean values that are about Gaussian, each of its own RMS, into a given
    number of bytes.

    Bytes: step (1/1500 octave) and the most usual class as one number (u24), and a stream: the
    class of every block, then the levels of each block that is not silent. No value decodes to more
    than twice itself, so coding contracts.
    """

    least: ClassVar[int] = 11
    """Bytes that suffice for silence, and one more for each block."""
    least_of_one: ClassVar[int] = 7
    """Bytes that suffice for silence of one block."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Set the number of values of each block."""
        self.sizes = np.array(sizes, dtype=np.int64)

    @cached_property
    def _ends(self) -> Ints:
        return cast(Ints, np.cumsum(self.sizes))

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        return list(zip(self.sizes.tolist(), self._ends.tolist(), strict=True))

    def encode(self, values: Reals, room: int) -> bytes:
        """Code `values` (sum of sizes,) into at most `room` bytes, with about the finest step that
        fits."""
        loudness = self.loudness(values)
        step = self.expected_step(loudness, room)
        excess = self.excess(values, step, room, loudness=loudness)

        if excess < 0:
            step += int(excess / self.slope(loudness, step))

        stride = 1
        while True:
            step = min(max(step, self.finest(loudness)), COARSEST)
            excess = self.excess(values, step, room, loudness=loudness)
            if excess <= 0 or step == COARSEST:
                data = self.encode_at(values, step, loudness=loudness)
                if len(data) <= room:
                    return data

            assert step < COARSEST, "silence fits, as the constructor of the codec checked"
            step += max(int(excess / self.slope(loudness, step)), stride)
            stride *= 2

    def encode_at(self, values: Reals, step: int, *, loudness: Doubles | None = None) -> bytes:
        """Code `values` with a given step, whatever bytes it takes; their `loudness` saves time."""
        classes, levels = self._quantise(values, step, loudness)
        centre = _centre(classes)
        head = ((step - FINEST) * _CLASSES + centre).to_bytes(3, "little")
        coded: list[tuple[NDArray[np.integer], Any]] = []

        if len(classes):
            coded.append((classes, entropy.model(_class_frequencies(centre))))

        for number, start, end in self._runs(classes):
            table = tables()[number]
            symbols = levels[start:end]
            symbols += np.int16(table.limit)
            coded.append((symbols, table.model))

        return head + entropy.encode_with(coded)

    def decoded(self, values: Reals, step: int) -> Doubles:
        """Return the values that `decode` makes of `encode_at`."""
        classes, levels = self._quantise(values, step, None)
        result = np.zeros(len(values))

        for number, start, end in self._runs(classes):
            table = tables()[number]
            result[start:end] = table.centroids.take(levels[start:end] + table.limit)

        result *= 2.0 ** (step / OCTAVE)
        return result

    def _runs(self, classes: Ints) -> list[tuple[int, int, int]]:
        """Return the class, start and end of all values that are not silent; neighbours of one
        class are one run, or several where they are more than a piece."""
        edges = np.concatenate([[0], np.flatnonzero(np.diff(classes)) + 1, [len(classes)]])
        bounds = np.concatenate([[0], self._ends])[edges]
        runs = zip(
            classes[edges[:-1]] if len(classes) else [], bounds[:-1], bounds[1:], strict=False
        )

        return [
            (int(number), piece, min(piece + _PIECE, int(end)))
            for number, start, end in runs
            if number
            for piece in range(int(start), int(end), _PIECE)
        ]

    def excess(
        self, values: Reals, step: int, room: int, *, loudness: Doubles | None = None
    ) -> float:
        """Return the bits by which `encode_at` goes beyond `room` bytes."""
        classes = self._classes(values, step, loudness)
        counts = self._counts(values, step, classes)
        frequencies = _class_frequencies(_centre(classes))
        side = -np.log2(frequencies[classes] / frequencies.sum()).sum()

        return float(counts @ _costs().ravel() + side) - 8 * (room - self.least + 4)

    def loudness(self, values: Reals) -> Doubles:
        """Return the log2 of the RMS of every block; -inf for silence."""
        pieces = ((values[end - n : end].astype(np.float64), n) for n, end in self._spans)
        power = np.array([float(piece @ piece) / n if n else 0.0 for piece, n in pieces])

        with np.errstate(divide="ignore"):
            return cast(Doubles, np.log2(power) / 2)

    def expected_step(self, loudness: Doubles, room: int) -> int:
        """Return the step at which Gaussian blocks take `room` bytes."""

        def fits(step: int) -> bool:
            return self.expected_excess(loudness, step, room) <= 0

        return lowest(fits, self.finest(loudness), COARSEST)

    def expected_excess(self, loudness: Doubles, step: int, room: int) -> float:
        """Return the bits by which Gaussian blocks go beyond `room` bytes."""
        return self._expected(loudness, step) - 8 * (room - self.least + 4)

    def slope(self, loudness: Doubles, step: int) -> float:
        """Return the bits that one code of the step is worth to Gaussian blocks."""
        half = OCTAVE // 16
        return max(
            self._expected(loudness, step - half) - self._expected(loudness, step + half), 1.0
        ) / (2 * half)

    def decode(self, reader: Reader, *, fp32: bool = False) -> Reals:
        """Return the values that `encode` coded, read to the end, in fp64; with `fp32`, in fp32
        unless sums of them would end where fp32 ends. Raises `WireError`."""
        step, centre = divmod(int.from_bytes(reader.take(3), "little"), _CLASSES)
        step += FINEST

        if step > COARSEST:
            raise WireError(f"frame: step {step}; the coarsest is {COARSEST}")

        stream = entropy.Stream(reader.take(reader.left))
        classes = stream.take(_class_frequencies(centre), len(self.sizes))
        unit = 2.0 ** (step / OCTAVE)
        narrow = fp32 and unit < _LARGEST_UNIT_FP32
        kind = np.float32 if narrow else np.float64
        values = cast(Reals, np.zeros(int(self.sizes.sum()), kind))

        for number, start, end in self._runs(classes.astype(np.int64)):
            table = tables()[number]
            levels = (table.centroids * unit).astype(values.dtype)
            values[start:end] = levels.take(stream.take_with(table.model, end - start))

        stream.finish()
        return values

    def _expected(self, loudness: Doubles, step: int) -> float:
        """Return the bits of Gaussian blocks."""
        rates = np.interp(_CLASS * (loudness - step / OCTAVE) + _UNIT, _NUMBERS, _rates())
        return float(self.sizes @ rates) + 3 * len(self.sizes)

    def finest(self, loudness: Doubles) -> int:
        """Return the finest step: the loudest block just has a class."""
        loudest = loudness.max(initial=-np.inf)
        if not np.isfinite(loudest):
            return COARSEST - 1
        return int(np.clip(np.ceil((loudest - 6) * OCTAVE), FINEST, COARSEST - 1))

    def _classes(self, values: Reals, step: int, loudness: Doubles | None) -> Ints:
        """Return the class of every block."""
        loudness = self.loudness(values) if loudness is None else loudness
        position = np.maximum(_CLASS * (loudness - step / OCTAVE) + _UNIT, 0)
        return np.minimum(np.rint(position), _CLASSES - 1).astype(np.int64)

    def _quantise(self, values: Reals, step: int, loudness: Doubles | None) -> tuple[Ints, Levels]:
        """Return the class of every block, level of every value."""
        classes = self._classes(values, step, loudness)
        return classes, self._levels(values, step, classes)

    def _levels(self, values: Reals, step: int, classes: Ints) -> Levels:
        """Return the level of every value."""
        factor = 2.0 ** (-step / OCTAVE)
        limits = _limits()[classes]

        if compiled.available():
            from fluvial.codecs import gaussian_compiled

            made = np.empty(len(values), np.int16)

            def quantise(blocks: slice, here: slice, ends: Ints) -> None:
                gaussian_compiled.quantise(values[here], factor, limits[blocks], ends, made[here])

            self._over_cores(quantise)
            return made

        limits = np.repeat(limits, self.sizes)
        levels: Doubles = values.astype(np.float64)
        levels *= factor
        np.rint(levels, out=levels)
        np.minimum(levels, limits, out=levels)
        np.maximum(levels, np.negative(limits, out=limits), out=levels)

        return levels.astype(np.int16)

    def _over_cores(self, work: Callable[[slice, slice, Ints], None]) -> None:
        """Call `work` with the blocks, the values and the ends of the blocks among these, for a
        share on each core; for all at once where there are few values."""

        def share(start: int, stop: int) -> None:
            first = int(self._ends[start] - self.sizes[start])
            here = slice(first, int(self._ends[stop - 1]))
            work(slice(start, stop), here, self._ends[start:stop] - first)

        if self.sizes.sum() >= _FEW:
            compiled.over_cores(share, len(self.sizes))
        elif len(self.sizes):
            share(0, len(self.sizes))

    def _counts(self, values: Reals, step: int, classes: Ints) -> Ints:
        """Return how often each magnitude of each class occurs (classes * 256,)."""
        if compiled.available():
            from fluvial.codecs import gaussian_compiled

            factor = 2.0 ** (-step / OCTAVE)
            limits = _limits()[classes]
            shares: list[Ints] = []

            def count(blocks: slice, here: slice, ends: Ints) -> None:
                counts = np.zeros((_CLASSES, _LEVELS + 1), np.int64)
                gaussian_compiled.count(
                    values[here], factor, limits[blocks], ends, classes[blocks], counts
                )
                shares.append(counts)

            self._over_cores(count)
            return sum(shares, start=np.zeros((_CLASSES, _LEVELS + 1), np.int64)).ravel()

        cells = np.repeat((classes * (_LEVELS + 1)).astype(np.int32), self.sizes)
        cells += np.abs(self._levels(values, step, classes))
        return np.bincount(cells, minlength=_costs().size)


def lowest(fits: Callable[[int], bool], low: int, high: int, close: int = 1) -> int:
    """Return the lowest step above `low` that `fits`, or one at most `close` above it; `high` if
    there is none."""
    while high - low > close:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)

    return high


@cache
def _limits() -> Doubles:
    """Return the largest level of every class."""
    return np.array([table.limit for table in tables()], dtype=np.float64)


def _centre(classes: Ints) -> int:
    return int(np.bincount(classes, minlength=1).argmax())


def _class_frequencies(centre: int) -> entropy.Counts:
    """Return the frequencies of the classes: half as often with each class away from `centre`."""
    return (1 << 12 >> np.abs(np.arange(_CLASSES) - centre).clip(max=12)) + 8
