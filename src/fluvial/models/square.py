"""Training of R in B R A, with B and A fixed, and the factors that an estimated step gives.

PEFT has no such adapter. R takes the place of its B while a model trains, as B R, so that the base,
the scale and the export are those of LoRA.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.models.adapters import PREFIX
from fluvial.models.tuning import tuning_only
from fluvial.wire.tensors import Layout, Named, factor


class SquareB(nn.Module):
    """The second half of an adapter, `B R`, of which R is trained."""

    left: Tensor
    """B (out, rank)."""

    def __init__(self, left: Tensor, square: Tensor) -> None:
        """`left` is B (out, rank), `square` R (rank, rank)."""
        super().__init__()
        self.register_buffer("left", left)
        self.square = nn.Parameter(square)

    def forward(self, inner: Tensor) -> Tensor:
        """Return `B R` of `inner` (..., rank), as (..., out)."""
        return nn.functional.linear(nn.functional.linear(inner, self.square), self.left)


def square_name(name: str) -> str:
    """Return the name of R beside that of a factor A."""
    return name.replace(".lora_A.", ".lora_R.")


def left_name(name: str) -> str:
    """Return the name of the factor B beside that of a factor A."""
    return name.replace(".lora_A.", ".lora_B.")


def multiplied(fixed: Named, squares: Named) -> Named:
    """Return the LoRA adapter, A and `B R`, of the `fixed` factors with `squares` between them."""
    adapter = {}
    for name, tensor in fixed.items():
        if factor(name) == "A":
            adapter[name] = tensor
            adapter[left_name(name)] = fixed[left_name(name)] @ squares[square_name(name)]

    return adapter


@contextmanager
def squares_trained(model: nn.Module, fixed: Named, squares: Named) -> Iterator[None]:
    """Let the R of every module be what is tuned in `model`, which holds the A of `fixed`."""
    before: list[tuple[Any, nn.Module]] = []
    parameters: dict[str, nn.Parameter] = {}
    for name in sorted(fixed):
        if factor(name) != "A":
            continue
        layer: Any = model.get_submodule(PREFIX + name.partition(".lora_A.")[0])
        plain = layer.lora_B["default"]
        at = {"device": plain.weight.device, "dtype": plain.weight.dtype}
        left = fixed[left_name(name)].to(**at)
        half = SquareB(left, squares[square_name(name)].to(**at, copy=True))
        before.append((layer, plain))
        layer.lora_B["default"] = half
        parameters[square_name(name)] = half.square

    try:
        with tuning_only(model, parameters):
            yield
    finally:
        for layer, plain in before:
            layer.lora_B["default"] = plain


@contextmanager
def gradients_of_weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Gather the gradients of the adapted weights (out, in), fp32, by the names of the factors A.

    The weights themselves are frozen: each gradient is the sum over all tokens of the outer product
    of a module's output gradient and its input, from every backward pass inside.
    """
    from peft.tuners.lora import LoraLayer

    gradients: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor, output_gradient: Tensor) -> None:
        outer = output_gradient.flatten(0, -2).float().T @ inputs.flatten(0, -2).float()
        gradients[name] = gradients[name] + outer if name in gradients else outer

    def watch(name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(  # type: ignore[no-untyped-call]
            partial(add, name, inputs[0].detach())
        )

    handles = [
        module.register_forward_hook(partial(watch, f"{path.removeprefix(PREFIX)}.lora_A.weight"))
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]
    try:
        yield gradients
    finally:
        for handle in handles:
            handle.remove()


def factors_of_step(
    gradients: Mapping[str, Tensor], layout: Layout, step: float
) -> tuple[Named, Named]:
    """Return the fixed factors of an adapter of `layout`, and R, that approximate one Adam step of
    full tuning best.

    The step is `-step * sign(gradient)`, with gradients by the name of A. B and A are its leading
    singular vectors and R has their singular values on the diagonal (LoRA-SB, algorithm 1).
    """
    ranks = {name: shape[0] for name, shape in layout.shapes if factor(name) == "A"}
    fixed: Named = {}
    squares: Named = {}
    for name, gradient in sorted(gradients.items()):
        rank = ranks[name]
        left, values, right = torch.linalg.svd(-gradient.sign().cpu(), full_matrices=False)
        fixed[name] = right[:rank].contiguous()
        fixed[left_name(name)] = left[:, :rank].contiguous()
        squares[square_name(name)] = torch.diag(step * values[:rank])

    return fixed, squares
