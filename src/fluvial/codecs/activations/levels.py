"""Activation codecs that send whole steps of a scale: int8 and int4.

A scale is a step in bf16, rounded up so that nothing is clipped: hidden gradients of 1e-5 are usual
in split learning, and fp16 has few steps there.
"""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn import functional

from fluvial.codecs.activations.base import (
    ActivationCodec,
    ActivationSettings,
    Cursor,
    check_finite,
    random_bits,
)
from fluvial.codecs.quantise import bf16
from fluvial.errors import ConfigError, WireError

_PIECE = 256
"""Tokens that are coded at a time, so that what is computed stays in the processor's cache."""


class Int8RowsSettings(ActivationSettings):
    """Whole numbers from -127 to 127 with a scale per token.

    Bytes per value: 1 + 2 / width. Lost: up to 1/252 of the largest value of a token, or 1/126 with
    unbiased rounding.
    """

    name: Literal["int8"] = "int8"
    """Name of the codec."""


class Int4RowsSettings(ActivationSettings):
    """Whole numbers from -7 to 7 with a scale per group of a token's channels.

    Bytes per value: 1/2 + 2 / group_size, and for each outlier channel a value of the model's float
    type for each token. Lost: up to 1/13.9 of the largest value of a group, or 1/6.9 with unbiased
    rounding; nothing in outlier channels.
    """

    name: Literal["int4"] = "int4"
    """Name of the codec."""
    group_size: int = Field(64, ge=1, le=65536)
    """Neighbouring channels that share one bf16 scale; the last group of a token may be shorter."""
    outlier_channels: int = Field(0, ge=0, le=65536)
    """Channels that are sent exactly: in each message those with the largest values."""


class LevelRows(ActivationCodec):
    """Levels relative to the scale of a group of channels.

    Bytes: the scales of all tokens, then the levels of all tokens.
    """

    levels: ClassVar[int]
    """Steps from zero to the largest value of a group."""

    @abstractmethod
    def group_size(self, width: int) -> int:
        """Return the channels that share a scale."""

    def _groups(self, width: int) -> int:
        """Return the scales of a token."""
        return -(-width // self.group_size(width))

    def _quantise(self, rows: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Return the scales (tokens, groups), bf16, and the levels (tokens, width), int8.

        The mean over draws is right to 2^-17 of a step.
        """
        pieces = [self._quantise_piece(piece, generator) for piece in torch.split(rows, _PIECE)]
        scales, levels = zip(*pieces, strict=True)
        return torch.cat(scales), torch.cat(levels)

    def _quantise_piece(self, rows: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Return what `_quantise` does, of a few tokens."""
        tokens, width = rows.shape
        groups = self._groups(width)
        missing = groups * self.group_size(width) - width
        values = functional.pad(rows.float(), (0, missing)).view(tokens, groups, -1)
        scales = self._scales(values.abs().amax(2))
        step = scales.float()
        quotient = values / step.masked_fill(step == 0, 1)[..., None]

        if generator is None:
            quotient.round_()
        else:
            # From 0 to 1 in steps of 2^-16, and the middle of each step.
            drawn = random_bits(quotient, generator).float().mul_(2**-16).add_(0.5 + 2**-17)
            whole = quotient.floor()
            further = torch.gt(quotient.sub_(whole), drawn, out=drawn)
            quotient = whole.add_(further)

        levels = quotient.clamp_(-self.levels, self.levels).to(torch.int8)
        return scales, levels.view(tokens, -1)[:, :width]

    def _scales(self, largest: Tensor) -> Tensor:
        """Return the bf16 steps that code magnitudes up to `largest` without clipping."""
        bits = bf16(largest.cpu().double().numpy() / self.levels, rounding="up")
        return torch.from_numpy(bits.view("i2")).view(torch.bfloat16).to(largest.device)

    def _rows(self, scales: Tensor, levels: Tensor) -> Tensor:
        """Invert `_quantise`, in fp32, for levels of any integer type; raises `WireError`."""
        check_finite(scales, "scales")
        if bool((scales < 0).any()):
            raise WireError("activations: a scale is negative")

        width = levels.shape[1]
        group_size = self.group_size(width)
        values = levels.float()
        whole = width - width % group_size

        body = values[:, :whole].view(len(levels), -1, group_size) if whole else None
        if body is not None:
            body.mul_(scales[:, : whole // group_size, None].float())
        if whole < width:
            values[:, whole:].mul_(scales[:, -1:].float())

        return values


class Int8Rows(LevelRows):
    """One byte a value and two a token."""

    levels: ClassVar[int] = 127

    def group_size(self, width: int) -> int:
        """Return the width: a token has one scale."""
        return width

    def body_size(self, tokens: int, width: int) -> int:
        """Return the bytes of scales and levels."""
        return tokens * (2 + width)

    def body(self, rows: Tensor, generator: Generator | None) -> list[Tensor]:
        """Return scales and levels."""
        return list(self._quantise(rows, generator))

    def parse(self, cursor: Cursor, tokens: int, width: int) -> Tensor:
        """Invert `body`."""
        scales = cursor.take(torch.bfloat16, tokens, 1)
        levels = cursor.take(torch.int8, tokens, width)
        if int(levels.min()) < -self.levels:
            raise WireError(f"activations: a level is below {-self.levels}")

        return self.to_dtype(self._rows(scales, levels))


class Int4Rows(LevelRows):
    """Two values a byte, the earlier one in the low half, stored plus 8; a token begins a new byte.

    Where there are outlier channels, their numbers (int32) and values come first.
    """

    levels: ClassVar[int] = 7
    settings: Int4RowsSettings

    def group_size(self, width: int) -> int:
        """Return the setting, or a narrower width."""
        return min(self.settings.group_size, width)

    def body_size(self, tokens: int, width: int) -> int:
        """Return the bytes of outliers, scales and levels; raises `ConfigError`."""
        outliers = self.settings.outlier_channels
        if outliers >= width:
            raise ConfigError(
                f"outlier_channels={outliers} leaves no channel of {width}; choose at most "
                f"{width - 1}"
            )

        exact = outliers * (4 + tokens * self.dtype.itemsize)
        return exact + tokens * (2 * self._groups(width) + -(-width // 2))

    def body(self, rows: Tensor, generator: Generator | None) -> list[Tensor]:
        """Return the outliers' numbers and values, scales and levels."""
        exact = []
        count = self.settings.outlier_channels

        if count:
            channels = rows.abs().amax(0).topk(count).indices.sort().values
            exact = [channels.to(torch.int32), rows[:, channels]]
            rows = rows.index_fill(1, channels, 0)

        scales, levels = self._quantise(rows, generator)
        return [*exact, scales, _pack_halves(levels)]

    def parse(self, cursor: Cursor, tokens: int, width: int) -> Tensor:
        """Invert `body`."""
        count = self.settings.outlier_channels
        channels = cursor.take(torch.int32, count).long()
        exact = cursor.take(self.dtype, tokens, count)
        scales = cursor.take(torch.bfloat16, tokens, self._groups(width))
        levels = _read_halves(cursor.take(torch.uint8, tokens, -(-width // 2)), width)
        rows = self.to_dtype(self._rows(scales, levels))

        if count:
            _check_channels(channels, width)
            check_finite(exact, "values of outlier channels")
            rows[:, channels] = exact

        return rows


def _check_channels(channels: Tensor, width: int) -> None:
    """Raise `WireError` unless the channels ascend within the width."""
    if int(channels[0]) < 0 or int(channels[-1]) >= width or bool((channels.diff() <= 0).any()):
        raise WireError(f"activations: outlier channels do not ascend from 0 to {width - 1}")


def _pack_halves(levels: Tensor) -> Tensor:
    """Return levels (tokens, width) of -7 to 7, plus 8, two a byte; an odd last one is paired with
    0."""
    stored = functional.pad(levels, (0, levels.shape[1] % 2)) + 8
    pairs = stored.contiguous().view(torch.int16)
    return (pairs & 15 | pairs >> 4).to(torch.uint8)


def _read_halves(packed: Tensor, width: int) -> Tensor:
    """Invert `_pack_halves`; raises `WireError` for a level of -8, and for one beyond the width."""
    wide = packed.to(torch.int16)
    levels = (wide & 15 | (wide & 240) << 4).view(torch.int8) - 8

    if int(levels.min()) < -7:
        raise WireError("activations: a level is below -7")
    if width % 2 and bool(levels[:, -1].any()):
        raise WireError("activations: a level beyond the width is not zero")

    return levels[:, :width]
