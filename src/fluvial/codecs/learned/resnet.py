"""The autoencoder of CG-FedLLM ("ResNet-3"): a convolutional network over the canvas of all LoRA
factors.

Paper: How to Compress Gradients in Federated Fine-tuning for LLMs, Table 3 (Wu et al., ECAI 2025,
arXiv 2405.13746). A site runs the encoder, the server the decoder; the latent has 1/2^stages of the
canvas's cells, 1/64 in the paper. It is here to reproduce the paper; for a learned codec that
carries real updates see `klt`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from fluvial.codecs.base import CodecSettings, LatentCodec, require_updates
from fluvial.codecs.learned.canvas import Canvas, Mode
from fluvial.codecs.learned.published import load_networks
from fluvial.codecs.learned.resnet_networks import build_decoder, build_encoder
from fluvial.codecs.learned.resnet_training import TrainingSettings, train
from fluvial.codecs.normalise import (
    BYTES_PER_SCALE,
    Normalisation,
    denormalise,
    measure,
    normalise,
    read_scales,
    scale_count,
    write_scales,
)
from fluvial.errors import ConfigError, WireError
from fluvial.settings import EXACT
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named

_LATENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


class ResNetSettings(TrainingSettings):
    """The autoencoder of CG-FedLLM (it needs a fit); defaults are the paper's, where it states one,
    but for the learning rate.

    Bytes per value: 4 / 2^stages, and scales. Lost: what the autoencoder did not learn.
    """

    name: Literal["resnet"] = "resnet"
    stages: Annotated[Literal[2, 4, 6, 8], EXACT] = 6
    """Halvings of the canvas; the latent is 1/4, 1/16, 1/64 (the paper) or 1/256 of the canvas."""
    canvas: Mode = "square"
    """"square" is the paper's; "grouped" (ours) pads, so it takes grouped-query attention and any
    size."""
    normalise: Normalisation = "factor_rms"
    """Scales by which an update is divided before the encoder: "none", one for all values (by their
    RMS, or "maxabs" by the largest magnitude), or one for every factor of every module and layer.
    Ours: the paper states none."""
    latent_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """Type of the latent's values on the wire."""

    @property
    def fit_iterations(self) -> int:
        """Return `iterations`."""
        return self.iterations


@dataclass(frozen=True)
class FrameBytes:
    """Bytes of every frame, whatever the update."""

    latent: int
    scales: int
    header: int

    @property
    def total(self) -> int:
        """Bytes of the whole frame, `len(encode(...))`."""
        return self.latent + self.scales + self.header


def frame_bytes(settings: ResNetSettings, layout: Layout) -> FrameBytes:
    """Return the size of a frame, from the layout alone; raises `ConfigError` if the layout has no
    canvas."""
    cells = Canvas(layout, settings.canvas, settings.stages).numel // 2**settings.stages
    scales = scale_count(layout, settings.normalise) + (settings.latent_dtype == "int8")

    return FrameBytes(
        cells * _LATENT_BYTES[settings.latent_dtype], scales * BYTES_PER_SCALE, OVERHEAD
    )


class ResNet(LatentCodec):
    """Body: scales (bf16), for int8 the latent's step (bf16), latent of every canvas."""

    code = 10

    def __init__(
        self,
        settings: CodecSettings,
        layout: Layout,
        encoder: nn.Sequential,
        decoder: nn.Sequential | None,
    ) -> None:
        assert isinstance(settings, ResNetSettings)
        super().__init__(settings, layout)
        self.settings: ResNetSettings = settings
        self.canvas = Canvas(layout, settings.canvas, settings.stages)
        self.encoder = encoder.eval().requires_grad_(False)
        self.decoder = None if decoder is None else decoder.eval().requires_grad_(False)
        self.loss_curve: list[tuple[int, float]] = []
        """(iteration, mean squared error on normalised canvases) of `fit`; empty after
        `from_published`."""

    @classmethod
    def fit(
        cls, settings: CodecSettings, layout: Layout, updates: Sequence[Named], *, seed: int
    ) -> Self:
        """Train one autoencoder for all clients and layers, on the GPU if there is one; coding is
        on the CPU."""
        assert isinstance(settings, ResNetSettings)
        require_updates(settings, updates)

        canvas = Canvas(layout, settings.canvas, settings.stages)
        samples = [
            canvas.pack(_normalised(layout.flatten(update), layout, settings)) for update in updates
        ]
        trained = train(settings, canvas, samples, seed=seed)
        codec = cls(settings, layout, trained.encoder, trained.decoder)
        codec.loss_curve = trained.loss_curve
        return codec

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of every frame, exactly."""
        assert isinstance(settings, ResNetSettings)
        return frame_bytes(settings, layout).total

    def published(self, *, decoder: bool) -> Payload:
        """Return the weights and running statistics, fp32: 0.94 MiB of encoder, as much of
        decoder."""
        tensors = _weights("encoder", self.encoder)
        if decoder:
            assert self.decoder is not None, "a codec without decoder cannot publish one"
            tensors |= _weights("decoder", self.decoder)

        return Payload(tensors)

    @classmethod
    def from_published(cls, settings: CodecSettings, layout: Layout, payload: Payload) -> Self:
        """Rebuild the codec; raises `WireError` if weights are missing, left over, of another
        shape, or not finite."""
        assert isinstance(settings, ResNetSettings)

        with torch.random.fork_rng(devices=[]):
            encoder = build_encoder(settings.stages)
            decoder = build_decoder(settings.stages)

        has_decoder = load_networks("resnet", encoder, decoder, payload, _fault)
        return cls(settings, layout, encoder, decoder if has_decoder else None)

    def analyse(self, vector: Tensor) -> Tensor:
        """Return the latent (canvas cells / 2^stages,) fp32, canvas after canvas."""
        canvases = self.canvas.pack(_normalised(vector, self.layout, self.settings))
        with torch.no_grad():
            return torch.cat([self.encoder(canvas[None, None]).reshape(-1) for canvas in canvases])

    @classmethod
    def side_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return two bytes for every scale."""
        assert isinstance(settings, ResNetSettings)
        return BYTES_PER_SCALE * scale_count(layout, settings.normalise)

    def side(self, vector: Tensor) -> bytes:
        """Return the scales by which `analyse` divides the update."""
        return write_scales(measure(vector, self.layout, self.settings.normalise))

    def pack(self, latent: Tensor, side: bytes = b"") -> bytes:
        """Return `side`, then the latent in `latent_dtype`."""
        kind = self.settings.latent_dtype
        if kind == "int8":
            step = (latent.abs().max() / 127).bfloat16()
            divisor = step.float() if step > 0 else torch.tensor(1.0)
            levels = torch.round(latent / divisor).clamp(-127, 127).to(torch.int8)
            return side + write_scales(step[None]) + levels.numpy().tobytes()

        if kind == "bfloat16":
            return side + latent.bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()
        if kind == "float16":
            largest = torch.finfo(torch.float16).max
            return side + latent.clamp(-largest, largest).numpy().astype("<f2").tobytes()

        return side + latent.numpy().astype("<f4").tobytes()

    def parse(self, reader: Reader) -> Tensor:
        """Run the decoder; raises `ConfigError` on a site that did not download it."""
        if self.decoder is None:
            raise ConfigError(
                "codec: this site holds only the encoder of resnet; decoding needs "
                "published(decoder=True)"
            )

        scales = read_scales(reader, scale_count(self.layout, self.settings.normalise))
        latent = self._read_latent(reader)
        if not bool(torch.isfinite(latent).all()):
            raise WireError("frame: NaN or Inf in the latent")

        stages = self.settings.stages
        canvases = []
        channels = 2**stages
        grids = [(rows >> stages, cols >> stages) for rows, cols in self.canvas.shapes]
        pieces = torch.split(latent, [channels * height * width for height, width in grids])

        with torch.no_grad():
            for piece, grid in zip(pieces, grids, strict=True):
                canvases.append(self.decoder(piece.reshape(1, channels, *grid))[0, 0])

        return denormalise(
            self.canvas.unpack(canvases), scales, self.layout, self.settings.normalise
        )

    def _read_latent(self, reader: Reader) -> Tensor:
        count = self.canvas.numel // 2**self.settings.stages
        kind = self.settings.latent_dtype
        if kind == "int8":
            step = read_scales(reader, 1).float()
            return torch.from_numpy(reader.array("i1", count).astype(np.float32)) * step

        if kind == "bfloat16":
            return (
                torch.from_numpy(reader.array("i2", count).astype(np.int16))
                .view(torch.bfloat16)
                .float()
            )

        return torch.from_numpy(
            reader.array("f2" if kind == "float16" else "f4", count).astype(np.float32)
        )


def _normalised(vector: Tensor, layout: Layout, settings: ResNetSettings) -> Tensor:
    return normalise(
        vector, measure(vector, layout, settings.normalise), layout, settings.normalise
    )


def _weights(part: str, network: nn.Module) -> Named:
    return {
        f"{part}.{name}": tensor
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }


def _fault(name: str, tensor: Tensor) -> str | None:
    negative = name.endswith("running_var") and bool((tensor < 0).any())
    if negative or not bool(torch.isfinite(tensor).all()):
        return "NaN, Inf or a negative variance"

    return None
