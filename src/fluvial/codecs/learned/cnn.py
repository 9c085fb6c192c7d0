"""A one-dimensional convolutional autoencoder over the feature axis of every LoRA factor, with a
coded latent.

Ours, as an opponent: a small learned nonlinear transform in place of the basis of `klt`. Each
factor, seen as X (rank, features), is one signal of `rank` channels. Encoder and decoder are a
linear path, one strided convolution with overlap, plus a residual path of two halvings with ReLU.
`fit` minimises squared error plus price times bits of the rounded latent, rounding being the
identity for gradients; the idea of training for both is from Balle, Laparra and Simoncelli,
"End-to-end optimized image compression" (ICLR 2017), who add noise instead. A convolution does the
same at every feature, and the order of features means little: it learns less than `klt` and `vq`
do.

Body: scales (bf16), step of the latent (bf16), class of every factor kind and channel (u8: log2 of
RMS / step, in quarters, plus 24), ANS stream of the latent, int8, by class.
"""

import logging
import math
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from fluvial import seeds
from fluvial.codecs import entropy
from fluvial.codecs.base import CodecSettings, LatentCodec, RateSettings, body_room
from fluvial.codecs.normalise import (
    BYTES_PER_SCALE,
    denormalise,
    measure,
    normalise,
    read_scales,
    scale_count,
    write_scales,
)
from fluvial.errors import ConfigError, WireError
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, factor

logger = logging.getLogger(__name__)

Codes = NDArray[np.int64]

_STRIDE = 4
_LEVELS = 127
_WIDE = 255  # levels of the tables
_WIDEST = 24  # classes on either side of sigma = step
_TOTAL = 1 << 22
_THRESHOLD = 0.6
"""Latents below this many steps become 0."""
_WINDOW = 256
"""Features that a training signal has at most."""
_BATCH = 64
"""Signals of each length in a step of `fit`."""
_LARGEST = 1e4
"""Of a published weight."""


class CNNSettings(RateSettings):
    """Ours; the paper has no such codec."""

    name: Literal["cnn"] = "cnn"
    """Which codec."""
    latent_share: float = Field(1.0, ge=1e-6, le=1)
    """Latent values per value of the update."""
    hidden: int = Field(32, ge=1, le=512)
    """Channels of the residual path."""
    normalise: Literal["global_rms", "factor_rms"] = "global_rms"
    """Whether there is one scale for all, or one for every factor of every module and layer."""
    iterations: int = Field(400, ge=1, le=10**6)
    """Adam steps of `fit`."""
    learning_rate: float = Field(1e-2, ge=1e-12, le=1)
    """At the start; falls to 0 along half a cosine."""


class _Sum(nn.Module):
    """What two paths make of the same input, added; the second starts at zero."""

    def __init__(self, linear: nn.Module, residual: nn.Sequential) -> None:
        super().__init__()
        self.linear = linear
        self.residual = residual
        last = residual[-1]

        for weight in last.parameters():
            nn.init.zeros_(weight)

    def forward(self, values: Tensor) -> Tensor:
        """values (batch, channels, length)."""
        return self.linear(values) + self.residual(values)  # type: ignore[no-any-return]


def build_encoder(rank: int, channels: int, hidden: int) -> nn.Module:
    """(batch, rank, features) to (batch, channels, features / 4)."""
    residual = nn.Sequential(
        nn.Conv1d(rank, hidden, 4, 2, 1),
        nn.ReLU(),
        nn.Conv1d(hidden, hidden, 4, 2, 1),
        nn.ReLU(),
        nn.Conv1d(hidden, channels, 3, padding=1),
    )
    return _Sum(nn.Conv1d(rank, channels, 2 * _STRIDE, _STRIDE, _STRIDE // 2, bias=False), residual)


def build_decoder(rank: int, channels: int, hidden: int) -> nn.Module:
    """The mirror of `build_encoder`."""
    residual = nn.Sequential(
        nn.Conv1d(channels, hidden, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose1d(hidden, hidden, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose1d(hidden, rank, 4, 2, 1),
    )
    return _Sum(
        nn.ConvTranspose1d(channels, rank, 2 * _STRIDE, _STRIDE, _STRIDE // 2, bias=False), residual
    )


class CNN(LatentCodec):
    """A site encodes, the server decodes; the latent is (tensors, channels, features / 4),
    flattened."""

    code = 19

    def __init__(
        self, settings: CodecSettings, layout: Layout, encoder: nn.Module, decoder: nn.Module | None
    ) -> None:
        assert isinstance(settings, CNNSettings)
        super().__init__(settings, layout)
        self.settings: CNNSettings = settings
        self.encoder = encoder.eval().requires_grad_(False)
        self.decoder = None if decoder is None else decoder.eval().requires_grad_(False)
        self.loss_curve: list[tuple[int, float]] = []
        """(iteration, mean squared error on normalised updates) of `fit`; empty after
        `from_published`."""
        self._channels = _channels(layout, settings)
        self._grids = [-(-features // _STRIDE) for _, features in _signals(layout)]
        self._groups = np.concatenate(
            [
                np.repeat(
                    np.arange(self._channels, dtype=np.int32) + self._channels * _is_b(name), grid
                )
                for (name, _), grid in zip(layout.shapes, self._grids, strict=True)
            ]
        )
        self._room = _room(settings, layout)
        digest = layout.fingerprint

        for tensor in encoder.state_dict().values():
            digest = zlib.crc32(tensor.numpy().astype("<f4").tobytes(), digest)
        self._fingerprint = digest

    @property
    def fingerprint(self) -> int:
        """Of the layout and of the encoder, which both ends hold."""
        return self._fingerprint

    @classmethod
    def fit(
        cls, settings: CodecSettings, layout: Layout, updates: Sequence[Named], *, seed: int
    ) -> Self:
        """Train one autoencoder for all factors, on the CPU; every update counts the same."""
        assert isinstance(settings, CNNSettings)
        if not updates:
            raise ConfigError(
                "codec: cnn has no updates to learn from; TGAP must collect at least one"
            )

        _room(settings, layout)
        shape = _rank(layout), _channels(layout, settings), settings.hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(seed, "cnn", "init"))
            encoder = build_encoder(*shape)
            decoder = build_decoder(*shape)

        spread = nn.Parameter(torch.zeros(shape[1], 1))
        weights = [*encoder.parameters(), *decoder.parameters(), spread]
        optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
        seen = _by_length(layout, settings, updates)
        draw = seeds.generator(seed, "cnn", "batches")
        price = (
            2 * math.log(2) * 2.0 ** (-64 / settings.rate)
        )  # -dD/dR of a white source, D = 2^(-2R)
        curve = []

        for iteration in range(1, settings.iterations + 1):
            error = torch.zeros(())
            bits = torch.zeros(())
            number = 0

            for signals in seen:
                x = _draw(signals, draw)
                latent = encoder(x)
                rounded = latent + (_round(latent) - latent).detach()
                error = error + (decoder(rounded) - x).square().sum()
                bits = bits + _laplace_bits(rounded, spread).sum()
                number += x.numel()

            optimizer.zero_grad()
            torch.autograd.backward((error + price * bits) / number)
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            curve.append((iteration, float(error.detach()) / number))

            if iteration % 100 == 0:
                logger.info(
                    "cnn: iteration %d of %d, error %.3f",
                    iteration,
                    settings.iterations,
                    curve[-1][1],
                )

        codec = cls(settings, layout, encoder, decoder)
        codec.loss_curve = curve
        return codec

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, CNNSettings)
        return _room(settings, layout) + OVERHEAD

    def published(self, *, decoder: bool) -> Payload:
        """Weights, fp32."""
        tensors = {f"encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        if decoder:
            assert self.decoder is not None, "a codec without decoder cannot publish one"
            tensors |= {
                f"decoder.{name}": tensor for name, tensor in self.decoder.state_dict().items()
            }

        return Payload(tensors)

    @classmethod
    def from_published(cls, settings: CodecSettings, layout: Layout, payload: Payload) -> Self:
        """Rebuild; raises `WireError` if weights are missing, left over, of another shape, or out
        of range."""
        assert isinstance(settings, CNNSettings)
        left = dict(payload.tensors)
        shape = _rank(layout), _channels(layout, settings), settings.hidden

        with torch.random.fork_rng(devices=[]):
            encoder = build_encoder(*shape)
            decoder = build_decoder(*shape)

        _load("encoder", encoder, left)
        has_decoder = any(name.startswith("decoder.") for name in left)
        if has_decoder:
            _load("decoder", decoder, left)
        if left:
            raise WireError(
                f"cnn: unexpected tensor {min(left)[:64]!r}; both ends need the same codec settings"
            )

        return cls(settings, layout, encoder, decoder if has_decoder else None)

    def analyse(self, vector: Tensor) -> Tensor:
        """The latent, fp32, in units of the step that `fit` had; factor after factor, channel after
        channel."""
        with torch.no_grad():
            signals = _to_signals(_normalised(vector, self.layout, self.settings), self.layout)
            return torch.cat([self.encoder(_padded(x)[None]).reshape(-1) for x in signals])

    @classmethod
    def side_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Two bytes for every scale."""
        assert isinstance(settings, CNNSettings)
        return BYTES_PER_SCALE * scale_count(layout, settings.normalise)

    def side(self, vector: Tensor) -> bytes:
        """The scales by which `analyse` divides the update."""
        return write_scales(measure(vector, self.layout, self.settings.normalise))

    def pack(self, latent: Tensor, side: bytes = b"") -> bytes:
        """Quantise with the finest step whose frame is within the rate."""
        values = latent.double().numpy()
        peak = float(np.abs(values).max(initial=0.0))
        coarse = math.log2(max(peak, 1e-30)) + 1  # everything becomes 0
        fine = coarse - 8  # nothing is clipped
        room = 8 * (self._room - len(side) - 2 - 2 * self._channels - 4)

        for _ in range(14):
            middle = (fine + coarse) / 2
            if self._bits(values, middle) > room:
                fine = middle
            else:
                coarse = middle

        while len(body := self._write(values, coarse)) + len(side) > self._room:
            coarse += 0.02
        return side + body

    def parse(self, reader: Reader) -> Tensor:
        """Run the decoder; raises `ConfigError` on a site that did not download it."""
        if self.decoder is None:
            raise ConfigError(
                "codec: this site holds only the encoder of cnn; decoding needs published(decoder=True)"
            )

        scales = read_scales(reader, scale_count(self.layout, self.settings.normalise))
        step = float(read_scales(reader, 1)[0])
        frequencies, centroids = tables()
        classes = reader.array("u1", 2 * self._channels).astype(np.int64)

        if int(classes.max()) >= len(frequencies):
            raise WireError(
                f"frame: class {classes.max()} of the latent, expected at most {len(frequencies) - 1}"
            )

        stream = entropy.Stream(reader.take(reader.left))
        of_each = classes[self._groups]
        order = np.argsort(of_each, kind="stable")
        sizes = np.bincount(of_each, minlength=len(frequencies))
        levels = np.empty(len(order), np.int64)
        middle = frequencies.shape[1] // 2
        drawn = [
            stream.take(table, int(size)) for table, size in zip(frequencies, sizes, strict=True)
        ]
        stream.finish()
        levels[order] = np.concatenate(drawn).astype(np.int64) - middle

        if int(np.abs(levels).max()) > _LEVELS:
            raise WireError(f"frame: latent beyond {_LEVELS}")

        latent = torch.from_numpy(
            np.sign(levels) * centroids[of_each, np.abs(levels)] * step
        ).float()
        pieces = torch.split(latent, [self._channels * grid for grid in self._grids])
        values = []

        with torch.no_grad():
            for piece, grid, (name, shape) in zip(
                pieces, self._grids, self.layout.shapes, strict=True
            ):
                x = self.decoder(piece.view(1, self._channels, grid))[0]
                values.append((x[:, : shape[0]].T if _is_b(name) else x[:, : shape[1]]).reshape(-1))

        largest = torch.finfo(torch.float32).max
        vector = denormalise(torch.cat(values), scales, self.layout, self.settings.normalise)
        return vector.clamp(-largest, largest)

    def _quantise(
        self, values: NDArray[np.float64], octaves: float
    ) -> tuple[float, NDArray[np.int64], Codes]:
        """Step as it travels, levels of the latent, class of every group of channels."""
        step = float(torch.tensor(2.0**octaves).bfloat16())
        power = np.bincount(self._groups, values**2, 2 * self._channels)
        number = np.maximum(np.bincount(self._groups, minlength=2 * self._channels), 1)
        loud = np.rint(2 * np.log2(np.maximum(power / number, 1e-80) / step**2))
        levels = np.copysign(
            np.minimum(np.floor(np.abs(values) / step + (1 - _THRESHOLD)), _LEVELS), values
        )
        half = len(tables()[0]) // 2

        return step, levels.astype(np.int64), (np.clip(loud, -half, half) + half).astype(np.int64)

    def _bits(self, values: NDArray[np.float64], octaves: float) -> float:
        _, levels, classes = self._quantise(values, octaves)
        frequencies = tables()[0]
        shares = frequencies / frequencies.sum(1, keepdims=True)

        return float(
            -np.log2(shares[classes[self._groups], levels + frequencies.shape[1] // 2]).sum()
        )

    def _write(self, values: NDArray[np.float64], octaves: float) -> bytes:
        step, levels, classes = self._quantise(values, octaves)
        frequencies = tables()[0]
        of_each = classes[self._groups]
        symbols = levels + frequencies.shape[1] // 2
        stream = entropy.encode(
            [(symbols[of_each == index], table) for index, table in enumerate(frequencies)]
        )

        return (
            write_scales(torch.tensor([step]).bfloat16()) + classes.astype("u1").tobytes() + stream
        )


@cache
def tables() -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """For every class, frequencies of the levels -255 to 255 and centroids (in steps) of the levels
    0 to 255.

    Classes are quarter octaves of the standard deviation in steps, -6 to 6 octaves; half Gaussian,
    half Laplacian.
    """
    sigma = torch.exp2(torch.arange(-_WIDEST, _WIDEST + 1, dtype=torch.float64) / 4)[:, None]
    edges = torch.cat(
        [torch.zeros(1), torch.arange(_WIDE) + _THRESHOLD, torch.tensor([float("inf")])]
    ).double()
    gauss = edges / (sigma * 2**0.5)
    laplace = edges * 2**0.5 / sigma
    above = 0.5 * torch.erfc(gauss) + 0.5 * torch.exp(-laplace)
    finite = edges.clamp(max=1e9)
    moment = 0.5 * sigma * (2 / torch.pi) ** 0.5 * torch.exp(-(gauss**2))
    moment = moment + 0.5 * (finite + sigma / 2**0.5) * torch.exp(-laplace)
    mass = above[:, :-1] - above[:, 1:]
    first = moment[:, :-1] - moment[:, 1:]
    lower = edges[:-1]
    upper = edges[1:].clamp(max=2 * _WIDE)
    centroids = torch.where(mass > 1e-12, first / mass.clamp_min(1e-12), lower).clamp(lower, upper)
    centroids[:, 0] = 0
    halves = mass[:, 1:] / 2
    both = torch.cat([halves.flip(1), mass[:, :1], halves], dim=1)

    return np.rint(both.numpy() * _TOTAL).astype(np.int32).clip(1), centroids.numpy()


def _is_b(name: str) -> bool:
    return factor(name) == "B"


def _signals(layout: Layout) -> list[tuple[int, int]]:
    """Rank and features of every factor."""
    found = []
    for name, shape in layout.shapes:
        if factor(name) is None or len(shape) != 2 or 0 in shape:
            raise ConfigError(
                f"codec: {name!r} with shape {shape} is no LoRA factor; cnn codes only A and B"
            )

        found.append((shape[1], shape[0]) if _is_b(name) else (shape[0], shape[1]))

    return found


def _rank(layout: Layout) -> int:
    ranks = {rank for rank, _ in _signals(layout)}
    if len(ranks) != 1:
        raise ConfigError(f"codec: cnn needs factors of one rank, found {sorted(ranks)}")
    return min(ranks)


def _channels(layout: Layout, settings: CNNSettings) -> int:
    return max(round(settings.latent_share * _STRIDE * _rank(layout)), 1)


def _room(settings: CNNSettings, layout: Layout) -> int:
    scales = BYTES_PER_SCALE * scale_count(layout, settings.normalise)
    silent = math.ceil(
        layout.numel / 512
    )  # what zeros cost in the lowest class, with room to spare
    return body_room(
        layout, settings.rate, least=scales + 2 + 2 * _channels(layout, settings) + 8 + silent // 8
    )


def _normalised(vector: Tensor, layout: Layout, settings: CNNSettings) -> Tensor:
    return normalise(
        vector, measure(vector, layout, settings.normalise), layout, settings.normalise
    )


def _to_signals(vector: Tensor, layout: Layout) -> list[Tensor]:
    """Every factor as X (rank, features)."""
    pieces = layout.unflatten(vector)
    return [tensor.T if _is_b(name) else tensor for name, tensor in pieces.items()]


def _padded(x: Tensor) -> Tensor:
    """x (rank, features) with zeros up to whole strides."""
    return nn.functional.pad(x, (0, -x.shape[-1] % _STRIDE))


def _by_length(layout: Layout, settings: CNNSettings, updates: Sequence[Named]) -> list[Tensor]:
    """All signals (number, rank, features), those of one length together."""
    found: dict[int, list[Tensor]] = {}
    for update in updates:
        for x in _to_signals(_normalised(layout.flatten(update), layout, settings), layout):
            found.setdefault(x.shape[1], []).append(_padded(x))

    return [torch.stack(signals) for _, signals in sorted(found.items())]


def _draw(signals: Tensor, draw: torch.Generator) -> Tensor:
    """A batch of random signals, cut to one random window if they are long."""
    chosen = signals[torch.randint(len(signals), (_BATCH,), generator=draw)]
    spare = max(signals.shape[2] - _WINDOW, 0) // _STRIDE
    start = _STRIDE * int(torch.randint(spare + 1, (1,), generator=draw))
    return chosen[:, :, start : start + _WINDOW]


def _round(latent: Tensor) -> Tensor:
    return torch.copysign(torch.floor(latent.abs() + (1 - _THRESHOLD)), latent)


def _laplace_bits(latent: Tensor, spread: Tensor) -> Tensor:
    """Bits of whole numbers under a Laplace law of scale e^spread (channels, 1)."""
    scale = spread.clamp(-5, 10).exp()

    def below(x: Tensor) -> Tensor:
        return 0.5 + 0.5 * torch.sign(x) * -torch.expm1(-x.abs() / scale)

    return -(below(latent + 0.5) - below(latent - 0.5)).clamp_min(1e-9).log2()


def _load(part: str, network: nn.Module, left: Named) -> None:
    """Fill `network` from the tensors of `part`, which are taken out of `left`."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            found = left.pop(f"{part}.{name}", None)
            if found is None or found.shape != tensor.shape or found.dtype != torch.float32:
                shown = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise WireError(
                    f"cnn: {part}.{name}: expected float32 {tuple(tensor.shape)}, found {shown}"
                )

            if not bool((found.abs() <= _LARGEST).all()):
                raise WireError(f"cnn: {part}.{name}: a value is NaN or beyond {_LARGEST:g}")

            tensor.copy_(found)
