"""States: the learned tensors by name, fp32: LoRA factors, or changes of the base's weights.

A weight that a state does not name, or that it names with `no_change`, is the base's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluvial.seeds import generator
from fluvial.wire.tensors import Layout, Named, factor
from fluvial.wire.tensors import digest as digest_of_all


def initial_state(layout: Layout, seed: int) -> Named:
    """Return the state in which tuning starts, the same for one published seed.

    A is uniform in +-1/sqrt(d_in), as PEFT has it (Kaiming, a = sqrt(5)). B is zero, and so is the
    change of a weight that is tuned itself.
    """
    state = {}
    for name, shape in layout.shapes:
        if factor(name) == "A":
            uniform = torch.rand(shape, generator=generator(seed, "lora", name))
            state[name] = (2 * uniform - 1) / shape[1] ** 0.5
        else:
            state[name] = torch.zeros(shape) if factor(name) else no_change(shape)

    return state


def base_state(layout: Layout) -> Named:
    """Return the state of the base itself: zeros, which must not be written to."""
    return {name: no_change(shape) for name, shape in layout.shapes}


def no_change(shape: Sequence[int]) -> Tensor:
    """Return zeros of `shape`, fp32, that take no memory and must not be written to."""
    return torch.zeros(()).expand(tuple(shape))


def changed(state: Named) -> Named:
    """Return the tensors of `state` that are not `no_change`."""
    return {
        name: tensor for name, tensor in state.items() if tensor.numel() < 2 or any(tensor.stride())
    }


def digest(state: Named) -> str:
    """Return 32 hexadecimal digits over names, shapes and values of a state.

    Zeros count by name and shape alone, so that `no_change` takes no time.
    """
    filled = changed(state)
    return digest_of_all(
        {
            f"{name} {tuple(value.shape)}": value
            if name in filled and value.any()
            else value.new_empty(0)
            for name, value in state.items()
        }
    )[:32]
