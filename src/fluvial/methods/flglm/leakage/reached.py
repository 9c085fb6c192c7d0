"""A forward pass that is stopped at one module, for its input or its output there."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn


class _Reached(Exception):  # noqa: N818 - no error: it ends a forward pass
    """Carry a tensor out of a forward pass."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.tensor: Tensor = value[0] if isinstance(value, tuple) else value


def tensor_at(
    module: nn.Module, end: Literal["input", "output"], run: Callable[[], object]
) -> Tensor:
    """Return the first input or output of `module` in the pass `run`, which goes no further."""

    def stop(_module: nn.Module, arguments: Any, output: Any = None) -> None:
        raise _Reached(arguments if end == "input" else output)

    register = module.register_forward_pre_hook if end == "input" else module.register_forward_hook
    hook = register(stop)

    try:
        run()
    except _Reached as reached:
        return reached.tensor
    finally:
        hook.remove()

    raise AssertionError(f"the model did not run its {type(module).__name__}")
