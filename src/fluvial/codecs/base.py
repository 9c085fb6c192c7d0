"""The interface of codecs: two pure functions, and for a codec that learns, a fit that makes one.

`decode` needs nothing but the bytes, and what the codec was built from: its settings, the layout
and, for a learned codec, what was published. Error feedback is state of a site around a codec and
not the codec's business.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from annotated_types import Ge
from pydantic import Field
from torch import Tensor

from fluvial.errors import ConfigError, WireError, wrong_return
from fluvial.settings import Settings
from fluvial.wire.frame import OVERHEAD, Reader, seal, unseal
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named

OWN_CODES = range(64, 256)
"""Numbers of codecs outside the package; a frame has one byte for the number."""


class CodecSettings(Settings):
    """The settings that all codecs share."""

    name: str
    """Name of the codec."""
    error_feedback: bool = False
    """Error feedback: sites keep what the codec lost, and add it to their next update."""
    feedback_decay: float = Field(0.9, ge=0, le=1)
    """Factor on the residual of error feedback for every round that a site missed, because an older
    residual refers to an older adapter."""
    weighted: bool = False
    """Scaling of each LoRA factor by its partner before it is coded; it costs no byte."""

    @property
    def fit_iterations(self) -> int | None:
        """Number of iterations of the fit before round 1; None for a codec without any."""
        return None

    @property
    def without_bias(self) -> bool:
        """True where the mean over seeds of what is decoded is the update; the mean over sites then
        repays its error."""
        return False

    @property
    def snr_driven(self) -> bool:
        """True where the server sets the rate of each round by the noise that sites report."""
        return False


class SnrDrivenSettings(CodecSettings):
    """A codec whose rate may follow its noise."""

    snr_db: float | None = Field(None, ge=-20, le=30)
    """Ratio of signal to the codec's noise in decibels, to which the server sets the rate of every
    round after round 1 by the errors that sites report; unset, `rate` holds in every round."""
    noise_ratio: float | None = Field(None, ge=1e-6, le=1e6)
    """Ratio of the codec's noise to the variance between sites, to which the server sets the rate
    of every round after round 1; unset, `rate` holds in every round."""

    @property
    def snr_driven(self) -> bool:
        """See `CodecSettings.snr_driven`."""
        return self.snr_db is not None or self.noise_ratio is not None

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.snr_db is not None and self.noise_ratio is not None:
            yield "snr_db: noise_ratio sets the rate too; remove one of the two"
        if self.snr_db is not None and self.snr_db <= 0 and not self.without_bias:
            yield (
                f"snr_db={self.snr_db:g}: sending nothing has 0 dB; choose a positive number, or a "
                "codec without bias"
            )


class RateSettings(CodecSettings):
    """A codec with a byte target."""

    rate: float = Field(64, ge=1, le=1e6)
    """Times smaller than fp32: a frame, its header included, has at most 4 * numel / rate bytes."""


def lowest_rate(settings: CodecSettings) -> float:
    """Return the lowest rate that settings with a rate may have."""
    limits = type(settings).model_fields["rate"].metadata
    bounds: list[Any] = [each.ge for each in limits if isinstance(each, Ge)]
    return max(map(float, bounds), default=1.0)


def body_room(layout: Layout, settings: RateSettings, least: int) -> int:
    """Return the bytes of body within 4 * numel / rate bytes of frame; raises `ConfigError` if that
    is under `least`."""
    frame = int(layout.raw_bytes / settings.rate)
    need = OVERHEAD + least

    if frame < need:
        most = math.floor(layout.raw_bytes / need * 1000) / 1000
        lowest = lowest_rate(settings)
        remedy = (
            f"choose at most {most:g}"
            if most >= lowest
            else f"codec {settings.name!r} has no rate below {lowest:g}, so choose one without a "
            "rate, such as 'int8' or 'identity'"
        )
        raise ConfigError(
            f"codec.rate={settings.rate:g} leaves {frame} bytes for {layout.numel} values, but "
            f"header, {len(layout.sizes)} scales and one value need {need}; {remedy}"
        )

    return frame - OVERHEAD


def frame_room(layout: Layout, settings: RateSettings, least: int) -> int:
    """Return the bytes of a frame within 4 * numel / rate bytes; raises `ConfigError` if its body
    has fewer than `least`."""
    return OVERHEAD + body_room(layout, settings, least)


def is_finite(vector: Tensor) -> bool:
    """Return whether no value of a vector (n,) is NaN or infinite; none is if its energy is finite,
    which is quick to see."""
    return math.isfinite(float(vector @ vector)) or bool(torch.isfinite(vector).all())


class Codec(ABC):
    """Codes updates of one layout into bytes and back."""

    code: ClassVar[int]
    """Number in the frame that names the codec; never reused."""
    learned: ClassVar[bool] = False

    exact: ClassVar[bool] = False
    """True where every frame has the bytes that `frame_size` tells; else it is at most so long."""

    fills: ClassVar[bool] = True
    """True where every frame has about these bytes, unless most values of the update are zero; else
    an update of few directions or other distribution needs fewer."""

    def __init__(self, settings: CodecSettings, layout: Layout) -> None:
        self.settings = settings
        self.layout = layout
        self.loss_curve: list[tuple[int, float]] = []
        """Iteration and loss of the fit, where the codec is trained by gradient descent."""

    @classmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:  # noqa: ARG003
        """Return the bytes of one frame, at most, in time and memory that do not grow with the
        values.

        Where a codec says nothing else, these are the bytes of the values as they are. Raises
        `ConfigError` if the layout cannot be coded.
        """
        return OVERHEAD + layout.raw_bytes

    @property
    def fingerprint(self) -> int:
        """Everything that both ends must agree on, as 32 bits in every frame."""
        return self.layout.fingerprint

    def encode(self, update: Named, *, seed: int = 0, round: int = 0) -> bytes:
        """Return the frame for `update`. `seed` drives whatever the codec draws; the same seed
        gives the same bytes."""
        body: object = self.body(self.flat(update), seed)
        if not isinstance(body, bytes | bytearray | memoryview):
            raise ConfigError(wrong_return(f"body of codec {self.settings.name!r}", body, "bytes"))
        return self.seal(bytes(body), round=round)

    def flat(self, update: Named) -> Tensor:
        """Return the flattened update (numel,), fp32, which must be finite."""
        vector = self.layout.flatten(update)
        assert is_finite(vector), "an update with NaN or Inf must not be sent"
        return vector

    def seal(self, body: bytes, *, round: int = 0) -> bytes:
        """Return a frame of this codec around `body`."""
        return seal(self.code, self.fingerprint, body, round=round)

    def decode(self, wire: bytes, *, round: int | None = None) -> Named:
        """Return the update that `wire` carries, fp32; raises `WireError` for anything that
        `encode` did not make.

        With `round`, a frame of another round is refused.
        """
        reader = unseal(wire, self.code, self.fingerprint, round=round)
        vector: object = self.parse(reader)
        reader.finish()

        if not isinstance(vector, Tensor) or vector.shape != (self.layout.numel,):
            shape = f" of shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else ""
            name = f"parse of codec {self.settings.name!r}"
            expected = f"a Tensor of shape ({self.layout.numel},)"
            raise ConfigError(wrong_return(name, vector, expected) + (shape and f", not{shape}"))

        if not is_finite(vector):
            raise WireError("frame: decodes to NaN or Inf")

        return self.layout.unflatten(vector)

    @abstractmethod
    def body(self, vector: Tensor, seed: int) -> bytes:
        """Code the flattened update (numel,), fp32."""

    @abstractmethod
    def parse(self, reader: Reader) -> Tensor:
        """Invert `body`: a vector (numel,), fp32. Raises `WireError`; allocates no more than
        a few updates."""


class RatedCodec(Codec):
    """A codec whose rate the server may set for each round."""

    def at_rate(self, rate: float) -> Self:
        """Return this codec at another rate; raises `ConfigError` where it cannot code there."""
        return type(self)(self.settings.model_copy(update={"rate": rate}), self.layout)


@dataclass(frozen=True)
class Snapshot:
    """One update seen at TGAP: what site `site` changed in round `round`, against the adapter it
    had received."""

    site: str
    round: int
    received: Named
    update: Named


class LearnedCodec(Codec):
    """A codec made by `fit` from snapshots, and rebuilt on the other end from what is published."""

    learned: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def fit(
        cls, settings: CodecSettings, layout: Layout, updates: Sequence[Named], *, seed: int
    ) -> Self:
        """Return a codec for updates like `updates` (each of `layout`); deterministic for a
        seed."""

    @classmethod
    @abstractmethod
    def frame_size(cls, settings: CodecSettings, layout: Layout) -> int:
        """Return the bytes of one frame, at most, known before any fit; raises `ConfigError` if the
        layout cannot be coded."""

    @abstractmethod
    def published(self, *, decoder: bool) -> Payload:
        """Return what a site downloads once: the encoder, and the decoder too if it must decode
        (error feedback)."""

    @classmethod
    @abstractmethod
    def from_published(cls, settings: CodecSettings, layout: Layout, payload: Payload) -> Self:
        """Rebuild from `published`; without a decoder part, `decode` raises. Raises `WireError` if
        shapes are wrong."""


def require_updates(settings: CodecSettings, updates: Sequence[Named]) -> None:
    """Raise `ConfigError` if there is no update to fit a codec to."""
    if not updates:
        raise ConfigError(
            f"codec: {settings.name} has no updates to learn from; TGAP must collect at least one"
        )


class AdaptiveCodec(LearnedCodec):
    """A learned codec that can follow the updates of a run."""

    @abstractmethod
    def refit(self, updates: Sequence[Named], *, weight: float) -> Self:
        """Return a codec for updates like those of the fit and `updates`, which count `weight` (0
        to 1) of the whole.

        Depends on what is published and on `updates` alone, so that both ends can refit without a
        message.
        """


class LatentCodec(LearnedCodec):
    """A learned codec with a real-valued latent between analysis and packing; DP noise can be put
    there."""

    @abstractmethod
    def analyse(self, vector: Tensor) -> Tensor:
        """Return the latent (any 1-D length) of a flattened update (numel,)."""

    @classmethod
    def side_size(
        cls,
        settings: CodecSettings,  # noqa: ARG003 - most send none
        layout: Layout,  # noqa: ARG003 - most send none
    ) -> int:
        """Return the bytes of `side` in every frame: what a frame says of the update beside its
        latent."""
        return 0

    def side(self, vector: Tensor) -> bytes:  # noqa: ARG002 - most send none
        """Return the side information of a flattened update (numel,), such as scales."""
        return b""

    @abstractmethod
    def pack(self, latent: Tensor, side: bytes = b"") -> bytes:
        """Return the body for `latent` (any 1-D length) and the `side` of its update, and of
        nothing else."""

    def body(self, vector: Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """Code the flattened update (numel,); see `Codec.body`."""
        return self.pack(self.analyse(vector), self.side(vector))
