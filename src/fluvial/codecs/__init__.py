"""Codecs: what turns an update into bytes and back. One table says which there are.

    name       bytes per value             what is lost
    identity   4                           nothing
    bf16       2                           relative error up to 2^-8
    int8       1 + 2 / block_size          up to 1/254 of the largest value of a block
    int4       1/2 + 2 / block_size        up to 1/14 of the largest value of a block
    nf4        1/2 + 2 / block_size        between the 16 levels of a Gaussian
    top_k      4 / rate                    all but the largest values; bits of those
    random_k   4 / rate                    all but values at random positions; bits of those
    sign       1/8                         magnitudes
    half_sign  share / 8                   magnitudes, and all but values at random positions
    ternary    4 / rate                    magnitudes, and values in a dead zone
    hadamard   4 / rate                    what a dead-zone quantiser loses on rotated, hence Gaussian, values
    trellis    4 / rate                    less than hadamard: rotated values are coded jointly, not one by one
    eden       4 / rate                    nothing on average over seeds; more than the others in one update
    dct_top_k  4 / rate                    all but the largest cosine coefficients
    powersgd   4 / rate                    all but the leading singular directions
    resnet     4 / 2^stages, and scales    what its autoencoder did not learn (the paper's; needs a fit)
    cnn        4 / rate                    what a 1-D autoencoder did not learn (needs a fit)
    vq         4 / rate                    the difference to the nearest of some learned vectors (needs a fit)
    klt        4 / rate                    what is small in the basis it learned (needs a fit)
    klt_trellis 4 / rate                   the same, coded jointly, with variances that follow error feedback
    klt_sum    4 / rate                    the same, more of it; but frames can be added up unread (needs a fit)
    auto       what was asked for          chosen by measurement among the better ones

Add to each 12 bytes of frame, to sign and half_sign 2 bytes of scale per tensor, and to half_sign 8
of seed. Where there is a rate, all of that is within it.
"""

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from fluvial.codecs.auto import AutoSettings
from fluvial.codecs.base import Codec, CodecSettings
from fluvial.codecs.dct import DctTopK, DctTopKSettings
from fluvial.codecs.klt.codec import Klt, KltSettings
from fluvial.codecs.klt.sum import KltSum, KltSumSettings
from fluvial.codecs.klt.trellis import KltTrellis, KltTrellisSettings
from fluvial.codecs.learned.cnn import CNN, CNNSettings
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
from fluvial.codecs.rotation import Eden, EdenSettings, Hadamard, HadamardSettings
from fluvial.codecs.sign import (
    HalfSign,
    HalfSignSettings,
    Sign,
    SignSettings,
    Ternary,
    TernarySettings,
)
from fluvial.codecs.sparse import RandomK, RandomKSettings, TopK, TopKSettings
from fluvial.codecs.trellis import Trellis, TrellisSettings
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

CODECS: dict[str, type[Codec]] = {
    "identity": Identity,
    "bf16": BFloat16,
    "int8": Int8,
    "int4": Int4,
    "nf4": NF4,
    "top_k": TopK,
    "random_k": RandomK,
    "sign": Sign,
    "half_sign": HalfSign,
    "ternary": Ternary,
    "hadamard": Hadamard,
    "eden": Eden,
    "trellis": Trellis,
    "dct_top_k": DctTopK,
    "powersgd": PowerSgd,
    "resnet": ResNet,
    "cnn": CNN,
    "vq": VQ,
    "klt": Klt,
    "klt_trellis": KltTrellis,
    "klt_sum": KltSum,
}
"""Every codec by its name in a configuration; "auto" is a choice among them."""

CodecConfig = Annotated[
    IdentitySettings
    | BFloat16Settings
    | Int8Settings
    | Int4Settings
    | NF4Settings
    | TopKSettings
    | RandomKSettings
    | SignSettings
    | HalfSignSettings
    | TernarySettings
    | HadamardSettings
    | EdenSettings
    | TrellisSettings
    | DctTopKSettings
    | PowerSgdSettings
    | ResNetSettings
    | CNNSettings
    | VQSettings
    | KltSettings
    | KltTrellisSettings
    | KltSumSettings
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
    """Whether nothing can be coded before updates were seen: a learned codec, or one still to be
    chosen."""
    return isinstance(settings, AutoSettings) or CODECS[settings.name].learned


def build(settings: CodecSettings, layout: Layout) -> Codec:
    """The codec for updates of `layout`; raises `ConfigError` if it needs a fit or cannot meet its
    rate."""
    if must_learn(settings):
        ready = ", ".join(name for name, other in CODECS.items() if not other.learned)
        raise ConfigError(
            f"codec.name={settings.name!r} is learned and has not been fitted; "
            f"use it with a method that fits it, or choose one of {ready}"
        )

    return CODECS[settings.name](settings, layout)
