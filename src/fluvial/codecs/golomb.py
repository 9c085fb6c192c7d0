"""Some values of an update and where they are: Golomb-coded gaps, and 16 bits for each value.

Golomb, "Run-length encodings", IEEE Transactions on Information Theory, 1966; the parameter is that
of Gallager and van Voorhis (1975). The bits of a code word lie in three places (first bits of all
remainders, last bits of those that have one, all quotients), which changes no length and lets NumPy
read them at once.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from fluvial.codecs.quantise import Floats, bf16, from_bf16
from fluvial.errors import WireError
from fluvial.wire.frame import OVERHEAD, Reader, seal, unseal
from fluvial.wire.tensors import Layout

Indices = NDArray[np.int64]
Bits = NDArray[np.uint8]
Values = Literal["fp16", "bf16", "fp32"]
"""Form in which a value is sent; fp16 ends at 65504 and is coarse below 6e-5."""

_FP16_MAX = float(np.finfo(np.float16).max)
_FP32_MAX = float(np.finfo(np.float32).max)


def parameter(count: int, total: int) -> int:
    """Return the best Golomb parameter for `count` random positions of `total`, 1 <= count <=
    total.

    ceil(log(2 - p) / -log(1 - p)), to first order in p = count / total; both ends get the same
    number, because nothing but exact operations and one division is in it.
    """
    return max(1, math.ceil(0.6931 * (total / count) - 0.8466))


def encode(groups: Sequence[tuple[Indices, int]]) -> bytes:
    """Return the bytes for groups of (rising positions, total); of more than half of a total, the
    absent ones are coded."""
    bits = [piece for where, total in groups for piece in _write(where, total)]
    return np.packbits(np.concatenate([np.zeros(0, np.uint8), *bits])).tobytes()


def decode(data: bytes, groups: Sequence[tuple[int, int]]) -> list[Indices]:
    """Invert `encode` for groups of (count, total), each count <= total; raises `WireError`.

    Allocates O(total) bytes for each group.
    """
    if 8 * len(data) > sum(_most_bits(count, total) for count, total in groups) + 7:
        raise WireError(f"frame: {len(data)} bytes of positions are more than there can be")

    bits = _Bits(np.unpackbits(np.frombuffer(data, dtype=np.uint8)))
    groups_read = []
    for count, total in groups:
        coded = min(count, total - count)
        where = _read(bits, coded, total) if coded else np.zeros(0, dtype=np.int64)
        if 2 * count > total:
            mask = np.ones(total, dtype=bool)
            mask[where] = False
            where = np.flatnonzero(mask)

        groups_read.append(where)

    bits.finish()
    return groups_read


def to_wire(values: NDArray[np.floating], kind: Values) -> bytes:
    """Write `values` as `kind`, little endian, rounded to nearest; beyond the range the largest
    number."""
    if kind == "bf16":
        return bf16(values).astype("<u2").tobytes()
    limit, form = (_FP16_MAX, "<f2") if kind == "fp16" else (_FP32_MAX, "<f4")
    clipped: Floats = np.clip(values, -limit, limit)
    return clipped.astype(form).tobytes()


def rounded(values: NDArray[np.floating], kind: Values) -> Floats:
    """Return `values` as the other end will see them."""
    wire = to_wire(values, kind)
    return _from_wire(Reader(wire), len(values), kind)


def largest(magnitudes: NDArray[np.floating], count: int) -> Indices:
    """Return the positions of the `count` largest magnitudes, rising; those of magnitude 0 are left
    out."""
    count = min(count, int(np.count_nonzero(magnitudes)))
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    return cast(Indices, np.sort(np.argpartition(-magnitudes, count - 1)[:count]).astype(np.int64))


class SparseFrames:
    """Frames with some of the values `start` to `stop` of a flattened update.

    Body: how many values there are of each tensor, the values, then their positions in each tensor.
    """

    code: ClassVar[int] = 32

    def __init__(
        self, layout: Layout, kind: Values, start: int = 0, stop: int | None = None
    ) -> None:
        self.start = start
        self.stop = layout.numel if stop is None else stop
        self._kind = kind
        ends = np.clip(np.cumsum((0, *layout.sizes)), self.start, self.stop) - self.start
        self._ends: Indices = np.unique(ends).astype(
            np.int64
        )  # without tensors outside of the slice
        self._counts = "u2" if np.diff(self._ends).max(initial=0) < 2**16 else "u4"
        self._fingerprint = zlib.crc32(
            repr((layout.fingerprint, self.start, self.stop, kind)).encode()
        )

    def sizes(self, fewest: int, most: int) -> tuple[int, int]:
        """Return the least and the most bytes of a frame with `fewest` to `most` values.

        The length of the positions depends on where the values are: 1.25 bits for each value of the
        update at most, which Golomb codes reach with parameter 2.
        """
        sizes = np.diff(self._ends)
        head = OVERHEAD + len(sizes) * np.dtype(self._counts).itemsize
        width = 4 if self._kind == "fp32" else 2
        positions = math.ceil(1.25 * int(sizes.sum()) / 8) if most else 0
        return head + width * fewest, head + width * most + positions

    def encode(self, vector: Floats, where: Indices, *, round: int) -> bytes:
        """Return the frame with `vector[where]`; vector (stop - start,) is finite, the positions
        rise."""
        assert bool(np.isfinite(vector).all()), "values that are NaN or Inf must not be sent"
        pieces = np.split(where, np.searchsorted(where, self._ends[1:-1]))
        counts = np.array([len(piece) for piece in pieces]).astype(f"<{self._counts}").tobytes()
        spans = zip(pieces, self._ends[:-1], np.diff(self._ends), strict=True)
        places = encode([(piece - begin, int(size)) for piece, begin, size in spans])

        return seal(
            self.code,
            self._fingerprint,
            counts + to_wire(vector[where], self._kind) + places,
            round=round,
        )

    def decode(self, wire: bytes, *, round: int) -> tuple[Indices, Floats]:
        """Return the positions and values of a frame of `round`; raises `WireError`."""
        reader = unseal(wire, self.code, self._fingerprint, round=round)
        sizes = np.diff(self._ends)
        counts = reader.array(self._counts, len(sizes)).astype(np.int64)

        if bool((counts > sizes).any()):
            raise WireError("frame: more values than the tensor has")

        values = _from_wire(reader, int(counts.sum()), self._kind)
        if not bool(np.isfinite(values).all()):
            raise WireError("frame: decodes to NaN or Inf")

        groups = [(int(count), int(size)) for count, size in zip(counts, sizes, strict=True)]
        pieces = decode(reader.take(reader.left), groups)
        return np.concatenate(
            [piece + begin for piece, begin in zip(pieces, self._ends[:-1], strict=True)]
        ), values

    def decode_dense(self, wire: bytes, *, round: int) -> Floats:
        """Return the whole slice (stop - start,), zero where nothing was sent; raises
        `WireError`."""
        where, values = self.decode(wire, round=round)
        vector = np.zeros(self.stop - self.start, dtype=np.float32)
        vector[where] = values
        return vector


def _from_wire(reader: Reader, count: int, kind: Values) -> Floats:
    if kind == "bf16":
        return from_bf16(reader.array("u2", count))
    return cast(Floats, reader.array("f2" if kind == "fp16" else "f4", count).astype(np.float32))


class _Bits:
    """Reads bits from front to back."""

    def __init__(self, bits: Bits) -> None:
        self._bits = bits
        self._position = 0

    def take(self, count: int) -> Bits:
        if count > len(self._bits) - self._position:
            raise WireError("frame: positions end too early")
        self._position += count
        return self._bits[self._position - count : self._position]

    def unary(self, count: int, most: int) -> Indices:
        """Return `count` runs of ones, each closed by a zero; all together at most `most` ones."""
        ahead = self._bits[self._position : self._position + count + most]
        zeros = np.flatnonzero(ahead == 0)[:count]

        if len(zeros) < count:
            raise WireError("frame: positions end too early, or leave the tensor")
        self._position += int(zeros[-1]) + 1
        return cast(Indices, np.diff(zeros, prepend=-1) - 1)

    def finish(self) -> None:
        if len(self._bits) - self._position > 7 or self._bits[self._position :].any():
            raise WireError("frame: more positions than values")


def _most_bits(count: int, total: int) -> int:
    coded = min(count, total - count)
    if coded == 0:
        return 0
    m = parameter(coded, total)
    return coded * (1 + (m - 1).bit_length()) + total // m


def _write(where: Indices, total: int) -> Iterator[Bits]:
    if 2 * len(where) > total:
        absent = np.ones(total, dtype=bool)
        absent[where] = False
        where = np.flatnonzero(absent)

    if not len(where):
        return

    m = parameter(len(where), total)
    quotients, remainders = np.divmod(np.diff(where, prepend=-1) - 1, m)
    width, short = _widths(m)

    if width:
        long = remainders >= short  # these remainders take `width` bits, the others one less
        codes = remainders + np.where(long, short, 0)
        first = np.where(long, codes >> 1, codes)
        yield ((first[:, None] >> np.arange(width - 2, -1, -1)) & 1).astype(np.uint8).ravel()
        yield (codes[long] & 1).astype(np.uint8)

    ends = np.cumsum(quotients + 1)
    unary = np.ones(ends[-1], dtype=np.uint8)
    unary[ends - 1] = 0
    yield unary


def _read(bits: _Bits, count: int, total: int) -> Indices:
    m = parameter(count, total)
    width, short = _widths(m)
    remainders = np.zeros(count, dtype=np.int64)

    if width:
        table = bits.take(count * (width - 1)).reshape(count, width - 1).astype(np.int64)
        remainders = table @ (1 << np.arange(width - 2, -1, -1))
        long = remainders >= short
        last = bits.take(int(long.sum())).astype(np.int64)
        remainders[long] = 2 * remainders[long] + last - short

    where = np.cumsum(bits.unary(count, total // m) * m + remainders + 1) - 1
    if where[-1] >= total:
        raise WireError("frame: a position leaves the tensor")

    return cast(Indices, where)


def _widths(m: int) -> tuple[int, int]:
    """Return the bits of the longest remainder, and how many remainders take one bit less."""
    width = (m - 1).bit_length()
    return width, (1 << width) - m if width else 0
