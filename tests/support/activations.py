"""Activation codecs in their variants, and rows to code."""

import torch
from torch import Generator, Tensor

from fluvial.codecs.activations import ActivationSettings
from fluvial.codecs.activations.floats import BFloat16RowsSettings, ExactRowsSettings
from fluvial.codecs.activations.largest import TopKRowsSettings
from fluvial.codecs.activations.levels import Int4RowsSettings, Int8RowsSettings

VARIANTS: dict[str, ActivationSettings] = {
    "exact": ExactRowsSettings(),
    "bf16": BFloat16RowsSettings(),
    "int8": Int8RowsSettings(),
    "int4": Int4RowsSettings(),
    "int4, groups of 7": Int4RowsSettings(group_size=7),
    "int4, outliers": Int4RowsSettings(outlier_channels=3),
    "top_k, bitmap": TopKRowsSettings(share=0.2),
    "top_k, numbers": TopKRowsSettings(share=0.03),
    "top_k, all": TopKRowsSettings(share=1),
}
"""Every activation codec, in each form of its bytes."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def some_rows(tokens: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return rows whose channels have unequal sizes, as those of hidden states."""
    draw = generator(seed)
    sizes = torch.rand(width, generator=draw).square() + 0.05
    return (torch.randn(tokens, width, generator=draw) * sizes).to(dtype)
