"""A model larger than a site's memory: it holds what it trains, and reads other weights from disk.

Alive at once are the trained block, the norms and biases, and the one weight in use; the largest
weight (often the head) is thus the least that a site needs beside its block.
"""

import copy
import threading
import weakref
from dataclasses import dataclass
from functools import cache, partial, wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.errors import ConfigError
from fluvial.models.product import product
from fluvial.models.stored import some
from fluvial.models.weight_sources import Source
from fluvial.wire.tensors import Named


def stream(
    skeleton: nn.Module, source: Source, resident: Named, device: torch.device | None = None
) -> nn.Module:
    """Return a model on `device` that trains `resident` and reads other weights when it uses them.

    `skeleton` has its parameters on the meta device, tied ones as one, and real buffers; it is left
    as it is. The tensors of `resident` become parameters that require gradients and, on the CPU,
    share the tensors' memory. Others with at most one dimension (norms, biases) are loaded once.
    Linear layers, transformers' Conv1D and embeddings, whose subclasses may add to their forward
    pass, fetch their weight from `source` for each forward pass, and linear layers again for a
    backward pass through them; any other layer fetches a weight at each use. All are used in the
    skeleton's types. Results are, bit for bit, those of the model that holds the same weights.

    Raises `ConfigError` if `source` lacks a tensor or has it in another shape, and the errors of
    `check_streams` and `source`.
    """
    device = device or torch.device("cpu")
    check_streams(skeleton)
    model = copy.deepcopy(skeleton)
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    _check(parameters, source, resident)
    held = {name: nn.Parameter(tensor.to(device)) for name, tensor in resident.items()}

    for module in list(model.modules()):
        stored = {}
        for leaf, parameter in module.named_parameters(recurse=False):
            name = names[id(parameter)]
            if name not in held and parameter.dim() > 1:
                stored[leaf] = _Weight(source, name, parameter.dtype, device)
                continue

            if name not in held:
                tensor = source.get(name).to(device, parameter.dtype, copy=True)
                held[name] = nn.Parameter(tensor, requires_grad=False)

            setattr(module, leaf, held[name])

        if stored:
            _let_stream(module, stored)

    model.to(device)  # the buffers
    assert not any(t.is_meta for t in chain(model.parameters(), model.buffers())), (
        "a skeleton has real buffers"
    )
    _save_no_weights(model)

    return model


def check_streams(model: nn.Module) -> None:
    """Raise `ConfigError` if `model` has a layer that keeps its weights elsewhere than in its
    parameters."""
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise ConfigError(
                f"method.hold='disk': {path} ({type(module).__name__}) keeps its weights in one "
                "piece, which cannot be read when it is used; set hold = 'memory'"
            )


class _Forward(threading.local):
    """The forward pass that a thread is in."""

    loaded: "_Loaded | None" = None
    """The weights that it has loaded."""


_forward = _Forward()


@dataclass(frozen=True)
class _Weight:
    """A weight of a source, with the type and device of its use."""

    source: Source
    name: str
    dtype: torch.dtype
    device: torch.device

    def load(self) -> Tensor:
        """Return the weight in the layer's type, on the layer's device."""
        weight = self.source.get(self.name).to(self.device, self.dtype)
        loaded = _forward.loaded

        if loaded is not None:
            storage = weight.untyped_storage()
            loaded[id(storage)] = weakref.ref(storage), self

        return weight

    def rows(self, index: Tensor) -> Tensor:
        """Return rows `index` of the matrix (rows, dim)."""
        return self.source.rows(self.name, index.cpu()).to(self.device, self.dtype)


_Loaded = dict[int, tuple["weakref.ref[torch.UntypedStorage]", _Weight]]
"""Weights by the identity of their memory, while that memory lives."""


class _StreamedLinear(nn.Linear):
    """A linear layer: (..., in) to (..., out)."""

    stored: dict[str, _Weight]

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.bias, self.stored["weight"].load)


class _StreamedEmbedding(nn.Embedding):
    """An embedding: whole numbers of any shape to (*shape, dim)."""

    stored: dict[str, _Weight]

    def forward(self, index: Tensor) -> Tensor:
        return self.stored["weight"].rows(index)


@cache
def _streamed_layers() -> dict[type, type]:
    """Return our layer for each that there is one for."""
    from transformers.pytorch_utils import Conv1D

    class StreamedConv1D(Conv1D):  # type: ignore[misc]
        """A linear layer whose weight is stored as (in, out)."""

        def forward(self, x: Tensor) -> Tensor:
            return product(x, self.bias, lambda: self.stored["weight"].load().t())

    return {nn.Linear: _StreamedLinear, nn.Embedding: _StreamedEmbedding, Conv1D: StreamedConv1D}


def _let_stream(module: Any, stored: dict[str, _Weight]) -> None:
    """Make `module` fetch the parameters `stored` at each use.

    Its class is replaced by a subclass of it. Our layer stands between that class and the layer of
    torch that it derives from, so that its own work before and after the layer's forward pass is
    still done.
    """
    kind = type(module)
    ours = _streamed_layers()
    plain = getattr(module, "max_norm", None) is None and stored.keys() == {"weight"}
    bases = [mine for theirs, mine in ours.items() if plain and isinstance(module, theirs)]
    streamed: type = type(kind.__name__, (kind, *bases) if kind not in ours else (*bases, kind), {})

    for leaf in stored:
        del module._parameters[leaf]
        setattr(streamed, leaf, property(partial(_fetch, leaf)))

    module.stored = stored
    module.__class__ = streamed


def _fetch(leaf: str, module: Any) -> Tensor:
    stored: dict[str, _Weight] = module.stored
    return stored[leaf].load()


def _save_no_weights(model: Any) -> None:
    """Let the backward pass load weights again that a forward pass would save for it."""
    inside = model.forward

    @wraps(inside)
    def forward(*args: Any, **options: Any) -> Any:
        loaded: _Loaded = {}
        _forward.loaded = loaded
        try:
            with torch.autograd.graph.saved_tensors_hooks(partial(_pack, loaded), _unpack):
                return inside(*args, **options)
        finally:
            _forward.loaded = None

    model.forward = forward


@dataclass(frozen=True)
class _View:
    """A view of a weight."""

    weight: _Weight
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _pack(loaded: _Loaded, tensor: Tensor) -> Tensor | _View:
    storage = tensor.untyped_storage()
    memory, weight = loaded.get(id(storage), (None, None))
    if memory is None or weight is None or memory() is not storage or tensor.dtype != weight.dtype:
        return tensor
    return _View(weight, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _unpack(packed: Tensor | _View) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    return packed.weight.load().as_strided(packed.size, packed.stride, packed.offset)


def _check(parameters: dict[str, nn.Parameter], source: Source, resident: Named) -> None:
    """Raise `ConfigError` unless `source` has the rest of the model in its shapes."""
    assert resident.keys() <= parameters.keys(), "a block of another model"
    assert all(parameters[name].shape == tensor.shape for name, tensor in resident.items()), (
        "a block of another model"
    )
    wanted = [name for name in parameters if name not in resident]
    missing = [name for name in wanted if name not in source.names]

    if missing:
        raise ConfigError(
            f"the stored weights lack {some(missing)}; they are of another model, or not complete"
        )

    for name in wanted:
        found = source.shape(name)
        expected = tuple(parameters[name].shape)
        if found != expected:
            raise ConfigError(
                f"stored tensor {name!r} has shape {found}, the model's has {expected}; they are "
                "of another model"
            )
