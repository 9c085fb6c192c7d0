"""Rows of real tokens, and the padded batch from them and the lengths."""

import pytest
import torch
from torch import Tensor

from fluvial.codecs.activations.rows import (
    Padding,
    lengths_from_mask,
    mask_from_lengths,
    pack,
    unpack,
)
from fluvial.errors import ConfigError, WireError

LENGTHS = torch.tensor([3, 0, 5, 1])
"""A sample of all tokens, one of none, and others."""
TOKENS = 5
MASKS: dict[Padding, list[list[int]]] = {
    "left": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_masks_and_lengths_say_the_same(padding: Padding) -> None:
    mask = mask_from_lengths(LENGTHS, TOKENS, padding)
    assert mask.dtype == torch.int64
    assert mask.tolist() == MASKS[padding]
    assert torch.equal(lengths_from_mask(mask, padding), LENGTHS)
    assert torch.equal(lengths_from_mask(mask.bool(), padding), LENGTHS)
    assert mask_from_lengths(LENGTHS[:0], TOKENS, padding).shape == (0, TOKENS)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_batch_is_restored(padding: Padding) -> None:
    mask = mask_from_lengths(LENGTHS, TOKENS, padding)
    hidden = torch.randn(4, TOKENS, 6) * mask[..., None]
    rows = pack(hidden, mask)
    assert rows.shape == (9, 6)
    assert torch.equal(
        rows, torch.cat([line[real.bool()] for line, real in zip(hidden, mask, strict=True)])
    )

    restored, again = unpack(rows, LENGTHS, TOKENS, padding)
    assert torch.equal(restored, hidden)
    assert torch.equal(again, mask)

    longer, _ = unpack(rows, LENGTHS, TOKENS + 2, padding)
    real = longer[:, 2:] if padding == "left" else longer[:, :-2]
    assert torch.equal(real, hidden), "a batch may be padded further than it was"


@pytest.mark.parametrize("padding", ["left", "right"])
def test_no_real_token(padding: Padding) -> None:
    none = torch.zeros(2, dtype=torch.int64)
    hidden, mask = unpack(torch.zeros(0, 6), none, TOKENS, padding)
    assert not hidden.any()
    assert not mask.any()
    assert pack(hidden, mask).shape == (0, 6)


def test_gradients_flow_through_both() -> None:
    mask = mask_from_lengths(LENGTHS, TOKENS, "left")
    hidden = torch.randn(4, TOKENS, 6, dtype=torch.float64, requires_grad=True)

    def there_and_back(hidden: Tensor) -> Tensor:
        return unpack(pack(hidden, mask), LENGTHS, TOKENS, "left")[0].sin()

    assert torch.autograd.gradcheck(there_and_back, (hidden,))
    there_and_back(hidden).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert not hidden.grad[mask == 0].any()


@pytest.mark.parametrize(
    "mask", [[[1, 0, 1]], [[1, 1, 0]], [[0, 1, 0]]], ids=["gap", "other end", "both ends"]
)
def test_a_mask_that_lengths_do_not_give_is_refused(mask: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="padded on the left"):
        lengths_from_mask(torch.tensor(mask), "left")


@pytest.mark.parametrize(
    "lengths",
    [
        torch.tensor([6]),
        torch.tensor([-1, 2]),
        torch.tensor([2**62, 2**62]),
        torch.tensor([1.0]),
        torch.tensor([True]),
        torch.tensor(3),
    ],
)
def test_lengths_from_outside_are_checked(lengths: Tensor) -> None:
    with pytest.raises(WireError, match="lengths"):
        mask_from_lengths(lengths, TOKENS, "right")
    with pytest.raises(WireError, match="lengths"):
        unpack(torch.zeros(1, 6), lengths, TOKENS, "right")


@pytest.mark.parametrize("shape", [(8, 6), (10, 6), (9,), (9, 6, 1)])
def test_rows_that_do_not_match_their_lengths_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WireError, match="a row for each of 9 tokens"):
        unpack(torch.zeros(shape), LENGTHS, TOKENS, "right")
