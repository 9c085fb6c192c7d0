"""The interface of activation codecs: rows of hidden states, or of their gradients, to bytes.

The bytes have no header: both ends know the codec, the number of tokens and the width, and the
message around them says the step and is authenticated by its channel.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from fluvial.errors import DivergenceError, WireError
from fluvial.settings import Settings

assert sys.byteorder == "little", "activations are sent as they lie in memory, little endian"

BF16_MAX = torch.finfo(torch.bfloat16).max


class ActivationSettings(Settings):
    """The settings that all activation codecs share."""

    name: str
    """Name of the codec."""


class ActivationCodec(ABC):
    """Codes rows (tokens, width) of one float type into bytes and back."""

    def __init__(self, settings: ActivationSettings, dtype: torch.dtype) -> None:
        """Code rows of `dtype`, which is fp32, bf16 or fp16."""
        assert dtype in (torch.float32, torch.bfloat16, torch.float16), dtype
        self.settings = settings
        self.dtype = dtype

    def size(self, tokens: int, width: int) -> int:
        """Return the bytes that `encode` makes of rows (tokens, width), exactly; none of no tokens.

        Raises `ConfigError` where the settings do not fit the width.
        """
        assert tokens >= 0, tokens
        assert width >= 1, width
        size = self.body_size(tokens, width)
        return size if tokens else 0

    def encode(self, rows: Tensor, *, generator: Generator | None = None) -> bytes:
        """Return the bytes of `rows` (tokens, width).

        Values are rounded to nearest. With a `generator`, on the device of the rows, rounding is
        random and unbiased: the mean over draws of what is decoded is `rows`. Raises
        `DivergenceError` for values that are NaN or infinite.
        """
        assert rows.dim() == 2, rows.shape
        assert rows.dtype == self.dtype, rows.dtype
        tokens, width = rows.shape
        expected = self.size(tokens, width)
        if not tokens:
            return b""

        rows = rows.detach()
        check_sendable(rows)

        pieces = [_memory(piece) for piece in self.body(rows, generator)]
        data = b"".join(pieces)
        assert len(data) == expected, f"{len(data)} bytes, and {expected} were predicted"

        return data

    def decode(
        self, data: bytes, tokens: int, width: int, *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return the rows (tokens, width) that `data` carries, on `device`.

        All values are finite. Raises `WireError` for anything that `encode` did not make; nothing
        is allocated unless the bytes are as many as (tokens, width) needs, so the caller bounds the
        memory by the tokens it accepts.
        """
        expected = self.size(tokens, width)
        if len(data) != expected:
            raise WireError(
                f"activations: {len(data)} bytes, expected {expected} for {tokens} tokens of width "
                f"{width} by {self.settings.name}; both ends need the same codec settings"
            )

        if not tokens:
            return torch.empty(0, width, dtype=self.dtype, device=device)

        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self.parse(Cursor(buffer.to(device)), tokens, width)

    @abstractmethod
    def body_size(self, tokens: int, width: int) -> int:
        """Return the bytes of rows (tokens, width); raises `ConfigError`."""

    @abstractmethod
    def body(self, rows: Tensor, generator: Generator | None) -> Sequence[Tensor]:
        """Code finite rows (tokens, width), not empty, into tensors whose memory is sent in this
        order."""

    @abstractmethod
    def parse(self, cursor: "Cursor", tokens: int, width: int) -> Tensor:
        """Invert `body`; raises `WireError`."""

    def to_dtype(self, values: Tensor) -> Tensor:
        """Return `values` of fp32 as this codec's type; those beyond its range become its largest
        value."""
        limit = torch.finfo(self.dtype).max
        return values.clamp_(-limit, limit).to(self.dtype)


class Cursor:
    """Reads a buffer of bytes from front to back; its length was checked before."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._position = 0

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return the next values of `dtype` in `shape`, a view; earlier values have at least the
        size of later ones."""
        count = torch.Size(shape).numel() * dtype.itemsize
        piece = self._buffer[self._position : self._position + count]
        self._position += count
        return piece.view(dtype).view(shape)


def to_bf16(values: Tensor, generator: Generator | None) -> Tensor:
    """Return finite `values` as bf16, never infinite: to nearest even, or unbiased with a
    `generator`.

    Only values beyond the largest bf16 number are biased.
    """
    if values.dtype == torch.bfloat16:
        return values

    single = values.float().clamp(-BF16_MAX, BF16_MAX)
    if generator is None:
        return single.to(torch.bfloat16)

    # The lower half of the bits is the fraction of a step, for each sign and exponent.
    bits = random_bits(single, generator).to(torch.int32).bitwise_and_(0xFFFF)
    bits += single.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def random_bits(like: Tensor, generator: Generator) -> Tensor:
    """Return 16 random bits, int16, for each value of `like`."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[: like.numel()].view(like.shape)


def check_sendable(rows: Tensor) -> None:
    """Raise `DivergenceError` unless all values of `rows` (tokens, width) are finite."""
    if rows.numel() and not _all_finite(rows):
        raise DivergenceError(_where_not_finite(rows))


def check_finite(values: Tensor, what: str) -> None:
    """Raise `WireError` unless all `values` from outside are finite; `what` names them."""
    if values.numel() and not _all_finite(values):
        raise WireError(f"activations: {what} are NaN or infinite")


def _all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite, without memory for all of them."""
    return bool(torch.stack((values.amin(), values.amax())).isfinite().all())


def _where_not_finite(rows: Tensor) -> str:
    """Return the message about rows that are not finite."""
    wrong = (~rows.isfinite()).nonzero()
    token, channel = wrong[0].tolist()
    return (
        f"activations: {len(wrong)} of {rows.numel()} values are NaN or infinite, the first in "
        f"token {token}, channel {channel}; training diverged: lower the learning rate, or use "
        "bf16 instead of fp16"
    )


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as they lie in memory."""
    flat = tensor.contiguous().cpu().view(-1).view(torch.uint8)
    values: Any = flat.numpy()
    return memoryview(values)
