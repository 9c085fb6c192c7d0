"""Scales that bring an update to unit size before a learned transform, and how they cross the wire.

The paper states no normalisation; without one its autoencoder does not start to learn. Scales
travel as bfloat16 (2 bytes each): fp16 ends at 6e-8 and loses precision from 6e-5 down, where LoRA
updates live. Values are divided by the scale as transported, so the rounding of a scale is no error
of the update.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluvial.errors import WireError
from fluvial.wire.frame import Reader
from fluvial.wire.tensors import Layout

Normalisation = Literal["none", "global_rms", "factor_rms", "maxabs"]

BYTES_PER_SCALE = 2
_LARGEST = torch.finfo(torch.bfloat16).max
_PEAK = 0.95
"""Value that `maxabs` gives to the largest one: inside the range of the decoder's Tanh."""


def scale_count(layout: Layout, mode: Normalisation) -> int:
    """Return how many scales a message carries: none, one, or one for every factor of every module
    and layer."""
    return {"none": 0, "global_rms": 1, "factor_rms": len(layout.shapes), "maxabs": 1}[mode]


def measure(vector: Tensor, layout: Layout, mode: Normalisation) -> Tensor:
    """Return the scales (count,) bf16 of a flattened update (numel,); 0 for a part that is zero."""
    if mode == "none":
        return torch.empty(0, dtype=torch.bfloat16)

    values = vector.double()
    if mode == "factor_rms":
        scales = torch.stack([_rms(piece) for piece in torch.split(values, list(layout.sizes))])
    elif mode == "global_rms":
        scales = _rms(values)[None]
    else:
        scales = (values.abs().max() / _PEAK)[None]

    return scales.clamp(max=_LARGEST).bfloat16()


def normalise(vector: Tensor, scales: Tensor, layout: Layout, mode: Normalisation) -> Tensor:
    """Return the update (numel,) divided by its scales; parts of scale 0 become 0."""
    if mode == "none":
        return vector
    spread = _spread(scales, layout)
    return torch.where(spread > 0, vector / spread.where(spread > 0, 1.0), 0.0)


def denormalise(values: Tensor, scales: Tensor, layout: Layout, mode: Normalisation) -> Tensor:
    """Invert `normalise`, up to one fp32 rounding."""
    return values if mode == "none" else values * _spread(scales, layout)


def write_scales(scales: Tensor) -> bytes:
    """Return bf16 scales, little endian."""
    return _bits(scales).astype("<u2").tobytes()


def read_scales(reader: Reader, count: int) -> Tensor:
    """Invert `write_scales`; raises `WireError` for a scale that is negative, NaN or
    infinite."""
    bits = reader.array("u2", count).astype(np.int32) << 16
    scales = torch.from_numpy(bits.view(np.float32)).bfloat16()

    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise WireError("frame: a scale is negative, NaN or infinite")
    return scales


def _bits(scales: Tensor) -> NDArray[np.uint16]:
    return scales.view(torch.int16).numpy().view(np.uint16)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _spread(scales: Tensor, layout: Layout) -> Tensor:
    """Return one fp32 scale for every value, or a single one for all."""
    if len(scales) == 1:
        return scales.float()
    spread: Tensor = torch.repeat_interleave(scales.float(), torch.tensor(layout.sizes))
    return spread
