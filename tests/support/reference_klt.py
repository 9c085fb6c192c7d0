"""A second decoder of `klt` frames, mode "biased", in plain Python: ints, floats, lists, `math`,
`struct`, `zlib`.

Written from the format and the formulas alone and slow on purpose: it shows that a frame is bytes
with a meaning, not whatever one library makes of them. It knows nothing of torch, NumPy or
constriction.
"""

import math
import re
import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise

Matrix = list[list[float]]
Shapes = Sequence[tuple[str, tuple[int, int]]]

LOW = -5
HIGH = 44
LEARNED = 14
KNOWN = 16
SAME_INPUT = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}


def decode(
    wire: bytes, shapes: Shapes, published: dict[str, list[int]], share: float
) -> dict[str, Matrix]:
    """The update that `wire` carries, from the published whole numbers."""
    version, code, _, _ = struct.unpack_from("<BBHI", wire)
    assert (version, code) == (2, 12)
    assert struct.unpack("<I", wire[-4:])[0] == zlib.crc32(wire[:-4])
    body = wire[8:-4]
    _, step, loud = struct.unpack_from("<BhB", body)
    factors = read_names(shapes)
    num_groups = 1 + max(each["group"] for each in factors)
    width = (num_groups + 1) // 2
    gains = [byte >> shift & 15 for byte in body[4 : 4 + width] for shift in (0, 4)][:num_groups]
    rows = pieces(published["rows"], [f["rank"] for f in factors])
    cols = pieces(published["cols"], [f["features"] for f in factors])
    coefficients = [
        (f["group"], -(r + c), number, i, j)
        for number, f in enumerate(factors)
        for i, r in enumerate(rows[number])
        for j, c in enumerate(cols[number])
    ]
    runs: list[list[tuple[int, int, int, int, int]]] = [[] for _ in range(LOW, HIGH + 1)]

    for each in sorted(coefficients):
        if gains[each[0]] != 15:
            kind = (-each[1] + loud - 96 - 4 * gains[each[0]]) // 4
            if kind >= LOW:
                runs[min(kind, HIGH) - LOW].append(each)

    stream = Stream(body[4 + width :])
    latent = [[[0.0] * f["features"] for _ in range(f["rank"])] for f in factors]
    for kind, run in enumerate(runs, LOW):
        if not run:
            continue

        counts, centroids = table(kind, published)
        starts = quantised(counts[:0:-1] + counts)
        for _, _, number, i, j in run:
            level = stream.next(starts) - len(counts) + 1
            latent[number][i][j] = (
                math.copysign(centroids[abs(level)], level) * 2 ** (step / 256) if level else 0.0
            )

    assert stream.state == 0
    assert not stream.words
    return synthesise(latent, factors, published, share)


def read_names(shapes: Shapes) -> list[dict[str, int]]:
    """Rank, features, side, basis and group of every factor."""
    bases: dict[tuple[str, int], int] = {}
    groups: dict[tuple[str, str], int] = {}
    factors = []

    for name, shape in shapes:
        path, side = re.match(r"(.*)\.lora_([AB])\.", name).groups()  # type: ignore[union-attr]
        module = path.rsplit(".", 1)[-1]
        rank, features = shape if side == "A" else shape[::-1]
        key = (
            path[: -len(module)] + SAME_INPUT[module]
            if side == "A" and module in SAME_INPUT
            else name
        )
        basis = bases.setdefault((key, features), len(bases))
        group = groups.setdefault((module, side), len(groups))
        factors.append(
            {
                "rank": rank,
                "features": features,
                "b": int(side == "B"),
                "basis": basis,
                "group": group,
            }
        )

    return factors


def pieces(flat: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """`flat` cut into consecutive pieces."""
    found = []
    start = 0

    for size in sizes:
        found.append(list(flat[start : start + size]))
        start += size

    assert start == len(flat)
    return found


def sigma_of(number: int) -> float:
    """Standard deviation of a class, in steps."""
    return float(2 ** ((4 * number + 1.5) / 16))


def table(number: int, published: dict[str, list[int]]) -> tuple[list[int], list[float]]:
    """Frequencies and centroids of the magnitudes 0, 1, ... of a class."""
    counts, centroids = generic(sigma_of(number))
    if number - LOW < LEARNED:
        learned = pieces(published["counts"], [KNOWN] * LEARNED)[number - LOW]
        shifts = pieces(published["centroids"], [KNOWN - 1] * LEARNED)[number - LOW]
        counts = [128 * count for count in learned] + [1] * (len(counts) - KNOWN)
        centroids = (
            [0.0]
            + [level + 1 + shift / 256 for level, shift in enumerate(shifts)]
            + centroids[KNOWN:]
        )

    return counts, centroids


def generic(sigma: float) -> tuple[list[int], list[float]]:
    """Half Gaussian, half Laplacian, cut where squared error and the worth of bits balance."""
    top = min(max(2 ** math.ceil(math.log2(8 * sigma)) - 1, 15), 16383)
    width = sigma / 2**0.5

    def beyond(edge: float) -> tuple[float, float]:
        gauss = math.exp(-((edge / sigma) ** 2) / 2) * sigma * (2 / math.pi) ** 0.5
        laplace = math.exp(-edge / width)
        return math.erfc(edge / (sigma * 2**0.5)) + laplace, gauss + (edge + width) * laplace

    def cells(zero_below: float, offset: float) -> tuple[list[float], list[float]]:
        tails = (
            [beyond(0.0), beyond(zero_below)]
            + [beyond(level - offset) for level in range(2, top + 1)]
            + [(0, 0)]
        )
        mass = [(low[0] - high[0]) / 2 for low, high in pairwise(tails)]
        first = [(low[1] - high[1]) / 2 for low, high in pairwise(tails)]
        means = (
            f / m if m > 1e-9 else level
            for level, (m, f) in enumerate(zip(mass, first, strict=True))
        )

        return [mass[0], *[m / 2 for m in mass[1:]]], [
            0.0,
            *[min(mean, top + 0.5) for mean in list(means)[1:]],
        ]

    zero_below = 0.65
    offset = 0.4
    for _ in range(20 if top < 64 else 3):
        mass, (_, one, two, *_) = cells(zero_below, offset)
        nil, single, double = (-math.log2(max(m, 1e-12)) for m in mass[:3])
        offset = min(
            max(2 - (two**2 - one**2 + 0.08 * (double - single)) / (2 * (two - one)), 0.2), 0.5
        )
        zero_below = max((one**2 + 0.1 * (single - nil)) / (2 * one), 1 - offset)

    mass, centroids = cells(round(256 * zero_below) / 256, round(256 * offset) / 256)
    return [max(round(m * 2**22), 1) for m in mass], centroids


def quantised(counts: Sequence[int]) -> list[int]:
    """Where each symbol starts among 2^24 shares, and the end: each has one, and its part of the
    rest."""
    scale = (2**24 - len(counts)) / float(sum(counts))
    before = 0
    starts = []

    for symbol, count in enumerate(counts):
        starts.append(int(before * scale) + symbol)
        before += count

    return [*starts, 2**24]


class Stream:
    """Asymmetric numeral systems with a state of 64 bits and words of 32, the last of which is read
    first."""

    def __init__(self, data: bytes) -> None:
        self.words = [word for (word,) in struct.iter_unpack("<I", data)]
        self.state = 0
        while self.words and self.state < 2**32:
            self.state = self.state << 32 | self.words.pop()

    def next(self, starts: Sequence[int]) -> int:
        """One symbol."""
        share = self.state % 2**24
        symbol = max(s for s in range(len(starts) - 1) if starts[s] <= share)
        self.state = (
            (self.state >> 24) * (starts[symbol + 1] - starts[symbol]) + share - starts[symbol]
        )

        if self.state < 2**32 and self.words:
            self.state = self.state << 32 | self.words.pop()

        return symbol


def synthesise(
    latent: list[Matrix],
    factors: list[dict[str, int]],
    published: dict[str, list[int]],
    share: float,
) -> dict[str, Matrix]:
    """X = V Z Q', by factor number."""
    axes = {f["basis"]: f["features"] for f in factors}
    kept = {basis: max(int(share * features), 1) for basis, features in axes.items()}
    tops = pieces(published["tops"], [axes[basis] * kept[basis] for basis in sorted(axes)])
    bases = {}

    for basis, features in axes.items():
        u = orthonormal(matrix(tops[basis], features))
        bases[basis] = completed(u)

    rotations = pieces(published["rotations"], [f["rank"] ** 2 for f in factors])
    found = {}
    for number, (z, f) in enumerate(zip(latent, factors, strict=True)):
        v = orthonormal(matrix(rotations[number], f["rank"]))
        x = product(product(v, z), transposed(bases[f["basis"]]))
        found[str(number)] = transposed(x) if f["b"] else x

    return found


def completed(u: Matrix) -> Matrix:
    """[U, R]: with U1 = Z P the first rows of U, R = E2 - (U + E1 Z) (I + P)^-1 U2'."""
    features = len(u)
    kept = len(u[0])
    u1 = u[:kept]
    u2 = u[kept:]
    z = u1

    for _ in range(60):  # Newton's iteration for the orthonormal factor
        other = transposed(inverse(z))
        z = [
            [(a + b) / 2 for a, b in zip(row, line, strict=True)]
            for row, line in zip(z, other, strict=True)
        ]

    p = product(transposed(z), u1)
    m = inverse([[value + (i == j) for j, value in enumerate(row)] for i, row in enumerate(p)])
    moved = [
        [a + (z[i][j] if i < kept else 0.0) for j, a in enumerate(row)] for i, row in enumerate(u)
    ]
    taken = product(product(moved, m), transposed(u2)) if u2 else [[] for _ in u]

    return [
        u[i] + [(i == kept + j) - taken[i][j] for j in range(features - kept)]
        for i in range(features)
    ]


def orthonormal(columns: Matrix) -> Matrix:
    """Gram and Schmidt, twice for accuracy."""
    found: list[list[float]] = []
    for column in transposed(columns):
        for _ in range(2):
            for other in found:
                inner = sum(a * b for a, b in zip(column, other, strict=True))
                column = [a - inner * b for a, b in zip(column, other, strict=True)]

        length = math.sqrt(sum(a * a for a in column))
        found.append([a / length for a in column])

    return transposed(found)


def inverse(square: Matrix) -> Matrix:
    """Gauss and Jordan, with pivots."""
    n = len(square)
    work = [[*row, *[float(i == j) for j in range(n)]] for i, row in enumerate(square)]

    for i in range(n):
        pivot = max(range(i, n), key=lambda row: abs(work[row][i]))
        work[i], work[pivot] = work[pivot], work[i]
        work[i] = [value / work[i][i] for value in work[i]]

        for j in range(n):
            if j != i:
                work[j] = [a - work[j][i] * b for a, b in zip(work[j], work[i], strict=True)]

    return [row[n:] for row in work]


def matrix(flat: Sequence[int], rows: int) -> Matrix:
    """Row-major."""
    cols = len(flat) // rows
    return [[float(value) for value in flat[cols * i : cols * (i + 1)]] for i in range(rows)]


def transposed(rows: Matrix) -> Matrix:
    """The transpose."""
    return [list(column) for column in zip(*rows, strict=True)]


def product(left: Matrix, right: Matrix) -> Matrix:
    """The matrix product."""
    columns = transposed(right)
    return [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in left
    ]
