"""The product of a linear layer whose frozen weight is made anew in each direction."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Product(torch.autograd.Function):
    """The product x W^T + b with a weight that is loaded in each direction; x alone has a
    gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, load: Callable[[], Tensor]) -> Tensor:
        ctx.load = load
        ctx.dtype = x.dtype
        return nn.functional.linear(x, load(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.load().to(
            grad.dtype
        )  # under autocast the product, and so `grad`, was in its type
        inner = grad.flatten(0, -2) @ weight
        return inner.view(*grad.shape[:-1], -1).to(ctx.dtype), None, None


def product(x: Tensor, bias: Tensor | None, load: Callable[[], Tensor]) -> Tensor:
    """Return x W^T + b (..., out) for x (..., in) and the weight W (out, in) that `load` returns.

    Nothing is saved for the backward pass, which calls `load` again.
    """
    assert bias is None or not bias.requires_grad, "a bias is trained with its weight or not at all"
    value: Tensor = _Product.apply(x, bias, load)  # type: ignore[no-untyped-call]
    return value
