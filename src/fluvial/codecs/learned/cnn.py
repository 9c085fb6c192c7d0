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

import math
import zlib
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fluvial.codecs import entropy
from fluvial.codecs.base import CodecSettings, LatentCodec, require_updates
from fluvial.codecs.learned.cnn_networks import STRIDE, build_decoder, build_encoder
from fluvial.codecs.learned.cnn_signals import (
    CNNSettings,
    body_bytes,
    is_b,
    normalised,
    num_channels,
    padded,
    rank_of,
    signals_of,
    to_signals,
)
from fluvial.codecs.learned.cnn_tables import THRESHOLD, tables
from fluvial.codecs.learned.cnn_training import train
from fluvial.codecs.learned.published import load_networks
from fluvial.codecs.normalise import (
    BYTES_PER_SCALE,
    denormalise,
    measure,
    read_scales,
    scale_count,
    write_scales,
)
from fluvial.errors import ConfigError, WireError
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named

LEVELS = 127
"""The largest level of the latent."""
_LARGEST = 1e4
"""The largest magnitude of a published weight."""


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
        self._channels = num_channels(layout, settings)
        self._grids = [-(-features // STRIDE) for _, features in signals_of(layout)]
        self._groups = np.concatenate(
            [
                np.repeat(
                    np.arange(self._channels, dtype=np.int32) + self._channels * is_b(name), grid
                )
                for (name, _), grid in zip(layout.shapes, self._grids, strict=True)
            ]
        )
        self._body_bytes = body_bytes(settings, layout)
        digest = layout.fingerprint

        for tensor in encoder.state_dict().values():
            digest = zlib.crc32(tensor.numpy().astype("<f4").tobytes(), digest)
        self._fingerprint = digest

    @property
    def fingerprint(self) -> int:
        """CRC-32 of the layout and of the encoder, which both ends hold."""
        return self._fingerprint

    @classmethod
    def fit(
        cls, settings: CodecSettings, layout: Layout, updates: Sequence[Named], *, seed: int
    ) -> Self:
        """Train one autoencoder for all factors, on the CPU; every update counts the same."""
        assert isinstance(settings, CNNSettings)
        require_updates(settings, updates)

        body_bytes(settings, layout)
        trained = train(settings, layout, updates, seed=seed)
        codec = cls(settings, layout, trained.encoder, trained.decoder)
        codec.loss_curve = trained.loss_curve
        return codec

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of a frame, at most: 4 * values / rate."""
        assert isinstance(settings, CNNSettings)
        return body_bytes(settings, layout) + OVERHEAD

    def published(self, *, decoder: bool) -> Payload:
        """Return the weights, fp32."""
        tensors = {f"encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        if decoder:
            assert self.decoder is not None, "a codec without decoder cannot publish one"
            tensors |= {
                f"decoder.{name}": tensor for name, tensor in self.decoder.state_dict().items()
            }

        return Payload(tensors)

    @classmethod
    def from_published(cls, settings: CodecSettings, layout: Layout, payload: Payload) -> Self:
        """Rebuild the codec; raises `WireError` if weights are missing, left over, of another
        shape, or out of range."""
        assert isinstance(settings, CNNSettings)
        shape = rank_of(layout), num_channels(layout, settings), settings.hidden

        with torch.random.fork_rng(devices=[]):
            encoder = build_encoder(*shape)
            decoder = build_decoder(*shape)

        has_decoder = load_networks("cnn", encoder, decoder, payload, _fault)
        return cls(settings, layout, encoder, decoder if has_decoder else None)

    def analyse(self, vector: Tensor) -> Tensor:
        """Return the latent, fp32, in units of the step that `fit` had; factor after factor,
        channel after channel."""
        with torch.no_grad():
            signals = to_signals(normalised(vector, self.layout, self.settings), self.layout)
            return torch.cat([self.encoder(padded(x)[None]).reshape(-1) for x in signals])

    @classmethod
    def side_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return two bytes for every scale."""
        assert isinstance(settings, CNNSettings)
        return BYTES_PER_SCALE * scale_count(layout, settings.normalise)

    def side(self, vector: Tensor) -> bytes:
        """Return the scales by which `analyse` divides the update."""
        return write_scales(measure(vector, self.layout, self.settings.normalise))

    def pack(self, latent: Tensor, side: bytes = b"") -> bytes:
        """Quantise with the finest step whose frame is within the rate."""
        values = latent.double().numpy()
        peak = float(np.abs(values).max(initial=0.0))
        coarse = math.log2(max(peak, 1e-30)) + 1  # everything becomes 0
        fine = coarse - 8  # nothing is clipped
        room = 8 * (self._body_bytes - len(side) - 2 - 2 * self._channels - 4)

        for _ in range(14):
            middle = (fine + coarse) / 2
            if self._bits(values, middle) > room:
                fine = middle
            else:
                coarse = middle

        while len(body := self._write(values, coarse)) + len(side) > self._body_bytes:
            coarse += 0.02
        return side + body

    def parse(self, reader: Reader) -> Tensor:
        """Run the decoder; raises `ConfigError` on a site that did not download it."""
        if self.decoder is None:
            raise ConfigError(
                "codec: this site holds only the encoder of cnn; decoding needs "
                "published(decoder=True)"
            )

        scales = read_scales(reader, scale_count(self.layout, self.settings.normalise))
        step = float(read_scales(reader, 1)[0])
        frequencies, centroids = tables()
        classes = reader.array("u1", 2 * self._channels).astype(np.int64)

        if int(classes.max()) >= len(frequencies):
            raise WireError(
                f"frame: class {classes.max()} of the latent, expected at most "
                f"{len(frequencies) - 1}"
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

        if int(np.abs(levels).max()) > LEVELS:
            raise WireError(f"frame: latent beyond {LEVELS}")

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
                values.append((x[:, : shape[0]].T if is_b(name) else x[:, : shape[1]]).reshape(-1))

        largest = torch.finfo(torch.float32).max
        vector = denormalise(torch.cat(values), scales, self.layout, self.settings.normalise)
        return vector.clamp(-largest, largest)

    def _quantise(
        self, values: NDArray[np.float64], octaves: float
    ) -> tuple[float, NDArray[np.int64], NDArray[np.int64]]:
        """Return the step as it is sent, levels of the latent, class of every group of channels."""
        step = float(torch.tensor(2.0**octaves).bfloat16())
        power = np.bincount(self._groups, values**2, 2 * self._channels)
        number = np.maximum(np.bincount(self._groups, minlength=2 * self._channels), 1)
        loud = np.rint(2 * np.log2(np.maximum(power / number, 1e-80) / step**2))
        levels = np.copysign(
            np.minimum(np.floor(np.abs(values) / step + (1 - THRESHOLD)), LEVELS), values
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


def _fault(_name: str, tensor: Tensor) -> str | None:
    if bool((tensor.abs() <= _LARGEST).all()):
        return None

    return f"a value is NaN or beyond {_LARGEST:g}"
