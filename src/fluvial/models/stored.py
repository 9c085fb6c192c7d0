"""The tensors that a model's folder stores: names, shapes and types, from headers alone, and those
whose values are not all finite."""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fluvial.errors import ConfigError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST = 100_000_000
"""Most bytes of a header; safetensors itself has the same limit."""
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_AT_ONCE = 2**24
"""Bytes of a file that are read at a time, where values are looked at."""


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors that a folder stores, by name and without values; none without weights.

    Raises `ConfigError` for a missing shard, a damaged file, an index that does not fit its files,
    or a pickle that holds more than tensors.
    """
    weights = _weights_file(folder)
    if weights is not None:
        return _sharded(folder, weights) if _is_index(weights) else _header(weights)

    if local := sorted(
        path.name for path in folder.iterdir() if path.is_file() and path.name != "config.json"
    ):
        others = [
            name
            for name in local
            if name.endswith((".safetensors", ".bin", ".h5", ".msgpack", ".gguf", ".pth"))
        ]
        if others:
            raise ConfigError(
                f"{folder}: has neither {_SINGLE[0]} nor an index of its shards, only "
                f"{some(others)}; save the model with save_pretrained of transformers"
            )

    return {}


def stored_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor that a folder stores; raises `ConfigError` as
    `stored_tensors` does."""
    weights = _weights_file(folder)
    names = stored_tensors(folder)
    if weights is None or not _is_index(weights):
        return {} if weights is None else dict.fromkeys(names, weights)
    places = _places(weights)
    return {name: folder / places[name] for name in names}


def not_finite(folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """Return the stored tensors that hold a value that is not finite in `dtype`, each with the name
    of its file.

    Each tensor is read once, no more than `_AT_ONCE` bytes at a time, and not again as long as its
    file is the same.
    """
    found: dict[str, str] = {}
    for file in _files(folder):
        state = file.stat()
        names = _not_finite_in(file.resolve(), dtype, state.st_size, state.st_mtime_ns)
        found |= dict.fromkeys(names, file.name)
    return found


@lru_cache(maxsize=1024)
def _not_finite_in(file: Path, dtype: torch.dtype, *_state: int) -> tuple[str, ...]:
    wrong = (name for name, values in _values(file) if not all_finite(values, dtype))
    return tuple(dict.fromkeys(wrong))


def all_finite(values: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether all values of a float tensor are finite, in `dtype` where it is given, in one
    pass over them."""
    if not values.numel():
        return True
    return all(bool(end.to(dtype or end.dtype).isfinite()) for end in values.detach().aminmax())


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder that `stored_tensors` has read."""
    weights = _weights_file(folder)
    if weights is None or not _is_index(weights):
        return [] if weights is None else [weights]
    return [folder / name for name in sorted(set(_places(weights).values()))]


def _weights_file(folder: Path) -> Path | None:
    """Return the file with all weights of a folder, or the index of its shards; None without."""
    names = (name for single in _SINGLE for name in (single, f"{single}.index.json"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _is_index(weights: Path) -> bool:
    return weights.suffix == ".json"


def _values(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the values of each float tensor of a file, in pieces, with its name."""
    if file.suffix != ".safetensors":
        from transformers.modeling_utils import load_state_dict

        stored = load_state_dict(file, map_location="cpu", weights_only=True)  # maps the file
        yield from (pair for pair in stored.items() if pair[1].dtype in FLOATS)
        return

    piece = bytearray(_AT_ONCE)
    with file.open("rb") as opened:
        begins, entries = _entries(opened)
        for name, entry in entries.items():
            kind = _TYPES[entry["dtype"]]
            if kind not in FLOATS:
                continue

            start, end = entry["data_offsets"]
            opened.seek(begins + start)
            for begin in range(start, end, _AT_ONCE):
                read = opened.readinto(memoryview(piece)[: end - begin])
                yield name, torch.frombuffer(piece, dtype=kind, count=read // kind.itemsize)


def _places(index: Path) -> dict[str, str]:
    """Return the name of the file of each tensor; raises `ConfigError` for a damaged index."""
    try:
        return {
            str(name): str(file)
            for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()
        }
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ConfigError(
            f"{index}: has no 'weight_map' of tensors and files: {error!r:.200}; copy it again"
        ) from error


def _sharded(folder: Path, index: Path) -> dict[str, Tensor]:
    places = _places(index)
    stored: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise ConfigError(
                f"{folder}: the shard {file!r} that {index.name} names is missing; copy it again"
            )

        tensors = _header(folder / file)
        absent = sorted(
            name for name, place in places.items() if place == file and name not in tensors
        )
        if absent:
            raise ConfigError(
                f"{folder / file}: lacks {some(absent)}, which {index.name} places there; copy "
                "both again"
            )

        stored |= tensors

    return stored


def _header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one file, without values.

    Raises `ConfigError` where it is damaged or of another kind.
    """
    if file.suffix == ".safetensors":
        return _safetensors_header(file)

    from transformers.modeling_utils import load_state_dict

    try:
        return dict(load_state_dict(file, map_location="meta", weights_only=True))
    except Exception as error:
        raise ConfigError(
            f"{file}: is no plain file of tensors, and loading it could run foreign code; save the "
            f"model as safetensors ({first_line(error):.120})"
        ) from error


def _safetensors_header(file: Path) -> dict[str, Tensor]:
    """Read the header alone: `safe_open` maps the whole file, for which a machine may lack the
    address space."""
    try:
        with file.open("rb") as opened:
            begins, entries = _entries(opened)

        tensors = {
            str(name): torch.empty(entry["shape"], dtype=_TYPES[entry["dtype"]], device="meta")
            for name, entry in sorted(entries.items())  # the order in which transformers reads
        }
        sizes = {
            name: entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in entries.items()
        }
        wrong = [name for name, tensor in tensors.items() if tensor.nbytes != sizes[name]]

        if wrong:
            raise ValueError(
                f"{wrong[0]!r} has {sizes[wrong[0]]} bytes, expected {tensors[wrong[0]].nbytes}"
            )

        expected = begins + sum(sizes.values())
        if expected != file.stat().st_size:
            raise ValueError(f"{file.stat().st_size} bytes, expected {expected}")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RuntimeError,  # and with it that of nesting
    ) as error:
        raise ConfigError(
            f"{file}: is damaged or cut short; copy it again ({first_line(error):.120})"
        ) from error

    return tensors


def _entries(opened: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Return where the values of a safetensors file begin, and the entry of each tensor."""
    length = int.from_bytes(opened.read(8), "little")
    if length > _LONGEST:
        raise ValueError(f"a header of {length} bytes")
    entries: dict[str, Any] = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    return 8 + length, entries


def first_line(error: Exception) -> str:
    """Return an error's text in one line of at most 300 characters, with its kind where that
    helps."""
    text = " ".join(str(error).split())
    plain = isinstance(error, OSError | ValueError | ImportError)
    return (text if text and plain else f"{type(error).__name__}: {text}".rstrip(": "))[:300]


def some(names: list[str]) -> str:
    """Return the first three of `names`, quoted, and how many more there are."""
    return ", ".join(map(repr, names[:3])) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
