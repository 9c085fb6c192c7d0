"""A linear autoencoder that carries real updates: a separable Karhunen-Loeve transform learned at TGAP.

Ours. The local optimiser makes updates look white value by value, yet along the feature axis of every module they
stay near one subspace, the same for all ranks, clients and rounds. Each factor, seen as X (rank, features),
becomes Z = V' X Q with orthonormal V (rank, rank) and Q (features, features). Z is quantised with one step for
everything, which is reverse water-filling, and entropy-coded by the variances that `fit` saw. The decoder is
the transpose.

Scales are logarithmic whole numbers, in 1/256 octave, so that both ends agree on every entropy model exactly.
Body: step (i16), loudness of every group (target, factor) relative to the step (i8, 1/8 octave), ANS stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fluvial.codecs import entropy
from fluvial.codecs.base import CodecSettings, LatentCodec
from fluvial.codecs.canvas import path, target
from fluvial.codecs.frame import OVERHEAD, Reader
from fluvial.errors import ConfigError, WireError
from fluvial.payload import Payload
from fluvial.tensors import Layout, Named, factor

Codes = NDArray[np.int32]

_OCTAVE = 256
_LOUD = _OCTAVE // 8
_CLASS = _OCTAVE // 4  # 1.5 dB
_WIDEST = 24  # classes on either side of sigma = step
_LEVELS = 255
_THRESHOLD = 0.65
"""Values below this many steps become 0; measured flat from 0.6 to 0.7."""
_SHARED = ("q_proj", "k_proj", "v_proj")  # read the same input, so their A factors share a basis
_FLOOR = 1e-4  # of a factor's mean variance, for a direction that `fit` hardly saw


class LinearSettings(CodecSettings):
    """Ours; the paper has no such codec."""

    name: Literal["linear"] = "linear"
    rate: float = Field(64, ge=8, le=4096)
    """A frame takes at most 4 * values / rate bytes, header included."""
    basis_share: float = Field(0.25, gt=0, le=1)
    """Feature directions that are published, as a share of the features; the others need no bytes."""


@dataclass(frozen=True)
class Part:
    """One factor as the transform sees it: X (rank, features)."""

    name: str
    rank: int
    features: int
    transposed: bool
    basis: int
    group: int


@dataclass(frozen=True)
class Model:
    """What `fit` learns and `published` carries; pieces stand one after another in layout order."""

    tops: Tensor
    """int8: leading feature directions (features, kept) of every basis, each up to a factor."""
    rotations: Tensor
    """fp32: V (rank, rank) of every factor."""
    rows: Tensor
    """int16: log2 of the standard deviation of each row of Z, in 1/256 octave."""
    cols: Tensor
    """int16: the same for each column; row + column is the entry's."""

    def named(self) -> Named:
        """As named tensors."""
        return {"tops": self.tops, "rotations": self.rotations, "rows": self.rows, "cols": self.cols}


class Linear(LatentCodec):
    """Tied encoder and decoder: whoever can encode can decode."""

    code = 11

    def __init__(self, settings: CodecSettings, layout: Layout, model: Model) -> None:
        assert isinstance(settings, LinearSettings)
        super().__init__(settings, layout)
        self.settings: LinearSettings = settings
        self.model = model
        self.parts = _parts(layout)
        self.groups = np.repeat(np.array([part.group for part in self.parts], np.int32), layout.sizes)
        self.num_groups = _num_groups(self.parts)
        self.budget = self.frame_size(settings, layout)
        self._bases = [_Reflectors(top) for top in _unpack_tops(model.tops, self.parts, settings)]
        self._rotations = _split_squares(model.rotations, self.parts)
        rows = np.split(model.rows.numpy().astype(np.int32), np.cumsum([part.rank for part in self.parts])[:-1])
        cols = np.split(model.cols.numpy().astype(np.int32), np.cumsum([part.features for part in self.parts])[:-1])
        spread = np.concatenate([np.add.outer(r, c).ravel() for r, c in zip(rows, cols, strict=True)])
        mean = np.bincount(self.groups, _power(spread)) / np.bincount(self.groups)
        shift = np.rint(np.log2(mean) * (_OCTAVE / 2)).astype(np.int32)
        self._spread = spread - shift[self.groups]  # of unit mean power in every group, whatever was published
        self._expected = np.bincount(self.groups, _power(self._spread))

    @classmethod
    def fit(cls, settings: CodecSettings, layout: Layout, updates: Sequence[Named], *, seed: int) -> Self:  # noqa: ARG003 - nothing is drawn
        """Principal directions and variances of `updates`; every update counts the same."""
        assert isinstance(settings, LinearSettings)
        if not updates:
            raise ConfigError("codec: linear has no updates to learn from; TGAP must collect at least one")
        parts = _parts(layout)
        scale = [1.0 / max(float(layout.flatten(update).norm()), 1e-30) for update in updates]
        seen = [
            torch.stack([_view(update[part.name], part) * s for update, s in zip(updates, scale, strict=True)])
            for part in parts
        ]  # each (updates, rank, features)
        tops = []
        for basis in range(1 + max(part.basis for part in parts)):
            rows = torch.cat([x.flatten(0, 1) for x, part in zip(seen, parts, strict=True) if part.basis == basis])
            kept = _kept(rows.shape[1], settings)
            directions = torch.linalg.svd(rows.double(), full_matrices=False).Vh[:kept].T
            top = torch.zeros(rows.shape[1], kept, dtype=torch.float64)
            top[:, : directions.shape[1]] = directions
            tops.append(torch.round(127 * top / top.abs().amax(0).clamp_min(1e-30)).to(torch.int8))
        reflectors = [_Reflectors(top) for top in tops]
        rotations, rows_codes, cols_codes = [], [], []
        energy = sum(float(x.double().square().sum()) for x in seen)
        unit = max(energy / (layout.numel * len(updates)), 1e-60)
        for x, part in zip(seen, parts, strict=True):
            covariance = torch.einsum("urf,usf->rs", x.double(), x.double())
            rotation = torch.linalg.eigh(covariance).eigenvectors.flip(1).float().contiguous()
            z = reflectors[part.basis].forward((rotation.T @ x).flatten(0, 1)).view_as(x).double() / unit**0.5
            variance = z.square().mean(0)
            mean = variance.mean().clamp_min(1e-12)
            rotations.append(rotation)
            rows_codes.append(_log(variance.mean(1) / mean))
            cols_codes.append(_log(variance.mean(0).clamp_min(_FLOOR * mean)))
        model = Model(
            torch.cat([top.reshape(-1) for top in tops]),
            torch.cat([rotation.reshape(-1) for rotation in rotations]),
            torch.cat(rows_codes),
            torch.cat(cols_codes),
        )
        return cls(settings, layout, model)

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, LinearSettings)
        budget, overhead = int(layout.raw_bytes / settings.rate), _overhead(_num_groups(_parts(layout)))
        if budget < overhead + 16:
            raise ConfigError(
                f"codec: rate={settings.rate:g} leaves {budget} bytes for {layout.numel} values; a frame of linear "
                f"needs {overhead} before the first; choose a lower rate"
            )
        return budget

    def published(self, *, decoder: bool) -> Payload:  # noqa: ARG002 - the encoder is the decoder
        """The model, mostly `basis_share` of every feature axis at one byte per value."""
        return Payload(self.model.named())

    @classmethod
    def from_published(cls, settings: CodecSettings, layout: Layout, payload: Payload) -> Self:
        """Rebuild; raises `WireError` if a tensor is missing, left over, or of another type or length."""
        assert isinstance(settings, LinearSettings)
        parts = _parts(layout)
        expected = {
            "tops": (torch.int8, sum(n * _kept(n, settings) for n in _basis_features(parts))),
            "rotations": (torch.float32, sum(part.rank**2 for part in parts)),
            "rows": (torch.int16, sum(part.rank for part in parts)),
            "cols": (torch.int16, sum(part.features for part in parts)),
        }
        if set(payload.tensors) != set(expected):
            raise WireError(f"linear: expected tensors {sorted(expected)}, found {sorted(payload.tensors)[:8]}")
        for name, (dtype, length) in expected.items():
            found = payload.tensors[name]
            if found.dtype != dtype or found.shape != (length,):
                raise WireError(
                    f"linear: {name}: expected {dtype} ({length},), found {found.dtype} {tuple(found.shape)}; both "
                    "ends need the same codec settings"
                )
        if not bool((payload.tensors["rotations"].abs() <= 1.001).all()):
            raise WireError("linear: rotations: values of an orthonormal matrix are within -1 and 1")
        return cls(settings, layout, Model(**payload.tensors))

    def analyse(self, vector: Tensor) -> Tensor:
        """Coefficients Z (numel,) in layout order; norms are kept."""
        pieces = torch.split(vector, list(self.layout.sizes))
        latent = []
        for piece, part, rotation in zip(pieces, self.parts, self._rotations, strict=True):
            x = piece.view(part.features, part.rank).T if part.transposed else piece.view(part.rank, part.features)
            latent.append(self._bases[part.basis].forward(rotation.T @ x).reshape(-1))
        return torch.cat(latent)

    def synthesise(self, latent: Tensor) -> Tensor:
        """Inverse of `analyse`."""
        pieces = torch.split(latent, list(self.layout.sizes))
        vector = []
        for piece, part, rotation in zip(pieces, self.parts, self._rotations, strict=True):
            x = rotation @ self._bases[part.basis].inverse(piece.view(part.rank, part.features))
            vector.append((x.T if part.transposed else x).reshape(-1))
        return torch.cat(vector)

    def pack(self, latent: Tensor, vector: Tensor) -> bytes:  # noqa: ARG002 - all side information is of the latent
        """Quantise with the finest step whose frame is within the budget."""
        values = latent.double().numpy()
        assert np.isfinite(values).all(), "an update whose coefficients overflow fp32 must not be sent"
        power = np.bincount(self.groups, values**2, self.num_groups)
        loudness = _safe_log2(power / self._expected) / 2 * _OCTAVE  # of each group against `fit`, in codes
        peak = int(np.ceil(_safe_log2(np.abs(values).max(keepdims=True))[0] * _OCTAVE))
        # The finest step clips no coefficient, so that fewer bits always mean a coarser step.
        fine, coarse = np.clip([peak - 8 * _OCTAVE, peak + 7 * _OCTAVE], -_LIMIT, _LIMIT).tolist()
        room = 8 * (self.budget - _overhead(self.num_groups))
        while coarse - fine > 1:
            middle = (fine + coarse) // 2
            if self._bits(values, loudness, middle) > room:
                fine = middle
            else:
                coarse = middle
        while True:
            body = self._write(values, loudness, coarse)
            if len(body) + OVERHEAD <= self.budget:
                return body
            coarse += 4
            assert coarse <= _LIMIT, "a silent frame fits, as the constructor checked"

    def parse(self, reader: Reader) -> Tensor:
        """Entropy-decode class by class, then centroids and the transpose of the transform."""
        step = int(reader.array("i2", 1)[0])
        loud = reader.array("i1", self.num_groups).astype(np.int32)
        stream = entropy.Stream(reader.take(reader.left))
        classes = self._classes(loud)
        order, sizes = _by_class(classes)
        levels = np.empty(len(classes), np.int32)
        frequencies, centroids = tables()
        drawn = [stream.take(frequencies[number], int(size)) for number, size in enumerate(sizes)]
        stream.finish()
        levels[order] = np.concatenate(drawn) - _LEVELS
        values = np.sign(levels) * centroids[classes, np.abs(levels)] * np.exp2(step / _OCTAVE)
        return self.synthesise(torch.from_numpy(values).float())

    def _classes(self, loud: Codes) -> Codes:
        codes = (self._spread + (loud * _LOUD)[self.groups] + _CLASS // 2) // _CLASS
        classes: Codes = np.clip(codes, -_WIDEST, _WIDEST) + _WIDEST
        return classes

    def _quantise(
        self, values: NDArray[np.float64], loudness: NDArray[np.float64], step: int
    ) -> tuple[Codes, Codes, Codes]:
        """Levels and classes of every coefficient, and loudness codes of every group."""
        loud = np.clip(np.rint((loudness - step) / _LOUD), -128, 127).astype(np.int32)
        sizes = np.floor(np.abs(values) * np.exp2(-step / _OCTAVE) + (1 - _THRESHOLD))
        levels = np.copysign(np.minimum(sizes, _LEVELS), values).astype(np.int32)
        return levels, self._classes(loud), loud

    def _bits(self, values: NDArray[np.float64], loudness: NDArray[np.float64], step: int) -> float:
        levels, classes, _ = self._quantise(values, loudness, step)
        counts = np.bincount(classes * _SYMBOLS + levels + _LEVELS, minlength=(2 * _WIDEST + 1) * _SYMBOLS)
        frequencies = tables()[0].ravel()
        return float(-(counts * np.log2(frequencies / _TOTAL)).sum())

    def _write(self, values: NDArray[np.float64], loudness: NDArray[np.float64], step: int) -> bytes:
        levels, classes, loud = self._quantise(values, loudness, step)
        order, sizes = _by_class(classes)
        symbols = np.split(levels[order] + _LEVELS, np.cumsum(sizes)[:-1])
        stream = entropy.encode(list(zip(symbols, tables()[0], strict=True)))
        return np.array([step], "<i2").tobytes() + loud.astype("i1").tobytes() + stream


_SYMBOLS = 2 * _LEVELS + 1
_LIMIT = 2**15 - 1
_TOTAL = 1 << 22


@cache
def tables() -> tuple[Codes, NDArray[np.float64]]:
    """For every class, frequencies of the levels -255 to 255 and centroids (in steps) of the levels 0 to 255.

    Half Gaussian, half Laplacian of the class's standard deviation; tables learned at `fit` lower the relative
    error on real updates by 0.001 only.
    """
    sigma = torch.exp2(torch.arange(-_WIDEST, _WIDEST + 1, dtype=torch.float64) / (_OCTAVE / _CLASS))[:, None]
    edges = torch.cat([torch.zeros(1), torch.arange(_LEVELS) + _THRESHOLD, torch.tensor([float("inf")])]).double()
    gauss, laplace = edges / (sigma * 2**0.5), edges * 2**0.5 / sigma
    above = 0.5 * torch.erfc(gauss) + 0.5 * torch.exp(-laplace)
    finite = edges.clamp(max=1e9)
    moment = 0.5 * sigma * (2 / torch.pi) ** 0.5 * torch.exp(-(gauss**2))
    moment = moment + 0.5 * (finite + sigma / 2**0.5) * torch.exp(-laplace)
    mass, first = above[:, :-1] - above[:, 1:], moment[:, :-1] - moment[:, 1:]
    lower, upper = edges[:-1], edges[1:].clamp(max=2 * _LEVELS)
    centroids = torch.where(mass > 1e-12, first / mass.clamp_min(1e-12), lower).clamp(lower, upper)
    centroids[:, 0] = 0
    halves = mass[:, 1:] / 2
    both = torch.cat([halves.flip(1), mass[:, :1], halves], dim=1)
    return np.rint(both.numpy() * _TOTAL).astype(np.int32).clip(1), centroids.numpy()


class _Reflectors:
    """Orthonormal Q (features, features) whose first columns span `top`: its QR, as Householder reflectors."""

    def __init__(self, top: Tensor) -> None:
        """top (features, kept), of any scale."""
        a, tau = torch.geqrf(top.double())
        self._a, self._tau = a.float(), tau.float()

    def forward(self, x: Tensor) -> Tensor:
        """x Q for x (rows, features)."""
        return torch.ormqr(self._a, self._tau, x, left=False)

    def inverse(self, z: Tensor) -> Tensor:
        """z Q' for z (rows, features)."""
        return torch.ormqr(self._a, self._tau, z, left=False, transpose=True)


def _parts(layout: Layout) -> list[Part]:
    bases: dict[tuple[str, int], int] = {}
    groups: dict[tuple[str, str], int] = {}
    parts = []
    for name, shape in layout.shapes:
        kind, module = factor(name), target(name)
        if kind is None or len(shape) != 2:
            raise ConfigError(f"codec: {name!r} with shape {shape} is no LoRA factor; linear codes only A and B")
        rank, features = shape if kind == "A" else shape[::-1]
        shared = kind == "A" and module in _SHARED
        key = path(name).removesuffix(module) + "qkv" if shared else name
        basis = bases.setdefault((key, features), len(bases))
        group = groups.setdefault((module, kind), len(groups))
        parts.append(Part(name, rank, features, kind == "B", basis, group))
    if not parts:
        raise ConfigError("codec: the adapter has no tensors")
    return parts


def _num_groups(parts: list[Part]) -> int:
    return 1 + max(part.group for part in parts)


def _overhead(num_groups: int) -> int:
    """Bytes of a frame besides the entropy: header, step, loudness, and what the coder adds."""
    return OVERHEAD + 2 + num_groups + 4


def _view(tensor: Tensor, part: Part) -> Tensor:
    return tensor.float().T if part.transposed else tensor.float()


def _kept(features: int, settings: LinearSettings) -> int:
    return max(int(settings.basis_share * features), 1)


def _basis_features(parts: list[Part]) -> list[int]:
    """Features of every basis."""
    return list({part.basis: part.features for part in parts}.values())


def _unpack_tops(tops: Tensor, parts: list[Part], settings: LinearSettings) -> list[Tensor]:
    shapes = [(features, _kept(features, settings)) for features in _basis_features(parts)]
    pieces = torch.split(tops, [rows * cols for rows, cols in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _split_squares(rotations: Tensor, parts: list[Part]) -> list[Tensor]:
    pieces = torch.split(rotations, [part.rank**2 for part in parts])
    return [piece.view(part.rank, part.rank) for piece, part in zip(pieces, parts, strict=True)]


def _log(variance: Tensor) -> Tensor:
    """int16 codes of the square root of `variance`."""
    return torch.round(variance.clamp_min(1e-12).log2() * (_OCTAVE / 2)).to(torch.int16)


def _power(codes: Codes) -> NDArray[np.float64]:
    """Variance of logarithmic codes."""
    power: NDArray[np.float64] = np.exp2(codes / (_OCTAVE / 2))
    return power


def _safe_log2(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log2(np.maximum(values, 1e-80))


def _by_class(classes: Codes) -> tuple[NDArray[np.intp], Codes]:
    """Order of the coefficients on the wire, and how many there are of each class."""
    sizes = np.bincount(classes, minlength=2 * _WIDEST + 1)
    return np.argsort(classes, kind="stable"), sizes.astype(np.int32)
