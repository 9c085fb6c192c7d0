"""An activation codec that sends some entries of each token: top_k, or unbiased sampling."""

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor

from fluvial.codecs.activations.base import (
    ActivationCodec,
    ActivationSettings,
    Cursor,
    check_finite,
    to_bf16,
)
from fluvial.errors import ConfigError, WireError

_MAX_WIDTH = 65536
_PIECE = 256
"""Tokens that are coded at a time, so that what is computed stays in the processor's cache."""
_SCALINGS = 3
"""Times that odds are scaled up to the number of entries; any number is unbiased."""
_BELOW_ONE = 1 - 2**-16
"""Factor that keeps the sum of a token's odds, rounded, under the number of entries."""


class TopKRowsSettings(ActivationSettings):
    """The largest entries of each token, in bf16.

    Bytes per token: 2 k and the positions, the smaller of 2 k and width / 8, for k entries. Lost:
    all other entries. With unbiased rounding, k entries are drawn instead, with odds proportional
    to their size, and enlarged by the inverse of the odds.
    """

    name: Literal["top_k"] = "top_k"
    """Name of the codec."""
    share: float = Field(0.1, gt=0, le=1)
    """Entries of a token that are sent, at least one, as a share of the width."""


class TopKRows(ActivationCodec):
    """Some entries of each token and where they are.

    Bytes: the values of all tokens in the order of their channels, then the positions, as channel
    numbers (uint16) or as one bit a channel, whichever is shorter.
    """

    settings: TopKRowsSettings

    def entries(self, width: int) -> int:
        """Return the entries that are sent for a token."""
        return max(1, int(self.settings.share * width))

    def body_size(self, tokens: int, width: int) -> int:
        """Return the bytes of values and positions; raises `ConfigError`."""
        if width > _MAX_WIDTH:
            raise ConfigError(f"top_k numbers at most {_MAX_WIDTH} channels, not {width}")

        entries = self.entries(width)
        return tokens * (2 * entries + min(2 * entries, _bitmap_bytes(width)))

    def body(self, rows: Tensor, generator: Generator | None) -> list[Tensor]:
        """Return values and positions."""
        pieces = [self._piece(piece, generator) for piece in torch.split(rows, _PIECE)]
        values, positions = zip(*pieces, strict=True)
        return [torch.cat(values), torch.cat(positions)]

    def _piece(self, rows: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Return values and positions of a few tokens."""
        width = rows.shape[1]
        entries = self.entries(width)

        if generator is None:
            sent = _largest(rows.abs(), entries)
        else:
            odds = _odds(rows, entries)
            sent = _draw(odds, generator)
            rows = (rows.float() / odds).where(sent, 0)
            sent = _completed(sent, entries)

        channels = sent.nonzero()[:, 1].view(-1, entries)
        values = to_bf16(rows.gather(1, channels), generator)
        if 2 * entries <= _bitmap_bytes(width):
            return values, channels.to(torch.int16)

        bits = np.packbits(sent.cpu().numpy(), axis=1, bitorder="little")
        return values, torch.from_numpy(bits)

    def parse(self, cursor: Cursor, tokens: int, width: int) -> Tensor:
        """Invert `body`."""
        entries = self.entries(width)
        values = cursor.take(torch.bfloat16, tokens, entries)
        check_finite(values, "values")

        if 2 * entries <= _bitmap_bytes(width):
            channels = cursor.take(torch.int16, tokens, entries).long() & 0xFFFF
            if bool((channels.diff() <= 0).any()) or int(channels[:, -1].max()) >= width:
                raise WireError(f"activations: channels do not ascend from 0 to {width - 1}")
        else:
            bitmap = cursor.take(torch.uint8, tokens, _bitmap_bytes(width))
            channels = _read_bitmap(bitmap, entries, width)

        rows = torch.zeros(tokens, width, dtype=self.dtype, device=values.device)
        return rows.scatter_(1, channels, self.to_dtype(values.float()))


def _bitmap_bytes(width: int) -> int:
    return -(-width // 8)


def _read_bitmap(bitmap: Tensor, entries: int, width: int) -> Tensor:
    """Return the channels (tokens, entries) of set bits.

    Raises `WireError` unless each token has as many within the width.
    """
    bits = np.unpackbits(bitmap.cpu().numpy(), axis=1, bitorder="little")
    if bits[:, width:].any() or (bits.sum(1) != entries).any():
        raise WireError(f"activations: a token has other than {entries} entries below {width}")

    channels = torch.from_numpy(bits.nonzero()[1]).view(-1, entries)
    return channels.to(bitmap.device)


def _largest(sizes: Tensor, entries: int) -> Tensor:
    """Return which `entries` of each token (tokens, width) are the largest."""
    channels = sizes.topk(entries, sorted=False).indices
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(1, channels, True)


def _odds(rows: Tensor, entries: int) -> Tensor:
    """Return the odds (tokens, width), fp32, with which entries are drawn; in sum less than
    `entries` for each token.

    Proportional to the size of the entry, up to 1: Wangni et al., "Gradient sparsification for
    communication-efficient distributed optimization", NeurIPS 2018, algorithm 3.
    """
    sizes = rows.float().abs()
    largest = sizes.amax(1, keepdim=True)
    sizes /= largest.masked_fill_(largest == 0, 1)
    odds = sizes.mul_(_BELOW_ONE * entries / _sum(sizes)).clamp_(max=1)

    for _ in range(_SCALINGS):
        certain = odds >= 1
        room = entries - certain.sum(1, keepdim=True)
        others = odds.masked_fill(certain, 0)
        others *= _BELOW_ONE * room / _sum(others)
        odds = others.masked_fill_(certain, 1).clamp_(max=1)

    return odds


def _sum(sizes: Tensor) -> Tensor:
    """Return the sums (tokens, 1) of tokens, as divisors."""
    return sizes.sum(1, keepdim=True).clamp_(min=1e-30)


def _draw(odds: Tensor, generator: Generator) -> Tensor:
    """Return which entries (tokens, width) are drawn: systematic sampling, so that each token has
    at most as many as its odds add up to, rounded up."""
    start = torch.rand(odds.shape[0], 1, generator=generator, device=odds.device)
    end = odds.cumsum(1, dtype=torch.float64).add_(start).floor_()
    return end.diff(dim=1, prepend=torch.zeros_like(end[:, :1])) > 0


def _completed(sent: Tensor, entries: int) -> Tensor:
    """Return which entries (tokens, width) are sent, with others added, as zeros, to tokens with
    fewer than `entries`."""
    few = (sent.sum(1) < entries).nonzero()[:, 0]
    if len(few):
        sent[few] = _largest(sent[few].float(), entries)

    return sent
