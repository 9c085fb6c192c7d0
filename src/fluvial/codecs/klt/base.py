"""The base classes of codecs around the learned Karhunen-Loeve transform: fit, epoch, and what is
published.

The encoder is the decoder: whoever can encode can decode.
"""

import zlib
from collections.abc import Sequence
from typing import Self

from pydantic import Field

from fluvial.codecs.base import (
    AdaptiveCodec,
    CodecSettings,
    LearnedCodec,
    RateSettings,
    require_updates,
)
from fluvial.codecs.klt.factors import factors_of
from fluvial.codecs.klt.learn import learn
from fluvial.codecs.klt.model import Model
from fluvial.codecs.klt.moments import MomentCodec, Moments
from fluvial.codecs.klt.transform import Transform
from fluvial.errors import ConfigError, WireError
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named

_EPOCHS = 256
"""Epochs before their number starts again at 0."""


class TransformSettings(RateSettings):
    """The settings of every codec with this transform."""

    basis_share: float = Field(0.25, ge=1e-6, le=1)
    """Feature directions that are published, as a share of the features; the others need no
    bytes."""


class TransformCodec(LearnedCodec):
    """A codec of coefficients of the learned transform."""

    settings: TransformSettings

    def __init__(
        self, settings: CodecSettings, layout: Layout, model: Model, *, epoch: int = 0
    ) -> None:
        assert isinstance(settings, TransformSettings)
        super().__init__(settings, layout)
        self.model = model
        self.epoch = epoch
        """Number of refits of the transform, modulo 256."""
        self.factors = factors_of(layout)
        self.num_groups = 1 + max(factor.group for factor in self.factors)
        """Groups (target, factor) of the layout."""
        self.transform = Transform(self.factors, settings.basis_share, model)

    @classmethod
    def fit(
        cls,
        settings: CodecSettings,
        layout: Layout,
        updates: Sequence[Named],
        *,
        seed: int,  # noqa: ARG003
    ) -> Self:
        """Return the principal directions and variances of `updates`; every update counts the
        same."""
        assert isinstance(settings, TransformSettings)
        require_updates(settings, updates)
        cls.frame_size(settings, layout)
        return cls(settings, layout, learn(layout, settings.basis_share, updates))

    def published(self, *, decoder: bool) -> Payload:  # noqa: ARG002 - the encoder is the decoder
        """Return the model, mostly `basis_share` of every feature axis at one byte per value, and
        the epoch."""
        return Payload(self.model.named(), {"epoch": self.epoch})

    @classmethod
    def from_published(cls, settings: CodecSettings, layout: Layout, payload: Payload) -> Self:
        """Rebuild the codec; raises `WireError` if something is missing, left over, or of another
        type, length or range."""
        assert isinstance(settings, TransformSettings)
        epoch = payload.value("epoch", int)

        if not 0 <= epoch < _EPOCHS:
            raise WireError(f"{settings.name}: epoch {epoch} is not within 0 and {_EPOCHS - 1}")

        return cls(
            settings, layout, Model.check(layout, settings.basis_share, payload), epoch=epoch
        )

    def at_rate(self, rate: float) -> Self:
        """Return this codec at another rate, with the same transform."""
        settings = self.settings.model_copy(update={"rate": rate})
        return type(self)(settings, self.layout, self.model, epoch=self.epoch)

    def checksum(self, marks: bytes) -> int:
        """Return the CRC-32 of `marks` and of the model that is published."""
        tensors = [tensor.numpy().tobytes() for _, tensor in sorted(self.model.named().items())]
        return zlib.crc32(b"".join([marks, *tensors]))


class AdaptiveTransformCodec(TransformCodec, AdaptiveCodec, MomentCodec):
    """A codec whose transform can follow the updates of a run, and be fitted to moments."""

    @classmethod
    def fit_moments(cls, settings: CodecSettings, layout: Layout, moments: Moments) -> Self:
        """Return the principal directions and variances alone; moments hold no histogram, so that
        entropy tables, where there are any, stay generic."""
        assert isinstance(settings, TransformSettings)
        cls.frame_size(settings, layout)
        return cls(settings, layout, moments.fit(layout, settings.basis_share))

    def refit(self, updates: Sequence[Named], *, weight: float) -> Self:
        """Return the codec of the next epoch, for updates like `updates`, such as decoded ones or
        broadcast means.

        Their covariance counts `weight` (0 to 1), this codec's own the rest; entropy tables stay. A
        function of what is published and of `updates` alone, so that both ends can compute it.
        """
        if not updates:
            raise ConfigError(f"codec: {self.settings.name} has no updates to refit to")

        model = learn(
            self.layout, self.settings.basis_share, updates, prior=self.model, weight=weight
        )
        return type(self)(self.settings, self.layout, model, epoch=(self.epoch + 1) % _EPOCHS)
