"""Sources of weights: tensors by name, read from a folder, a file or memory when they are used.

A file is mapped anew for each tensor, and the mapping goes with the tensor: the pages of a mapping
that stays open add up in the process's memory (RssFile) to the whole model, while read like this
the peak is one weight, without the copy that reading into a buffer makes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fluvial.errors import ConfigError
from fluvial.models.stored import FLOATS, some, stored_files
from fluvial.wire.tensors import Named

_open: Any = safe_open  # its stub has no types


class Source(ABC):
    """Weights by name, read anew at each call."""

    names: frozenset[str]
    """The names of its tensors."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """Return the tensor `name`, on the CPU, in its stored float type; it must not be written
        to."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; that of a compressed one is found by decoding it."""
        return tuple(self.get(name).shape)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Return rows `index` (any shape, whole numbers, on the CPU) of a matrix: (*index.shape,
        dim).

        In a mapped matrix only the pages of these rows are read.
        """
        return nn.functional.embedding(index, self.get(name))


class MemorySource(Source):
    """Tensors in memory, such as a change to add to a folder's weights."""

    def __init__(self, tensors: Named) -> None:
        self._tensors = tensors
        self.names = frozenset(tensors)

    def get(self, name: str) -> Tensor:
        """Return the tensor itself."""
        return self._tensors[name]


class FolderSource(Source):
    """A Hugging Face folder: model.safetensors, or shards with model.safetensors.index.json."""

    def __init__(
        self,
        path: Path,
        names: Iterable[str] | Mapping[str, str],
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """Find the tensors `names`, by their stored names or with the stored name of each.

        They are given in the types `dtypes`, or in the stored ones without an entry. Raises
        `ConfigError` if the folder cannot be read or lacks some of them.
        """
        stored = tensor_files(path)
        places = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
        missing = [name for name, place in places.items() if place not in stored]

        if missing:
            raise ConfigError(
                f"{path}: {some(missing)} not found among its {len(stored)} tensors; "
                "save the model anew with save_pretrained of transformers"
            )

        self._places = {name: (stored[place], place) for name, place in places.items()}
        self.names = frozenset(places)
        self._dtypes = dtypes or {}

    def get(self, name: str) -> Tensor:
        """Return the tensor, mapped; raises `ConfigError` for a type that no model has."""
        return self._typed(name, _mapped(*self._places[name]))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape, read from the head of the file."""
        return tuple(_mapped(*self._places[name]).shape)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Return rows `index`, and read no others."""
        return self._typed(name, nn.functional.embedding(index, _mapped(*self._places[name])))

    def _typed(self, name: str, tensor: Tensor) -> Tensor:
        kind = self._dtypes.get(name)
        if kind is None or kind.is_floating_point:
            tensor = _float(tensor, *self._places[name])
        return tensor if kind is None else tensor.to(kind)


class Finite(Source):
    """The tensors of a source, each of which is checked when it is first read."""

    def __init__(self, inner: Source, check: Callable[[Named], None]) -> None:
        """Read nothing; `check` raises for tensors with a value that is not finite."""
        self._inner = inner
        self._check = check
        self._checked: set[str] = set()
        self.names = inner.names

    def get(self, name: str) -> Tensor:
        """Return the tensor of the source."""
        tensor = self._inner.get(name)
        if name not in self._checked and tensor.is_floating_point():
            self._check({name: tensor})
            self._checked.add(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in the source."""
        return self._inner.shape(name)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Return rows `index`, and read no others."""
        return self._inner.rows(name, index)


class FileSource(Source):
    """One safetensors file of float tensors, or of frames (one-dimensional, uint8) to decode."""

    def __init__(self, path: Path, decode: Callable[[str, bytes], Tensor]) -> None:
        """Open the file; `decode` returns the tensor, on the CPU, for a name and its frame.

        Raises `ConfigError` if there is no such file.
        """
        self._path = path
        self._decode = decode
        self.names = frozenset(_names(path))

    def get(self, name: str) -> Tensor:
        """Return the tensor, mapped or decoded; raises `ConfigError` if it is neither float nor
        frame."""
        tensor = _mapped(self._path, name)
        if tensor.dtype == torch.uint8 and tensor.dim() == 1:
            tensor = self._decode(name, tensor.numpy().tobytes())
        return _float(tensor, self._path, name)


class Sum(Source):
    """The sum of two sources: added in fp32, given in the type of `first`; `second` may lack
    names."""

    def __init__(self, first: Source, second: Source) -> None:
        self._first = first
        self._second = second
        self.names = first.names

    def get(self, name: str) -> Tensor:
        """Return the sum of the tensors `name`."""
        base = self._first.get(name)
        return _sum(base, self._second.get(name)) if name in self._second.names else base

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in `first`."""
        return self._first.shape(name)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Return rows `index` of the sum."""
        base = self._first.rows(name, index)
        return _sum(base, self._second.rows(name, index)) if name in self._second.names else base


def _sum(base: Tensor, change: Tensor) -> Tensor:
    assert base.shape == change.shape, "a change of another shape"
    return (base.float() + change.float()).to(base.dtype)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor in a Hugging Face folder.

    Raises `ConfigError` where it has no safetensors, or damaged ones.
    """
    files = stored_files(folder)
    if not any(file.suffix == ".safetensors" for file in files.values()):
        raise ConfigError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json; save the "
            "model with save_pretrained of transformers"
        )
    return files


def mapped_tensors(folder: Path, names: Iterable[str]) -> Named:
    """Return tensors of a Hugging Face folder by their stored names, in one mapping of each file.

    Raises `ConfigError` where one cannot be read.
    """
    files = tensor_files(folder)
    places: dict[Path, list[str]] = {}
    for name in names:
        places.setdefault(files[name], []).append(name)

    tensors: Named = {}
    for file, stored in places.items():
        try:
            with _open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in stored}
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{file}: its tensors cannot be read, write the file anew: {error!s:.200}"
            ) from error

    return tensors


def _names(file: Path) -> list[str]:
    try:
        with _open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{file} cannot be read as safetensors, write it anew: {error!s:.200}"
        ) from error


def _mapped(file: Path, name: str) -> Tensor:
    """Return a view of the tensor's bytes in the file, mapped for this tensor alone."""
    try:
        with _open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{file}: tensor {name!r} cannot be read, write the file anew: {error!s:.200}"
        ) from error

    return tensor


def _float(tensor: Tensor, file: Path, name: str) -> Tensor:
    if tensor.dtype not in FLOATS:
        raise ConfigError(
            f"{file}: tensor {name!r} is {tensor.dtype}, expected float32, bfloat16, float16 or "
            "float64"
        )

    return tensor
