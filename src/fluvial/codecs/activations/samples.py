"""Rows by sample, which both ends of a split model hold, within a number of bytes.

A sample is named by a number, that of its record at the site. Both ends drop the same samples by
the same rule, so neither says what it holds. States are values: what is added gives a new one, so a
step that fails or is sent again leaves the old one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from fluvial.errors import WireError
from fluvial.wire.tensors import Named

SAMPLE_BYTES = 512
"""Bytes that are counted for a sample beside its rows, so that empty samples are bounded too."""


@dataclass(frozen=True)
class SampleBatch:
    """The samples of a batch and their lengths in tokens, in the order of the batch's rows.

    Raises `WireError` for a sample that is named twice, and for numbers that are not from 0 to
    2^63 - 1.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.lengths):
            raise WireError(f"samples: {len(self.samples)} numbers and {len(self.lengths)} lengths")
        if len(set(self.samples)) < len(self.samples):
            raise WireError("samples: a number is named twice in one batch")
        if not all(0 <= number < 2**63 for number in (*self.samples, *self.lengths)):
            raise WireError("samples: a number or a length is not from 0 to 2^63 - 1")

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(self.lengths)

    def split(self, rows: Tensor) -> dict[int, Tensor]:
        """Return views of `rows` (tokens, width) by sample."""
        assert rows.shape[0] == self.tokens, "rows of another batch"
        return dict(zip(self.samples, torch.split(rows, list(self.lengths)), strict=True))

    def join(self, by_sample: Mapping[int, Tensor], like: Tensor) -> Tensor:
        """Return the rows (tokens, width) of the batch from those of each sample, with the type and
        on the device of `like` (any, width)."""
        rows = [by_sample[sample].to(like.device, like.dtype) for sample in self.samples]
        return torch.cat([like[:0], *rows])


@dataclass
class SampleNumbers:
    """The numbers by which a site names its samples: in the order in which they are first sent, so
    that they say that a sample comes again and nothing else."""

    by_place: dict[int, int] = field(default_factory=dict)
    """Number of each sample that was sent, by its place among the site's sequences."""

    def of(self, places: Sequence[int]) -> tuple[int, ...]:
        """Return the numbers of the sequences at `places`, new ones for those not yet sent."""
        return tuple(self.by_place.setdefault(place, len(self.by_place)) for place in places)


@dataclass(frozen=True)
class Held:
    """The samples that both ends hold, without their rows.

    Where there is no room, the sample that was added longest ago is dropped. With less room than
    all samples need and an order of samples that repeats, each one is dropped before it recurs.
    """

    token_bytes: int
    """Bytes of a row."""
    max_bytes: int
    """Bytes of all samples, at most; a sample that needs more is never held."""
    lengths: Mapping[int, int] = field(default_factory=dict)
    """Tokens of each sample, the one added longest ago first."""
    bytes_held: int = 0
    """Bytes of all samples that are held."""

    def known(self, batch: SampleBatch) -> SampleBatch:
        """Return the samples of `batch` that are held with the same length."""
        return self._chosen(batch, held=True)

    def unknown(self, batch: SampleBatch) -> SampleBatch:
        """Return the other samples of `batch`."""
        return self._chosen(batch, held=False)

    def add(self, batch: SampleBatch) -> "Held":
        """Return what is held after the samples of `batch` were added, or added again."""
        lengths = dict(self.lengths)
        total = self.bytes_held

        for sample, length in zip(batch.samples, batch.lengths, strict=True):
            before = lengths.pop(sample, None)
            total -= 0 if before is None else self._bytes(before)
            if self._bytes(length) <= self.max_bytes:
                lengths[sample] = length
                total += self._bytes(length)

        while total > self.max_bytes:
            oldest = next(iter(lengths))
            total -= self._bytes(lengths.pop(oldest))

        return Held(self.token_bytes, self.max_bytes, lengths, total)

    def tensors(self) -> Named:
        """Return the state, for a payload."""
        return {
            "samples": torch.tensor(list(self.lengths), dtype=torch.int64),
            "lengths": torch.tensor(list(self.lengths.values()), dtype=torch.int64),
        }

    def restored(self, tensors: Named) -> "Held":
        """Return the state that `tensors` saved, with the bounds of this one; raises
        `WireError`."""
        numbers = []
        for name in ("samples", "lengths"):
            tensor = tensors.get(name)
            if tensor is None or tensor.dtype != torch.int64 or tensor.dim() != 1:
                raise WireError(f"held samples: {name!r} is not a vector of int64")
            numbers.append(tuple(tensor.tolist()))

        batch = SampleBatch(*numbers)
        held = Held(self.token_bytes, self.max_bytes).add(batch)
        if len(held.lengths) < len(batch.samples):
            raise WireError(f"held samples: more than {self.max_bytes} bytes")

        return held

    def _bytes(self, length: int) -> int:
        return SAMPLE_BYTES + length * self.token_bytes

    def _chosen(self, batch: SampleBatch, *, held: bool) -> SampleBatch:
        pairs = [
            (sample, length)
            for sample, length in zip(batch.samples, batch.lengths, strict=True)
            if (self.lengths.get(sample) == length) == held
        ]
        return SampleBatch(
            tuple(sample for sample, _ in pairs), tuple(length for _, length in pairs)
        )


@dataclass(frozen=True)
class SampleMemory:
    """The samples that both ends hold, with their rows."""

    width: int
    dtype: torch.dtype
    held: Held
    rows: Mapping[int, Tensor] = field(default_factory=dict)
    """Rows (length, width) of each sample that is held, on the CPU."""

    @classmethod
    def empty(cls, width: int, dtype: torch.dtype, max_bytes: int) -> Self:
        """Return a memory for rows (any, width) of `dtype`."""
        return cls(width, dtype, Held(width * dtype.itemsize, max_bytes))

    def add(self, batch: SampleBatch, rows: Tensor) -> "SampleMemory":
        """Return the memory after the samples of `batch` were added with `rows` (tokens, width)."""
        assert rows.dtype == self.dtype, rows.dtype
        held = self.held.add(batch)
        fresh = batch.split(rows.detach())
        # A view would keep the rows of the whole batch, and a device has less memory.
        by_sample = {
            sample: fresh[sample].to("cpu", copy=True) if sample in fresh else self.rows[sample]
            for sample in held.lengths
        }
        return SampleMemory(self.width, self.dtype, held, by_sample)

    def join(self, batch: SampleBatch, device: torch.device | str) -> Tensor:
        """Return the rows (tokens, width) of a batch whose samples are all held."""
        like = torch.empty(0, self.width, dtype=self.dtype, device=device)
        return batch.join(self.rows, like)

    def tensors(self) -> Named:
        """Return the state, for a payload."""
        every = SampleBatch(tuple(self.held.lengths), tuple(self.held.lengths.values()))
        return {**self.held.tensors(), "rows": self.join(every, "cpu")}

    def restored(self, tensors: Named) -> "SampleMemory":
        """Return the memory that `tensors` saved, with the bounds of this one; raises
        `WireError`."""
        held = Held(self.held.token_bytes, self.held.max_bytes).restored(tensors)
        rows = tensors.get("rows")
        shape = (sum(held.lengths.values()), self.width)

        if rows is None or rows.dtype != self.dtype or tuple(rows.shape) != shape:
            raise WireError(f"held samples: 'rows' is not of {self.dtype} with shape {shape}")
        if not bool(rows.isfinite().all()):
            raise WireError("held samples: 'rows' are NaN or infinite")

        ends = [0]
        for length in held.lengths.values():
            ends.append(ends[-1] + length)

        pieces = (rows[start:end].clone() for start, end in pairwise(ends))
        return SampleMemory(
            self.width, self.dtype, held, dict(zip(held.lengths, pieces, strict=True))
        )
