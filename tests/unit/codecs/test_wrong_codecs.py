"""Mistakes in a codec of the user's own, and in the table that configures one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fluvial.codecs.base import Codec
from fluvial.codecs.quantise import Identity, IdentitySettings
from fluvial.codecs.rotated.trellis import TrellisSettings
from fluvial.errors import ConfigError
from fluvial.exchange.downlink import Downlink
from fluvial.wire.frame import Reader
from fluvial.wire.tensors import Layout

LAYOUT = Layout((("a", (2, 3)),))
UPDATE = {"a": torch.ones(2, 3)}


def codec_of(**functions: Any) -> Codec:
    kind = type("Own", (Identity,), functions)
    made: Codec = kind(IdentitySettings(), LAYOUT)
    return made


@pytest.mark.parametrize("value", [None, "text", torch.ones(6)])
def test_a_body_that_is_no_bytes(value: object) -> None:
    def body(_self: Codec, _vector: Tensor, _seed: int) -> object:
        return value

    with pytest.raises(ConfigError, match=r"body of codec 'identity' returned \w+; expected bytes"):
        codec_of(body=body).encode(UPDATE)


@pytest.mark.parametrize("value", [None, 3, [1.0], torch.ones(5), torch.ones(2, 3)])
def test_a_vector_of_another_kind_or_shape(value: object) -> None:
    wire = Identity(IdentitySettings(), LAYOUT).encode(UPDATE)

    def parse(_self: Codec, reader: Reader) -> object:
        reader.take(24)
        return value

    with pytest.raises(ConfigError, match=r"parse of codec 'identity' .* shape \(6,\)"):
        codec_of(parse=parse).decode(wire)


def test_an_error_of_the_downlink_names_its_table() -> None:
    with pytest.raises(ConfigError, match="downlink.rate=5000"):
        Downlink(TrellisSettings(rate=5000), 0, {"layer.lora_A.weight": torch.ones(4, 64)})
