"""Store of a site between visits, and the sources of weights made of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fluvial.errors import WireError
from fluvial.methods.fedcybgd.blocks import Partition
from fluvial.methods.fedcybgd.proxy import Manifest
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.models.weight_sources import FileSource, MemorySource, Source
from fluvial.wire.payload import Payload, read_values
from fluvial.wire.tensors import Layout, Named, is_finite


class Holder(Protocol):
    """The interface to a site that the site's half of a download needs."""

    pool: ModelPool
    seed: int

    def recall(self, slot: str) -> Payload:
        """Return what was kept under `slot`, or an empty payload."""
        ...

    def keep(self, slot: str, payload: Payload, *, draft: bool = False) -> None:
        """Keep `payload`; a draft is written to a file at once."""
        ...

    def file(self, slot: str) -> Path | None:
        """Return the file with what was kept, where there is one."""
        ...


@dataclass
class EmptyHolder:
    """A holder that has nothing, for the server to see what a site would see."""

    pool: ModelPool
    seed: int
    kept: dict[str, Payload] = field(default_factory=dict)

    def recall(self, slot: str) -> Payload:
        """Return what was kept under `slot`."""
        return self.kept.get(slot, Payload())

    def keep(self, slot: str, payload: Payload, *, draft: bool = False) -> None:  # noqa: ARG002
        """Keep `payload` in memory, as long as this object lives."""
        self.kept[slot] = payload

    def file(self, slot: str) -> None:
        """Return None: there is no file."""


@dataclass(frozen=True)
class Received:
    """A model as a site sees it; absolute weights by name (with an adapter: factors)."""

    start: Named
    """The block to train, fp32."""
    rest: Source
    """All other weights, in the model's type; maybe also others, which do not count."""
    manifest: Manifest | None = None
    """Manifest of a proxy, which says what of the model is missing."""


def layouts_of(parts: Partition) -> list[Layout]:
    """Return the blocks, and last the fixed rest."""
    return [*(block.layout for block in parts.blocks), parts.fixed]


def base_source(holder: Holder) -> Source:
    """Return the weights that a site has from the start: the base's files, or an adapter's initial
    factors."""
    pool = holder.pool
    return pool.base if pool.full else MemorySource(initial_state(pool.layout, holder.seed))


class Overlay(Source):
    """A source with others laid over it."""

    def __init__(self, below: Source, above: Iterable[Source]) -> None:
        self._places = dict.fromkeys(below.names, below) | {
            name: source for source in above for name in source.names
        }
        self.names = frozenset(self._places)

    def get(self, name: str) -> Tensor:
        """Return the weight from the uppermost source that has it."""
        return self._places[name].get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        return self._places[name].shape(name)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Return the rows of a weight, from the uppermost source that has it."""
        return self._places[name].rows(name, index)


def check_tensors(
    tensors: Named, expected: Mapping[str, tuple[int, ...]], kinds: Mapping[str, torch.dtype]
) -> None:
    """Raise `WireError` unless `found` has the names, shapes and types expected, and is finite."""
    if tensors.keys() != expected.keys():
        raise WireError(
            "visit: other tensors than expected, first "
            f"{sorted(tensors.keys() ^ expected.keys())[:2]}"
        )

    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name] or tensor.dtype != kinds[name]:
            what = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise WireError(f"visit: {name!r} is {what}, expected {kinds[name]} {expected[name]}")

    if not is_finite(tensors):
        raise WireError("visit: NaN or Inf among the weights")


def held_weights(
    holder: Holder, slot: str, decode: Callable[[str, bytes], Tensor]
) -> tuple[int | None, Source | None]:
    """Return what a site keeps of a block and its version: read from its file when it is asked for,
    where there is a file."""
    file = holder.file(slot)
    if file is not None:
        version = read_values(file).get("version")
        assert version is None or type(version) is int, "a site wrote its own file"
        return version, FileSource(file, decode)

    stored = holder.recall(slot)
    if not stored.tensors:
        return None, None

    tensors = {
        name: decode(name, tensor.numpy().tobytes()) if tensor.dtype == torch.uint8 else tensor
        for name, tensor in stored.tensors.items()
    }
    return stored.value("version", int), MemorySource(tensors)


def refuse_frame(name: str, _frame: bytes) -> Tensor:
    """Raise `WireError`, because a site stores changes as they are and not as frames."""
    raise WireError(f"{name!r}: a site keeps changes as they are, and here is a frame")
