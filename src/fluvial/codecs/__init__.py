"""Codecs: what turns an update into bytes and back. One table says which there are.

    name       bytes per value             what is lost
    identity   4                           nothing
    bf16       2                           relative error up to 2^-8
    int8       1 + 2 / block_size          up to 1/254 of the largest value of a block
    int4       1/2 + 2 / block_size        up to 1/14 of the largest value of a block
    top_k      4 / rate                    all but the largest values; 8 bits of those
    random_k   4 / rate                    all but values at random positions; 8 bits of those
    sign       1/8                         magnitudes
    half_sign  share / 8                   magnitudes, and all but values at random positions
    ternary    4 / rate                    magnitudes, and values in a dead zone
    resnet     4 / 2^stages, and scales    what its autoencoder did not learn (the paper's; needs a fit)
    linear     4 / rate                    what is small in the basis it learned (needs a fit)

Add to each 12 bytes of frame, to sign and half_sign 2 bytes of scale per tensor, and to half_sign 8 of seed.
Where there is a rate, all of that is within it.
"""

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from fluvial.codecs.auto import AutoSettings
from fluvial.codecs.base import Codec, CodecSettings
from fluvial.codecs.linear import Linear, LinearSettings
from fluvial.codecs.quantise import (
    BFloat16,
    BFloat16Settings,
    Identity,
    IdentitySettings,
    Int4,
    Int4Settings,
    Int8,
    Int8Settings,
)
from fluvial.codecs.resnet import ResNet, ResNetSettings
from fluvial.codecs.sign import HalfSign, HalfSignSettings, Sign, SignSettings, Ternary, TernarySettings
from fluvial.codecs.sparse import RandomK, RandomKSettings, TopK, TopKSettings
from fluvial.errors import ConfigError, WireError
from fluvial.tensors import Layout

__all__ = ["CODECS", "Codec", "CodecConfig", "CodecSettings", "build", "must_learn", "read_settings"]

CODECS: dict[str, type[Codec]] = {
    "identity": Identity,
    "bf16": BFloat16,
    "int8": Int8,
    "int4": Int4,
    "top_k": TopK,
    "random_k": RandomK,
    "sign": Sign,
    "half_sign": HalfSign,
    "ternary": Ternary,
    "resnet": ResNet,
    "linear": Linear,
}
"""Every codec by its name in a configuration."""

CodecConfig = Annotated[
    IdentitySettings
    | BFloat16Settings
    | Int8Settings
    | Int4Settings
    | TopKSettings
    | RandomKSettings
    | SignSettings
    | HalfSignSettings
    | TernarySettings
    | ResNetSettings
    | LinearSettings
    | AutoSettings,
    Field(discriminator="name"),
]
"""The `[codec]` table of a configuration."""


_SETTINGS: TypeAdapter[Any] = TypeAdapter(CodecConfig)


def read_settings(values: dict[str, Any]) -> Any:
    """Settings from a message or a table; raises `WireError`."""
    try:
        return _SETTINGS.validate_python(values)
    except ValidationError as error:
        raise WireError(f"codec settings {values!r:.200}: {error.errors()[0]['msg']}") from None


def must_learn(settings: CodecSettings) -> bool:
    """Whether nothing can be coded before updates were seen: a learned codec, or one still to be chosen."""
    return isinstance(settings, AutoSettings) or CODECS[settings.name].learned


def build(settings: CodecSettings, layout: Layout) -> Codec:
    """The codec for updates of `layout`; raises `ConfigError` if it needs a fit or cannot meet its rate."""
    if must_learn(settings):
        ready = ", ".join(name for name, other in CODECS.items() if not other.learned)
        raise ConfigError(
            f"codec.name={settings.name!r} is learned and has not been fitted; "
            f"use it with a method that fits it, or choose one of {ready}"
        )
    return CODECS[settings.name](settings, layout)
