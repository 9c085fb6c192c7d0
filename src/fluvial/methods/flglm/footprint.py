"""Memory of a split step's passes, counted on shapes alone: they run on the meta device.

Every storage that an operation makes counts from its first to its last use, so the figures follow
the model's own code, with or without gradient checkpointing. Buffers inside kernels are not seen,
and under `train.bf16` activations count as if they were of the base's type, which is more.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluvial.errors import ConfigError
from fluvial.models.part_tuning import PartKind, PartNames, Place
from fluvial.models.split import Cut, Part, decoder_layers
from fluvial.training.config import TrainConfig
from fluvial.training.train import shifted, summed_loss
from fluvial.wire.tensors import factor

STEP = 2
"""Bytes of an optimizer's step for each byte of a gradient: itself, and the update."""


@dataclass(frozen=True)
class Passes:
    """Bytes of one part's forward and backward pass over a micro-batch."""

    held: int
    """Bytes that wait between the forward and the backward pass."""
    peak: int
    """Most bytes at a time."""
    gradients: int
    """Bytes of the parameters' gradients, which stay until the step."""

    def more(self, other: "Passes", layers: int) -> "Passes":
        """Return the bytes with `layers` further layers, each as `other` has one more than this."""
        return Passes(
            self.held + layers * (other.held - self.held),
            self.peak + layers * (other.peak - self.peak),
            self.gradients + layers * (other.gradients - self.gradients),
        )


@dataclass(frozen=True)
class Batch:
    """The shape of a micro-batch."""

    sequences: int
    tokens: int
    waiting: int = 1
    """Micro-batches whose activations wait for a gradient at a time, at most."""


@dataclass(frozen=True)
class Footprint:
    """Passes of each part with one and with two layers; all layers count as the first ones do."""

    fronts: tuple[Passes, Passes]
    middles: tuple[Passes, Passes]
    backs: tuple[Passes, Passes]
    waiting_at_site: int = 1
    """Micro-batches whose passes of A wait at a time."""
    waiting_at_server: int = 1
    """Micro-batches of a replica whose passes of B do."""
    decoded: int = 0
    """Bytes of the largest weight that is dequantised for a product; 0 where none is quantised."""

    def site(self, front: int, back: int) -> int:
        """Return the most bytes at a site: A's wait while C runs, and A runs backward after it."""
        others = self.waiting_at_site - 1
        one, two = self.fronts
        first = one.more(two, front - 1)
        one, two = self.backs
        last = one.more(two, back - 1)
        return max(
            self.waiting_at_site * first.held + last.peak + self.decoded,
            others * first.held + first.peak + last.gradients + self.decoded,
            STEP * (first.gradients + last.gradients),
        )

    def server(self, layers: int, replicas: int = 1) -> int:
        """Return the most bytes of replicas of `layers` layers, which all wait for gradients."""
        one, two = self.middles
        passes = one.more(two, layers - 1)
        waiting = max(self.waiting_at_server * passes.held, passes.gradients)
        running = (self.waiting_at_server - 1) * passes.held + passes.peak + self.decoded
        return max((replicas - 1) * waiting + running, STEP * passes.gradients * replicas)


def footprint(
    blank: Callable[[PartKind], nn.Module],
    kinds: Mapping[Place, PartKind],
    train: TrainConfig,
    *,
    site: Batch,
    server: Batch,
    decoded: int = 0,
) -> Footprint:
    """Return the memory of passes of a model whose parts are tuned as `kinds` says.

    `blank` makes the model on the meta device as a part of a kind has it, not quantised; `decoded`
    is added for one that is. Raises `ConfigError` for
    a model whose passes depend on values, as some mixtures of experts do.
    """
    models = {kind: blank(kind) for kind in set(kinds.values())}
    model = next(iter(models.values()))
    passes = {kind: _PassesOnShapes(each, kinds, train) for kind, each in models.items()}
    layers = len(decoder_layers(model)[1])
    fewer = 1 if layers < 4 else 2  # a model of three layers has one in each part

    def both(of: Callable[[int], Passes]) -> tuple[Passes, Passes]:
        one = of(1)
        return one, of(2) if fewer == 2 else one

    try:
        return Footprint(
            both(lambda count: passes[kinds["front"]].front(count, site)),
            both(lambda count: passes[kinds["middle"]].middle(count, server)),
            both(lambda count: passes[kinds["back"]].back(count, site)),
            site.waiting,
            server.waiting,
            decoded,
        )
    except RuntimeError as error:
        if not _asks_for_values(error):
            raise
        raise ConfigError(
            f"{type(model).__name__}: its memory follows from values and not from shapes alone "
            f"({str(error).splitlines()[0]:.100})"
        ) from error


def _asks_for_values(error: RuntimeError) -> bool:
    """Return True for what PyTorch raises where a tensor without values is asked for some."""
    return isinstance(error, NotImplementedError) or "meta tensor" in str(error).lower()


class _PassesOnShapes:
    """Passes of the parts of one model."""

    def __init__(
        self, model: nn.Module, kinds: Mapping[Place, PartKind], train: TrainConfig
    ) -> None:
        self._layers = len(decoder_layers(model)[1])
        self._kinds = kinds
        self._part = Part(model, Cut(self._layers, 1, 1), server=False)
        self._part.switch_dropout(active=True)
        self._part.switch_checkpointing(train.gradient_checkpointing)

    def front(self, layers: int, batch: Batch) -> Passes:
        """Return A's passes, from token ids to hidden states."""
        self._tune(layers, 1, server=False)
        ids, mask = self._ids(batch)

        with _fused_attention(), _Live() as live:
            rows = self._part.embed(ids, mask).clone()  # without padding
            held = live.bytes
            if rows.requires_grad:
                torch.autograd.backward(rows, torch.empty_like(rows))

        return Passes(held, live.peak, self._gradients())

    def middle(self, layers: int, batch: Batch) -> Passes:
        """Return B's passes, from received hidden states to sent ones."""
        self._tune(1, self._layers - 1 - layers, server=True)
        _, mask = self._ids(batch)

        with _fused_attention(), _Live() as live:
            rows = self._rows(batch)
            sent = self._part.middle(rows.clone(), mask).clone()
            held = live.bytes
            torch.autograd.backward(sent, torch.empty_like(sent))

        return Passes(held, live.peak, self._gradients())

    def back(self, layers: int, batch: Batch) -> Passes:
        """Return C's passes, from received hidden states to the loss."""
        self._tune(1, layers, server=False)
        ids, mask = self._ids(batch)

        with _fused_attention(), _Live() as live:
            rows = self._rows(batch)
            logits = self._part.logits(rows.clone(), mask)
            loss = summed_loss(*shifted(logits, ids)) / 1
            held = live.bytes
            torch.autograd.backward(loss)

        return Passes(held, live.peak, self._gradients())

    def _rows(self, batch: Batch) -> Tensor:
        shape = (batch.sequences, batch.tokens, self._part.width)
        return torch.empty(shape, dtype=self._part.dtype, device="meta").requires_grad_()

    def _tune(self, front: int, back: int, *, server: bool) -> None:
        """Cut there, and let what is tuned at that end require gradients."""
        part = self._part
        names = PartNames.of(part.model, front, back)
        part.cut = names.cut
        part.server = server
        for name, parameter in part.model.named_parameters():
            kind = self._kinds[names.place(name)]
            parameter.grad = None
            parameter.requires_grad_(
                part.holds(name) and kind == ("lora" if factor(name) else "full")
            )

    def _gradients(self) -> int:
        """Return the bytes of the gradients that a pass has left."""
        gradients = [parameter.grad for parameter in self._part.model.parameters()]
        return sum(each.nbytes for each in gradients if each is not None)

    @staticmethod
    def _ids(batch: Batch) -> tuple[Tensor, Tensor]:
        ids = torch.empty((batch.sequences, batch.tokens), dtype=torch.int64, device="meta")
        return ids, torch.empty_like(ids)


_attention = nn.functional.scaled_dot_product_attention


def _fused(query: Tensor, *args: Any, **options: Any) -> Tensor:
    """Return what attention returns, by a kernel that keeps no scores where there are shapes alone.

    Processors and GPUs have such kernels, and the meta device has none.
    """
    if not query.is_meta:
        return _attention(query, *args, **options)

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = attention(
        query,
        *args[:2],
        is_causal=bool(options.get("is_causal", False)),
        attn_mask=options.get("attn_mask"),
        scale=options.get("scale"),
    )[0]
    return output


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Put `_fused` in the place of torch's attention, which other threads may call meanwhile."""
    nn.functional.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = _attention


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that live at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.peak = 0
        self._known: set[int] = set()
        self._outside: set[int] = set()
        """Storages that were there before, such as weights, of which operations make views."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it makes."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return False  # the question whether a mask hides nothing: with padding it hides some
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._outside.add(tensor.untyped_storage()._cdata)

        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())

        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._outside:
            return

        self._known.add(key)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size
