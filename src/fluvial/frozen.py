"""A model larger than a site's memory: the trained block is held, any other weight is read from disk when it is used.

Alive at once are the block, the norms and biases, and the one weight in use; the largest weight (often the head) is
thus the least that a site needs beside its block. A file is mapped anew for each tensor, and the mapping goes with the
tensor: the pages of a mapping that stays open add up in the process's memory (RssFile) to the whole model, while read
like this the peak is one weight, and without the copy that reading into a buffer makes.
"""

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fluvial.errors import ConfigError
from fluvial.tensors import Named

_open: Any = safe_open  # its stub has no types
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Source(ABC):
    """Weights by name, fetched anew at each call; nothing is kept between calls."""

    names: frozenset[str]
    """What can be asked for."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU, in the float type that it is stored in; not to be written to."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`; of a compressed one found by decoding it."""
        return tuple(self.get(name).shape)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows `index` (any shape, whole numbers, on the CPU) of a matrix (rows, dim): (*index.shape, dim).

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

    def __init__(self, path: Path, names: Iterable[str], dtype: torch.dtype | None = None) -> None:
        """Find the tensors `names`, spelled as by `model.named_parameters()`; they are given in `dtype`, or as stored.

        The file may leave out the base model's prefix, the part before the first dot ("model.", "transformer.").
        Raises `ConfigError` if the folder cannot be read or lacks some of them.
        """
        stored = _stored(path)
        places = {name: name if name in stored else name.partition(".")[2] for name in names}
        missing = [name for name, place in places.items() if place not in stored]
        if missing:
            raise ConfigError(
                f"{path}: {_some(missing)} not found among its {len(stored)} tensors; "
                "save the model anew with save_pretrained of transformers"
            )
        self._places = {name: (stored[place], place) for name, place in places.items()}
        self.names = frozenset(places)
        self._dtype = dtype

    def get(self, name: str) -> Tensor:
        """The tensor, mapped; raises `ConfigError` if it is not of a float type that models have."""
        return self._typed(_float(_mapped(*self._places[name]), *self._places[name]))

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows of it, and no others are read."""
        return self._typed(nn.functional.embedding(index, _float(_mapped(*self._places[name]), *self._places[name])))

    def _typed(self, tensor: Tensor) -> Tensor:
        return tensor if self._dtype is None else tensor.to(self._dtype)


class FileSource(Source):
    """One safetensors file whose tensors lie there as floats, or as frames (one-dimensional, uint8) to decode."""

    def __init__(self, path: Path, decode: Callable[[str, bytes], Tensor]) -> None:
        """`decode` makes a tensor, on the CPU, of a name and its frame; `ConfigError` if there is no such file."""
        self._path, self._decode = path, decode
        self.names = frozenset(_names(path))

    def get(self, name: str) -> Tensor:
        """The tensor, mapped or decoded; raises `ConfigError` if it is neither float nor frame."""
        tensor = _mapped(self._path, name)
        if tensor.dtype == torch.uint8 and tensor.dim() == 1:
            tensor = self._decode(name, tensor.numpy().tobytes())
        return _float(tensor, self._path, name)


class Sum(Source):
    """`first` plus, where it has the name, `second`: added in fp32, given in the type of `first`."""

    def __init__(self, first: Source, second: Source) -> None:
        self._first, self._second = first, second
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


def stream(skeleton: nn.Module, source: Source, resident: Named, dtype: torch.dtype) -> nn.Module:
    """A model on the CPU that trains `resident` and reads all other weights from `source` when it uses them.

    `skeleton` has its parameters on the meta device, tied ones as one, and real buffers; it is left as it is. The
    tensors of `resident` become parameters that require gradients and share the tensors' memory. Of the others, those
    with at most one dimension (norms, biases) are loaded once; linear layers, transformers' Conv1D and embeddings fetch
    their weight for each forward pass, and linear layers again for a backward pass that goes through them. All these
    are used in `dtype`. Results are, bit for bit, those of the model that holds the same weights.

    Raises `ConfigError` if `source` lacks a tensor or has it in another shape, or if the model has a matrix outside
    such layers (mixtures of experts do); and what `source` raises.
    """
    model = copy.deepcopy(skeleton)
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    _check(parameters, source, resident)
    held = {name: nn.Parameter(tensor) for name, tensor in resident.items()}
    for parent in list(model.modules()):
        for leaf, child in parent.named_children():
            name = names.get(id(getattr(child, "weight", None)))
            if name is not None and name not in held:
                setattr(parent, leaf, _streamed(child, source, name, dtype))
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = names[id(parameter)]
            if name not in held:
                if parameter.dim() > 1:
                    raise ConfigError(
                        f"{path}: {type(module).__name__} holds {name!r} of shape {tuple(parameter.shape)}, and only "
                        "plain linear layers and embeddings read their weight from disk; hold the whole model in memory"
                    )
                held[name] = nn.Parameter(source.get(name).to(dtype, copy=True), requires_grad=False)
            setattr(module, leaf, held[name])
    assert not any(t.is_meta for t in chain(model.parameters(), model.buffers())), "a skeleton has real buffers"
    return model


@dataclass(frozen=True)
class _Weight:
    """Where a weight is, and how it is used."""

    source: Source
    name: str
    dtype: torch.dtype
    transposed: bool = False
    """Stored as (in, out)."""

    def load(self, device: torch.device) -> Tensor:
        """The weight (out, in)."""
        weight = self.source.get(self.name).to(device, self.dtype)
        return weight.t() if self.transposed else weight

    def rows(self, index: Tensor) -> Tensor:
        """Rows of a table (rows, dim)."""
        return self.source.rows(self.name, index.cpu()).to(index.device, self.dtype)


class _Product(torch.autograd.Function):
    """x W^T + b with a weight that is loaded in each direction; only the gradient of x is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, load: Callable[[torch.device], Tensor]) -> Tensor:
        ctx.load, ctx.dtype = load, x.dtype
        return nn.functional.linear(x, load(x.device), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.load(grad.device).to(grad.dtype)  # under autocast the product, and so `grad`, was in its type
        inner = grad.flatten(0, -2) @ weight
        return inner.view(*grad.shape[:-1], -1).to(ctx.dtype), None, None


class _StreamedLinear(nn.Module):
    """`nn.Linear` or Conv1D: (..., in) to (..., out)."""

    def __init__(self, stored: _Weight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.stored = stored
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is None or not self.bias.requires_grad, "a bias is trained with its weight or not at all"
        product: Tensor = _Product.apply(x, self.bias, self.stored.load)  # type: ignore[no-untyped-call]
        return product


class _StreamedEmbedding(nn.Module):
    """`nn.Embedding`: whole numbers of any shape to (*shape, dim)."""

    def __init__(self, stored: _Weight) -> None:
        super().__init__()
        self.stored = stored

    def forward(self, index: Tensor) -> Tensor:
        return self.stored.rows(index)


def _streamed(module: Any, source: Source, name: str, dtype: torch.dtype) -> nn.Module:
    """What stands in for `module`, whose weight is `name`; the module itself if it is of no kind that can stream."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        return _StreamedLinear(_Weight(source, name, dtype), module.bias)
    if type(module) is Conv1D:
        return _StreamedLinear(_Weight(source, name, dtype, transposed=True), module.bias)
    if type(module) is nn.Embedding and module.max_norm is None:
        return _StreamedEmbedding(_Weight(source, name, dtype))
    kept: nn.Module = module
    return kept


def _check(parameters: dict[str, nn.Parameter], source: Source, resident: Named) -> None:
    """Whether `resident` fits the model, and `source` has the rest of it; raises `ConfigError` as `stream` does."""
    assert resident.keys() <= parameters.keys(), "a block of another model"
    assert all(parameters[name].shape == tensor.shape for name, tensor in resident.items()), "a block of another model"
    wanted = [name for name in parameters if name not in resident]
    missing = [name for name in wanted if name not in source.names]
    if missing:
        raise ConfigError(f"the stored weights lack {_some(missing)}; they are of another model, or not complete")
    for name in wanted:
        found, expected = source.shape(name), tuple(parameters[name].shape)
        if found != expected:
            raise ConfigError(
                f"stored tensor {name!r} has shape {found}, the model's has {expected}; they are of another model"
            )


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sum(base: Tensor, change: Tensor) -> Tensor:
    assert base.shape == change.shape, "a change of another shape"
    return (base.float() + change.float()).to(base.dtype)


def _stored(folder: Path) -> dict[str, Path]:
    """The file of each tensor in a Hugging Face folder."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(_names(single), single)
    if not index.is_file():
        raise ConfigError(
            f"{folder} has neither {single.name} nor {index.name}; save the model with save_pretrained of transformers"
        )
    try:
        shards = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} has no 'weight_map' of tensors and files: {error!r:.200}") from error
    return {name: folder / Path(str(file)).name for name, file in shards.items()}


def _names(file: Path) -> list[str]:
    try:
        with _open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors, write it anew: {error!s:.200}") from error


def _mapped(file: Path, name: str) -> Tensor:
    """A view of the tensor's bytes in the file, mapped for this tensor alone."""
    try:
        with _open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: tensor {name!r} cannot be read, write the file anew: {error!s:.200}") from error
    return tensor


def _float(tensor: Tensor, file: Path, name: str) -> Tensor:
    if tensor.dtype not in _FLOATS:
        raise ConfigError(f"{file}: tensor {name!r} is {tensor.dtype}, expected float32, bfloat16, float16 or float64")
    return tensor
