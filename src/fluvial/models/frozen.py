"""A model larger than a site's memory: the trained block is held, any other weight is read from
disk when it is used.

Alive at once are the block, the norms and biases, and the one weight in use; the largest weight
(often the head) is thus the least that a site needs beside its block. A file is mapped anew for
each tensor, and the mapping goes with the tensor: the pages of a mapping that stays open add up in
the process's memory (RssFile) to the whole model, while read like this the peak is one weight, and
without the copy that reading into a buffer makes.
"""

import copy
import json
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial, wraps
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fluvial.errors import ConfigError
from fluvial.wire.tensors import Named

_open: Any = safe_open  # its stub has no types
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Source(ABC):
    """Weights by name, fetched anew at each call; nothing is kept between calls."""

    names: frozenset[str]
    """What can be asked for."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU, in the float type that it is stored in; not to be written
        to."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`; of a compressed one found by decoding it."""
        return tuple(self.get(name).shape)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows `index` (any shape, whole numbers, on the CPU) of a matrix (rows, dim):
        (*index.shape, dim).

        Of a mapped matrix only the pages of these rows are read.
        """
        return nn.functional.embedding(index, self.get(name))


class MemorySource(Source):
    """Tensors that are held in memory, such as a change to add to a folder's weights."""

    def __init__(self, tensors: Named) -> None:
        self._tensors = tensors
        self.names = frozenset(tensors)

    def get(self, name: str) -> Tensor:
        """The tensor itself."""
        return self._tensors[name]


class FolderSource(Source):
    """A Hugging Face folder: model.safetensors, or shards with model.safetensors.index.json."""

    def __init__(
        self,
        path: Path,
        names: Iterable[str] | Mapping[str, str],
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """Find the tensors `names`, as they are stored or with the stored name of each.

        They are given in `dtypes`, where these have them, or as stored. Raises `ConfigError` if the
        folder cannot be read or lacks some of them.
        """
        stored = tensor_files(path)
        places = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
        missing = [name for name, place in places.items() if place not in stored]

        if missing:
            raise ConfigError(
                f"{path}: {_some(missing)} not found among its {len(stored)} tensors; "
                "save the model anew with save_pretrained of transformers"
            )

        self._places = {name: (stored[place], place) for name, place in places.items()}
        self.names = frozenset(places)
        self._dtypes = dtypes or {}

    def get(self, name: str) -> Tensor:
        """The tensor, mapped; raises `ConfigError` if it is not of a float type that models
        have."""
        return self._typed(name, _mapped(*self._places[name]))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, read from the head of the file."""
        return tuple(_mapped(*self._places[name]).shape)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows of it, and no others are read."""
        return self._typed(name, nn.functional.embedding(index, _mapped(*self._places[name])))

    def _typed(self, name: str, tensor: Tensor) -> Tensor:
        kind = self._dtypes.get(name)
        if kind is None or kind.is_floating_point:
            tensor = _float(tensor, *self._places[name])
        return tensor if kind is None else tensor.to(kind)


class FileSource(Source):
    """One safetensors file whose tensors lie there as floats, or as frames (one-dimensional, uint8)
    to decode."""

    def __init__(self, path: Path, decode: Callable[[str, bytes], Tensor]) -> None:
        """`decode` makes a tensor, on the CPU, of a name and its frame; `ConfigError` if there is
        no such file."""
        self._path = path
        self._decode = decode
        self.names = frozenset(_names(path))

    def get(self, name: str) -> Tensor:
        """The tensor, mapped or decoded; raises `ConfigError` if it is neither float nor frame."""
        tensor = _mapped(self._path, name)
        if tensor.dtype == torch.uint8 and tensor.dim() == 1:
            tensor = self._decode(name, tensor.numpy().tobytes())
        return _float(tensor, self._path, name)


class Sum(Source):
    """`first` plus, where it has the name, `second`: added in fp32, given in the type of
    `first`."""

    def __init__(self, first: Source, second: Source) -> None:
        self._first = first
        self._second = second
        self.names = first.names

    def get(self, name: str) -> Tensor:
        """The sum."""
        base = self._first.get(name)
        return _sum(base, self._second.get(name)) if name in self._second.names else base

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in `first`."""
        return self._first.shape(name)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows of the sum."""
        base = self._first.rows(name, index)
        return _sum(base, self._second.rows(name, index)) if name in self._second.names else base


def stream(
    skeleton: nn.Module, source: Source, resident: Named, device: torch.device | None = None
) -> nn.Module:
    """Return a model on `device` that trains `resident` and reads all other weights from `source`
    when it uses them.

    `skeleton` has its parameters on the meta device, tied ones as one, and real buffers; it is left
    as it is. The tensors of `resident` become parameters that require gradients and, on the CPU,
    share the tensors' memory. Of the others, those with at most one dimension (norms, biases) are
    loaded once. Linear layers, transformers' Conv1D and embeddings, whose subclasses may add to
    their forward pass, fetch their weight for each forward pass, and linear layers again for a
    backward pass that goes through them; any other layer fetches a weight whenever it asks for it.
    All are used in the skeleton's types. Results are, bit for bit, those of the model that holds
    the same weights.

    Raises `ConfigError` if `source` lacks a tensor or has it in another shape, and what
    `check_streams` and `source` raise.
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


_saved = threading.local()
"""`known`: the weights that this thread has loaded in the forward pass that it is in."""


@dataclass(frozen=True)
class _Weight:
    """Where a weight is, and how it is used."""

    source: Source
    name: str
    dtype: torch.dtype
    device: torch.device

    def load(self) -> Tensor:
        """The weight as the layer has it."""
        weight = self.source.get(self.name).to(self.device, self.dtype)
        known: _Known | None = getattr(_saved, "known", None)

        if known is not None:
            storage = weight.untyped_storage()
            known[id(storage)] = weakref.ref(storage), self

        return weight

    def rows(self, index: Tensor) -> Tensor:
        """Rows of a table (rows, dim)."""
        return self.source.rows(self.name, index.cpu()).to(self.device, self.dtype)


_Known = dict[int, tuple["weakref.ref[torch.UntypedStorage]", _Weight]]
"""Weights by the identity of their memory, as long as that lives."""


class _Product(torch.autograd.Function):
    """x W^T + b with a weight that is loaded in each direction; only the gradient of x is made."""

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


def _product(x: Tensor, bias: Tensor | None, load: Callable[[], Tensor]) -> Tensor:
    assert bias is None or not bias.requires_grad, "a bias is trained with its weight or not at all"
    product: Tensor = _Product.apply(x, bias, load)  # type: ignore[no-untyped-call]
    return product


class _StreamedLinear(nn.Linear):
    """A linear layer: (..., in) to (..., out)."""

    stored: dict[str, _Weight]

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self.bias, self.stored["weight"].load)


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
            return _product(x, self.bias, lambda: self.stored["weight"].load().t())

    return {nn.Linear: _StreamedLinear, nn.Embedding: _StreamedEmbedding, Conv1D: StreamedConv1D}


def _let_stream(module: Any, stored: dict[str, _Weight]) -> None:
    """Make `module` fetch the parameters `stored` where it would have had them.

    Its class is replaced by a subclass of it. Between that class and the layer of torch that it
    derives from stands our own one, so that whatever it does before and after the layer's forward
    pass is still done.
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
        known: _Known = {}
        _saved.known = known
        try:
            with torch.autograd.graph.saved_tensors_hooks(partial(_pack, known), _unpack):
                return inside(*args, **options)
        finally:
            del _saved.known

    model.forward = forward


@dataclass(frozen=True)
class _View:
    """A view of a weight."""

    weight: _Weight
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _pack(known: _Known, tensor: Tensor) -> Tensor | _View:
    storage = tensor.untyped_storage()
    memory, weight = known.get(id(storage), (None, None))
    if memory is None or weight is None or memory() is not storage or tensor.dtype != weight.dtype:
        return tensor
    return _View(weight, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _unpack(packed: Tensor | _View) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    return packed.weight.load().as_strided(packed.size, packed.stride, packed.offset)


def _check(parameters: dict[str, nn.Parameter], source: Source, resident: Named) -> None:
    """Raise `ConfigError` unless `source` has the rest of the model, in its shapes; `resident` must
    fit it."""
    assert resident.keys() <= parameters.keys(), "a block of another model"
    assert all(parameters[name].shape == tensor.shape for name, tensor in resident.items()), (
        "a block of another model"
    )
    wanted = [name for name in parameters if name not in resident]
    missing = [name for name in wanted if name not in source.names]

    if missing:
        raise ConfigError(
            f"the stored weights lack {_some(missing)}; they are of another model, or not complete"
        )

    for name in wanted:
        found = source.shape(name)
        expected = tuple(parameters[name].shape)
        if found != expected:
            raise ConfigError(
                f"stored tensor {name!r} has shape {found}, the model's has {expected}; they are of another model"
            )


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def _sum(base: Tensor, change: Tensor) -> Tensor:
    assert base.shape == change.shape, "a change of another shape"
    return (base.float() + change.float()).to(base.dtype)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor in a Hugging Face folder; raises `ConfigError` where it has no
    safetensors."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"

    if single.is_file():
        return dict.fromkeys(_names(single), single)
    if not index.is_file():
        raise ConfigError(
            f"{folder} has neither {single.name} nor {index.name}; save the model with save_pretrained of transformers"
        )

    try:
        shards = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{index} has no 'weight_map' of tensors and files: {error!r:.200}"
        ) from error

    return {name: folder / Path(str(file)).name for name, file in shards.items()}


def _names(file: Path) -> list[str]:
    try:
        with _open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{file} cannot be read as safetensors, write it anew: {error!s:.200}"
        ) from error


def _mapped(file: Path, name: str) -> Tensor:
    """A view of the tensor's bytes in the file, mapped for this tensor alone."""
    try:
        with _open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{file}: tensor {name!r} cannot be read, write the file anew: {error!s:.200}"
        ) from error

    return tensor


def _float(tensor: Tensor, file: Path, name: str) -> Tensor:
    if tensor.dtype not in _FLOATS:
        raise ConfigError(
            f"{file}: tensor {name!r} is {tensor.dtype}, expected float32, bfloat16, float16 or float64"
        )

    return tensor
