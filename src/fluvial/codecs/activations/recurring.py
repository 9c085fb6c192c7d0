"""Coded changes of samples that recur: AQ-SGD, in which the error falls from epoch to epoch.

Wang, Yuan, Rimanic, He, Dao, Chen, Re and Zhang, "Fine-tuning language models over slow networks
using activation quantization with guarantees", NeurIPS 2022, https://arxiv.org/abs/2206.01299. The
first pass of a sample is sent as it is; in later passes, what is coded is its change since the last
pass, m <- m + Q(a - m) in algorithm 1. Both ends hold the same m for each sample.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from fluvial.codecs.activations.base import ActivationCodec, check_sendable
from fluvial.codecs.activations.samples import SampleBatch, SampleMemory
from fluvial.errors import WireError


@dataclass(frozen=True)
class Recurring:
    """A codec of rows by sample, whose two ends have equal memories.

    Bytes: the changes of the samples in memory, then the rows of the others, each in the order of
    the batch. An end replaces its memory by the one returned once the step counts.
    """

    change: ActivationCodec
    """Codec of changes."""
    first: ActivationCodec
    """Codec of samples that are not in memory; exact in the paper."""

    def __post_init__(self) -> None:
        assert self.change.dtype == self.first.dtype, "codecs of two float types"

    def size(self, memory: SampleMemory, batch: SampleBatch) -> int:
        """Return the bytes that `encode` makes, exactly; raises `ConfigError`."""
        changed = memory.held.known(batch).tokens
        width = memory.width
        return self.change.size(changed, width) + self.first.size(batch.tokens - changed, width)

    def encode(
        self,
        memory: SampleMemory,
        batch: SampleBatch,
        rows: Tensor,
        *,
        generator: Generator | None = None,
    ) -> tuple[bytes, SampleMemory]:
        """Return the bytes of `rows` (tokens, width), and the memory after them.

        Rounds as `ActivationCodec.encode`. Raises `DivergenceError` for values that are NaN or
        infinite.
        """
        check_sendable(rows)
        by_sample = batch.split(rows.detach())
        known = memory.held.known(batch)
        unknown = memory.held.unknown(batch)

        before = memory.join(known, rows.device).float()
        change = self.change.to_dtype(known.join(by_sample, before) - before)
        data = self.change.encode(change, generator=generator)
        data += self.first.encode(unknown.join(by_sample, rows), generator=generator)
        _, after = self.decode(memory, batch, data, device=rows.device)

        return data, after

    def decode(
        self,
        memory: SampleMemory,
        batch: SampleBatch,
        data: bytes,
        *,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, SampleMemory]:
        """Return the rows (tokens, width) that `data` carries, on `device`, and the memory after
        them; raises `WireError`."""
        width = memory.width
        known = memory.held.known(batch)
        unknown = memory.held.unknown(batch)
        expected = self.size(memory, batch)

        if len(data) != expected:
            raise WireError(
                f"activations: {len(data)} bytes, expected {expected} for {known.tokens} tokens of "
                f"{len(known.samples)} samples in memory and {unknown.tokens} others; both ends "
                "need the same memory and codecs"
            )

        end = self.change.size(known.tokens, width)
        change = self.change.decode(data[:end], known.tokens, width, device=device)
        before = memory.join(known, device)
        changed = self.change.to_dtype(before.float() + change.float())
        first = self.first.decode(data[end:], unknown.tokens, width, device=device)

        rows = batch.join(known.split(changed) | unknown.split(first), first)
        return rows, memory.add(batch, rows)
