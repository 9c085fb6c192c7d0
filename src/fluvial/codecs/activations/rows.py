"""Real tokens of a padded batch as rows, and the padded batch and its mask from lengths again.

Split learning sends the rows of real tokens and one length a sample, instead of padding and a mask.
"""

from typing import Literal

import torch
from torch import Tensor

from fluvial.errors import ConfigError, WireError

Padding = Literal["left", "right"]
"""End of a sample at which a batch is padded."""


def mask_from_lengths(lengths: Tensor, tokens: int, padding: Padding) -> Tensor:
    """Return the attention mask (batch, tokens), int64, of `lengths` (batch,), whole numbers.

    Raises `WireError` for lengths that are not from 0 to `tokens`.
    """
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise WireError(
            f"lengths: expected a vector of whole numbers, found {lengths.dtype} with shape "
            f"{tuple(lengths.shape)}"
        )

    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= tokens:
        raise WireError(
            f"lengths: {int(lengths.min())} to {int(lengths.max())}, expected 0 to {tokens}"
        )

    position = torch.arange(tokens, device=lengths.device)
    if padding == "left":
        real = position >= tokens - lengths[:, None]
    else:
        real = position < lengths[:, None]

    return real.to(torch.int64)


def lengths_from_mask(mask: Tensor, padding: Padding) -> Tensor:
    """Return the lengths (batch,), int64, of a mask (batch, tokens) of ones and zeros.

    Raises `ConfigError` for a mask that its lengths do not give again: one with a gap, or padded at
    the other end.
    """
    lengths = mask.to(torch.int64).sum(1)

    if not torch.equal(mask_from_lengths(lengths, mask.shape[1], padding), mask.to(torch.int64)):
        raise ConfigError(
            f"the attention mask is not that of samples padded on the {padding}; pad all samples "
            "of a batch on this end, and without gaps"
        )

    return lengths


def pack(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the rows (sum of lengths, width) of real tokens in `hidden` (batch, tokens, width),
    sample by sample.

    `mask` (batch, tokens) is not zero at real tokens. Gradients of the rows flow to `hidden`, as
    zeros to padding.
    """
    assert hidden.shape[:2] == mask.shape, "a mask of another batch"
    return hidden[mask.to(torch.bool)]


def unpack(rows: Tensor, lengths: Tensor, tokens: int, padding: Padding) -> tuple[Tensor, Tensor]:
    """Invert `pack`: return the hidden states (batch, tokens, width), zero at padding, and the mask
    (batch, tokens), int64.

    Gradients of the hidden states flow to `rows`. Raises `WireError` for lengths that are not from
    0 to `tokens`, or do not add up to the rows, before it allocates hidden states.
    """
    mask = mask_from_lengths(lengths, tokens, padding)
    count = int(lengths.sum())

    if rows.dim() != 2 or rows.shape[0] != count:
        raise WireError(
            f"rows: shape {tuple(rows.shape)}, expected a row for each of {count} tokens"
        )

    hidden = rows.new_zeros(*mask.shape, rows.shape[1])
    return hidden.index_put((mask.to(torch.bool),), rows), mask
