"""Codecs, which turn an update into bytes and back, and the list of them.

The settings of a codec say what it costs and what is lost. Every frame has 12 bytes of header and
checksum besides; where there is a rate, they are within it.
"""

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, TypeAdapter, ValidationError

from fluvial.codecs.auto import AutoSettings
from fluvial.codecs.base import Codec, CodecSettings
from fluvial.codecs.dct import DctTopK, DctTopKSettings
from fluvial.codecs.klt.codec import Klt
from fluvial.codecs.klt.settings import KltSettings
from fluvial.codecs.klt.sum import KltSum, KltSumSettings
from fluvial.codecs.klt.trellis import KltTrellis, KltTrellisSettings
from fluvial.codecs.learned.cnn import CNN
from fluvial.codecs.learned.cnn_signals import CNNSettings
from fluvial.codecs.learned.resnet import ResNet, ResNetSettings
from fluvial.codecs.learned.vq import VQ, VQSettings
from fluvial.codecs.lowrank import PowerSgd, PowerSgdSettings
from fluvial.codecs.quantise import (
    NF4,
    BFloat16,
    BFloat16Settings,
    Identity,
    IdentitySettings,
    Int4,
    Int4Settings,
    Int8,
    Int8Settings,
    NF4Settings,
)
from fluvial.codecs.rotated.eden import Eden, EdenSettings
from fluvial.codecs.rotated.hadamard import Hadamard, HadamardSettings
from fluvial.codecs.rotated.trellis import Trellis, TrellisSettings
from fluvial.codecs.sign import (
    HalfSign,
    HalfSignSettings,
    Sign,
    SignSettings,
    Ternary,
    TernarySettings,
)
from fluvial.codecs.sparse.largest import TopK, TopKSettings
from fluvial.codecs.sparse.random_k import RandomK, RandomKSettings
from fluvial.errors import ConfigError, WireError
from fluvial.wire.tensors import Layout

__all__ = [
    "CODECS",
    "Codec",
    "CodecConfig",
    "CodecSettings",
    "build",
    "must_learn",
    "read_settings",
]

_LIST: tuple[tuple[type[CodecSettings], type[Codec]], ...] = (
    (IdentitySettings, Identity),
    (BFloat16Settings, BFloat16),
    (Int8Settings, Int8),
    (Int4Settings, Int4),
    (NF4Settings, NF4),
    (TopKSettings, TopK),
    (RandomKSettings, RandomK),
    (SignSettings, Sign),
    (HalfSignSettings, HalfSign),
    (TernarySettings, Ternary),
    (HadamardSettings, Hadamard),
    (EdenSettings, Eden),
    (TrellisSettings, Trellis),
    (DctTopKSettings, DctTopK),
    (PowerSgdSettings, PowerSgd),
    (ResNetSettings, ResNet),
    (CNNSettings, CNN),
    (VQSettings, VQ),
    (KltSettings, Klt),
    (KltTrellisSettings, KltTrellis),
    (KltSumSettings, KltSum),
)
"""Every codec, each once, with the settings that choose it."""

CODECS: dict[str, type[Codec]] = {
    settings.model_fields["name"].default: codec for settings, codec in _LIST
}
"""Codecs by their name in a configuration; "auto" is a choice among them."""

if TYPE_CHECKING:
    CodecConfig = CodecSettings
else:
    CodecConfig = Annotated[
        Union[*(settings for settings, _ in _LIST), AutoSettings], Field(discriminator="name")
    ]
    """The `[codec]` table of a configuration, a closed union that is built here."""

_SETTINGS: TypeAdapter[CodecSettings] = TypeAdapter(CodecConfig)


def read_settings(values: dict[str, Any]) -> CodecSettings:
    """Return the settings from a message or a table; raises `WireError`."""
    try:
        return _SETTINGS.validate_python(values)
    except ValidationError as error:
        raise WireError(f"codec settings {values!r:.200}: {error.errors()[0]['msg']}") from None


def must_learn(settings: CodecSettings) -> bool:
    """Return whether nothing can be coded before updates were seen: a learned codec, or one still
    to be chosen."""
    return isinstance(settings, AutoSettings) or CODECS[settings.name].learned


def build(settings: CodecSettings, layout: Layout) -> Codec:
    """Return the codec for updates of `layout`; raises `ConfigError` if it needs a fit or cannot
    meet its rate."""
    if must_learn(settings):
        ready = ", ".join(name for name, other in CODECS.items() if not other.learned)
        raise ConfigError(
            f"codec.name={settings.name!r} is learned and has not been fitted; "
            f"use it with a method that fits it, or choose one of {ready}"
        )

    return CODECS[settings.name](settings, layout)
