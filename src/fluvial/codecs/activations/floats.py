"""Activation codecs that send every value as a float: exact and bf16."""

from typing import Literal

import torch
from torch import Generator, Tensor

from fluvial.codecs.activations.base import (
    ActivationCodec,
    ActivationSettings,
    Cursor,
    check_finite,
    to_bf16,
)


class ExactRowsSettings(ActivationSettings):
    """The rows in the float type of the model.

    Bytes per value: 4, or 2 where the model runs in bf16 or fp16. Lost: nothing.
    """

    name: Literal["exact"] = "exact"
    """Name of the codec."""


class ExactRows(ActivationCodec):
    """The memory of the rows; exact to the bit."""

    def body_size(self, tokens: int, width: int) -> int:
        """Return the bytes of the values."""
        return tokens * width * self.dtype.itemsize

    def body(self, rows: Tensor, generator: Generator | None) -> list[Tensor]:  # noqa: ARG002
        """Return the rows; nothing is rounded."""
        return [rows]

    def parse(self, cursor: Cursor, tokens: int, width: int) -> Tensor:
        """Invert `body`."""
        rows = cursor.take(self.dtype, tokens, width)
        check_finite(rows, "values")
        return rows


class BFloat16RowsSettings(ActivationSettings):
    """Values rounded to bf16; exact where the model runs in bf16.

    Bytes per value: 2. Lost: a relative error up to 2^-9, or 2^-8 with unbiased rounding.
    """

    name: Literal["bf16"] = "bf16"
    """Name of the codec."""


class BFloat16Rows(ActivationCodec):
    """bf16, which keeps the range of fp32."""

    def body_size(self, tokens: int, width: int) -> int:
        """Return two bytes a value."""
        return 2 * tokens * width

    def body(self, rows: Tensor, generator: Generator | None) -> list[Tensor]:
        """Return the rows in bf16."""
        return [to_bf16(rows, generator)]

    def parse(self, cursor: Cursor, tokens: int, width: int) -> Tensor:
        """Invert `body`."""
        rows = cursor.take(torch.bfloat16, tokens, width)
        check_finite(rows, "values")
        return rows if self.dtype == torch.bfloat16 else self.to_dtype(rows.float())
