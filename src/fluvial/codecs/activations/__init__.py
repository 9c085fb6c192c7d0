"""Activation codecs of split learning: hidden states and their gradients to bytes and back."""

from typing import Annotated

import torch
from pydantic import Field

from fluvial.codecs.activations.base import ActivationCodec, ActivationSettings
from fluvial.codecs.activations.floats import (
    BFloat16Rows,
    BFloat16RowsSettings,
    ExactRows,
    ExactRowsSettings,
)
from fluvial.codecs.activations.largest import TopKRows, TopKRowsSettings
from fluvial.codecs.activations.levels import (
    Int4Rows,
    Int4RowsSettings,
    Int8Rows,
    Int8RowsSettings,
)

__all__ = [
    "ACTIVATION_CODECS",
    "ActivationCodec",
    "ActivationConfig",
    "ActivationSettings",
    "build_activation",
]

ActivationConfig = Annotated[
    ExactRowsSettings
    | BFloat16RowsSettings
    | Int8RowsSettings
    | Int4RowsSettings
    | TopKRowsSettings,
    Field(discriminator="name"),
]
"""A table of a configuration that chooses an activation codec."""

ACTIVATION_CODECS: dict[str, type[ActivationCodec]] = {
    "exact": ExactRows,
    "bf16": BFloat16Rows,
    "int8": Int8Rows,
    "int4": Int4Rows,
    "top_k": TopKRows,
}
"""Activation codecs by their name in a configuration."""


def build_activation(settings: ActivationSettings, dtype: torch.dtype) -> ActivationCodec:
    """Return the codec for rows of `dtype`, the float type of the model's hidden states."""
    return ACTIVATION_CODECS[settings.name](settings, dtype)
