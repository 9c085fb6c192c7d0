"""Hidden states of a frozen front, which the server keeps: each sample is sent once.

Where the front is frozen and free of noise and dropout, the hidden states of a sample never change,
and no gradient returns. From its second pass on, two of the four tensors of a step need no byte.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fluvial.codecs.activations.samples import Held, SampleBatch, SampleMemory
from fluvial.errors import WireError
from fluvial.wire.tensors import Named


@dataclass(frozen=True)
class FrontIndex:
    """The site's end: which samples the server holds."""

    held: Held

    @classmethod
    def empty(cls, width: int, dtype: torch.dtype, max_bytes: int) -> Self:
        """Return the index of a server that holds nothing; arguments as of `FrontCache.empty`."""
        return cls(Held(width * dtype.itemsize, max_bytes))

    def missing(self, batch: SampleBatch) -> SampleBatch:
        """Return the samples of `batch` that must run through the front and be sent."""
        return self.held.unknown(batch)

    def after(self, batch: SampleBatch) -> "FrontIndex":
        """Return the index after the server has completed `batch`."""
        return FrontIndex(self.held.add(self.missing(batch)))

    def tensors(self) -> Named:
        """Return the state, for a payload."""
        return self.held.tensors()

    def restored(self, tensors: Named) -> "FrontIndex":
        """Return the index that `tensors` saved, with the bounds of this one; raises
        `WireError`."""
        return FrontIndex(self.held.restored(tensors))


@dataclass(frozen=True)
class FrontCache:
    """The server's end: the hidden states of one site by sample, as they were decoded."""

    memory: SampleMemory

    @classmethod
    def empty(cls, width: int, dtype: torch.dtype, max_bytes: int) -> Self:
        """Return a cache for rows (any, width) of `dtype`, of at most `max_bytes` for the site."""
        return cls(SampleMemory.empty(width, dtype, max_bytes))

    def missing(self, batch: SampleBatch) -> SampleBatch:
        """Return the samples of `batch` whose rows the site sends."""
        return self.memory.held.unknown(batch)

    def complete(self, batch: SampleBatch, received: Tensor) -> tuple[Tensor, "FrontCache"]:
        """Return the rows (tokens, width) of `batch`, of which those of the missing samples were
        `received`, on the device of these, and the cache after them; raises `WireError`."""
        missing = self.missing(batch)
        shape = (missing.tokens, self.memory.width)
        if tuple(received.shape) != shape or received.dtype != self.memory.dtype:
            raise WireError(
                f"front cache: rows of {received.dtype} with shape {tuple(received.shape)}, "
                f"expected {self.memory.dtype} with shape {shape} for {len(missing.samples)} "
                "samples that are not held; both ends need the same samples and bounds"
            )

        rows = batch.join({**self.memory.rows, **missing.split(received)}, received)
        return rows, FrontCache(self.memory.add(missing, received))

    def tensors(self) -> Named:
        """Return the state, for a payload."""
        return self.memory.tensors()

    def restored(self, tensors: Named) -> "FrontCache":
        """Return the cache that `tensors` saved, with the bounds of this one; raises
        `WireError`."""
        return FrontCache(self.memory.restored(tensors))
