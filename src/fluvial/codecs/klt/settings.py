"""Settings of `klt`, and the numbers of its frame."""

import struct
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fluvial.codecs.base import SnrDrivenSettings
from fluvial.codecs.klt.base import TransformSettings
from fluvial.codecs.klt.tables import (
    OCTAVE,
    Mode,
)
from fluvial.wire.frame import OVERHEAD

FINE = 256 // OCTAVE
"""Units of the step's logarithm (1/256 octave) in one code (1/16 octave)."""
QUIET = -96
LOUD = 159
"""Codes between which the loudest group stands above `fit` and the step."""
SILENT = 15
"""Gain of a group of which nothing is sent."""
QUIETEST = 14
"""The largest gain of a group that is sent."""
MAX_STEP = 126 * 256
"""Logarithm of the largest step, in 1/256 octave; beyond, fp32 ends."""
CODES = 254
"""The largest sum of a row's and a column's logarithm."""
HEAD = struct.Struct("<Bh")
SEED = struct.Struct("<I")


class KltSettings(TransformSettings, SnrDrivenSettings):
    """A learned linear transform (ours; it needs a fit).

    Bytes per value: 4 / rate. Lost: what is small in the learned basis.
    """

    name: Literal["klt"] = "klt"
    """Name of the codec."""
    rate: float = Field(64, ge=4, le=4096)
    """Times smaller than fp32: a frame, its header included, has at most 4 * numel / rate bytes."""
    mode: Mode = "biased"
    """Quantisation: "biased" has the least squared error, "dithered" no error on average over
    seeds."""

    @property
    def without_bias(self) -> bool:
        """See `CodecSettings.without_bias`."""
        return self.mode == "dithered"

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        yield from super().conflicts()
        if (
            self.mode == "dithered" and self.error_feedback
        ):  # feedback around a codec that enlarges diverges
            yield "mode='dithered' diverges with error_feedback=true; choose one of the two"


def overhead_bytes(num_groups: int, settings: KltSettings) -> int:
    """Return the bytes of a frame before the stream."""
    return (
        OVERHEAD
        + HEAD.size
        + (SEED.size if settings.mode == "dithered" else 0)
        + 1
        + (num_groups + 1) // 2
    )
