"""Hidden states of one site, both ways: as they are, as changes of samples that recur, or once.

Where both ends hold hidden states by sample, their memories are equal: each end adds what was sent,
and drops by one rule. A memory is a value, so that a conversation that fails leaves the one with
which it began.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from fluvial.codecs.activations.front_cache import FrontCache, FrontIndex
from fluvial.codecs.activations.recurring import Recurring
from fluvial.codecs.activations.samples import SampleBatch, SampleMemory
from fluvial.methods.flglm.coding import Coding, check_hidden
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.wire.payload import join_tensors, tensors_of
from fluvial.wire.tensors import Named

Way = Literal["up", "down"]
Memory = Mapping[Way, SampleMemory | FrontCache | FrontIndex]
"""Hidden states by sample that one end holds, for each way in which both ends do."""


def empty_memory(config: FlGlmConfig, coding: Coding, *, server: bool) -> Memory:
    """Return the memory of an end before the first round."""
    shape = (coding.width, coding.hidden.dtype, config.memory_bytes)
    memory: dict[Way, SampleMemory | FrontCache | FrontIndex] = {}

    if config.sends_changes:
        memory = {"up": SampleMemory.empty(*shape), "down": SampleMemory.empty(*shape)}
    if config.caches_front:
        memory["up"] = FrontCache.empty(*shape) if server else FrontIndex.empty(*shape)

    return memory


def memory_tensors(memory: Memory) -> Named:
    """Return a memory as tensors, for a payload."""
    return join_tensors({way: content.tensors() for way, content in memory.items()})


def restored_memory(empty: Memory, tensors: Named) -> Memory:
    """Return the memory that `memory_tensors` saved; raises `WireError`."""
    return {way: content.restored(tensors_of(way, tensors)) for way, content in empty.items()}


class HiddenStates:
    """The hidden states of one conversation, at one end of it."""

    def __init__(self, config: FlGlmConfig, coding: Coding, memory: Memory) -> None:
        """Begin with `memory`, which `self.memory` replaces after each message."""
        self.memory = memory
        self._coding = coding
        self._once = replace(coding, hidden=coding.first) if config.sends_changes else coding
        """The codecs of hidden states that are sent once."""
        self._changes = Recurring(coding.hidden, coding.first)

    def missing(self, batch: SampleBatch) -> SampleBatch:
        """Return the samples of `batch` whose rows a site makes and sends."""
        up = self.memory.get("up")
        return up.missing(batch) if isinstance(up, FrontIndex) else batch

    def encode(self, way: Way, batch: SampleBatch, rows: torch.Tensor) -> bytes:
        """Return the bytes of rows (tokens, width) of the batch, or of its missing samples."""
        memory = self.memory.get(way)
        if isinstance(memory, FrontIndex):
            frame = self._once.encode_hidden(rows)
            self._hold(way, memory.after(batch))
            return frame

        if isinstance(memory, SampleMemory):
            rows = rows.to(self._coding.hidden.dtype)
            frame, after = self._changes.encode(memory, batch, rows)
            self._hold(way, after)
            return frame

        return self._coding.encode_hidden(rows)

    def decode(self, way: Way, batch: SampleBatch, frame: bytes) -> torch.Tensor:
        """Return the rows (tokens, width) of the batch; raises `WireError`."""
        memory = self.memory.get(way)
        if isinstance(memory, FrontCache):
            received = self._once.decode_hidden(frame, memory.missing(batch).tokens)
            rows, cache = memory.complete(batch, received)
            self._hold(way, cache)
            return rows

        if isinstance(memory, SampleMemory):
            device = self._coding.device
            rows, after = self._changes.decode(memory, batch, frame, device=device)
            check_hidden(rows)
            self._hold(way, after)
            return rows

        return self._coding.decode_hidden(frame, batch.tokens)

    def _hold(self, way: Way, content: SampleMemory | FrontCache | FrontIndex) -> None:
        self.memory = {**self.memory, way: content}
