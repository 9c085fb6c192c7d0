"""A codec of one's own: the sign of each value, and one scale for the whole update.

    python -m examples.own_codec

Bernstein et al., "signSGD", ICML 2018, https://arxiv.org/abs/1802.04434. One bit for each value;
the scale is the mean absolute value, so the error is never larger than the update and error
feedback is safe. docs/adding-a-codec.md builds another codec as a part of the package.
"""

import math
import struct
import tempfile
from typing import ClassVar, Literal

import numpy as np
import torch

import fluvial


class OneScaleSettings(fluvial.CodecSettings):
    """One bit for each value, and one scale."""

    name: Literal["one_scale"] = "one_scale"


class OneScale(fluvial.Codec):
    """Signs times the mean absolute value. Body: fp32 scale, then eight signs a byte."""

    code: ClassVar[int] = 65

    def __init__(self, settings: OneScaleSettings, layout: fluvial.Layout) -> None:
        super().__init__(settings, layout)

    def body(self, vector: torch.Tensor, seed: int) -> bytes:  # noqa: ARG002 - nothing is drawn
        """Return the coded `vector` (values,)."""
        values = vector.numpy()
        scale = np.abs(values).mean(dtype=np.float64) if values.size else 0.0
        signs = np.packbits(values >= 0)
        return struct.pack("<f", scale) + signs.tobytes()

    def parse(self, reader: fluvial.Reader) -> torch.Tensor:
        """Return the decoded vector (values,); raises `WireError` for a scale that cannot be."""
        scale = float(reader.array("f4", 1)[0])
        if not (math.isfinite(scale) and scale >= 0):
            raise fluvial.WireError(f"one_scale: the scale is {scale}, and it should be >= 0")

        count = self.layout.numel
        packed = reader.array("u1", (count + 7) // 8).astype(np.uint8)
        bits = np.unpackbits(packed, count=count)
        return torch.from_numpy((2 * bits.astype(np.float32) - 1) * np.float32(scale))


if __name__ == "__main__":
    table = {"rounds": 2, "codec": {"name": "one_scale", "error_feedback": True}}
    with tempfile.TemporaryDirectory() as folder:
        print(fluvial.run(table, folder, codecs=[OneScale]))
