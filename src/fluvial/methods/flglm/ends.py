"""The site's layers in training: A, which makes hidden states, and C, which makes the loss."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fluvial.codecs.activations.rows import lengths_from_mask, pack, unpack
from fluvial.data import Example
from fluvial.methods.flglm.tuned_part import TunedPart
from fluvial.models.split import Part
from fluvial.training.config import TrainConfig
from fluvial.training.train import collate, shifted, summed_loss
from fluvial.wire.tensors import Named


class MicroBatch:
    """A micro-batch between A's forward and its backward pass."""

    def __init__(self, batch: dict[str, Tensor], rows: Tensor, dropout_seed: int) -> None:
        self.batch = batch
        self.dropout_seed = dropout_seed
        self._rows = rows
        self.rows = rows.detach()
        """A's hidden states (tokens, width) of the sequences on which it ran."""
        self.lengths = lengths_from_mask(batch["attention_mask"], "right")
        """Tokens of each sequence."""
        self.behind: Named = {}
        """Gradients by C of tensors that A has too, which are added with those by A."""

    @property
    def returns(self) -> bool:
        """True where A has something to train, so that the gradient of `rows` is needed."""
        return self._rows.requires_grad

    def backward(self, gradient: Tensor) -> None:
        """Run A's backward pass from the gradient of `rows`."""
        gradient = gradient.to(self._rows.device, self._rows.dtype)
        self._rows.backward(gradient)  # type: ignore[no-untyped-call]


class Ends(TunedPart):
    """The site's part, before and behind the server's.

    Gradients are added in one order, however many micro-batches are in flight: for each
    micro-batch those by C, then those by A. So those by C of a tied embedding wait for A's.
    """

    def __init__(
        self,
        part: Part,
        tuned: Sequence[str],
        train: TrainConfig,
        *,
        front: Collection[str],
        steps: int,
        start: Named,
    ) -> None:
        """See `TunedPart`; `front` names tensors of A."""
        super().__init__(part, tuned, train, steps=steps, start=start)
        self._front = {name: self._trained[name] for name in tuned if name in front}

    def begin(
        self,
        examples: Sequence[Example],
        *,
        pad_token_id: int,
        dropout_seed: int,
        clip: Callable[[Tensor], Tensor],
        alone: Sequence[Example] | None = None,
    ) -> MicroBatch:
        """Run A on the sequences of a micro-batch, and `clip` its hidden states (tokens, width).

        With `alone`, it runs on these sequences instead, each by itself.
        """
        batch = collate(examples, pad_token_id, self.part.device)
        self.part.reseed_dropout(dropout_seed)
        if alone is None:
            return MicroBatch(batch, clip(self._embedded(batch)), dropout_seed)

        rows = [
            self._embedded(collate([example], pad_token_id, self.part.device)) for example in alone
        ]
        nothing = torch.empty(0, self.part.width, dtype=self.part.dtype, device=self.part.device)
        return MicroBatch(batch, torch.cat([nothing, *rows]), dropout_seed)

    def _embedded(self, batch: dict[str, Tensor]) -> Tensor:
        """Return A's hidden states (tokens, width)."""
        with self.passing():
            hidden = self.part.embed(batch["input_ids"], batch["attention_mask"])

        return pack(hidden, batch["attention_mask"])

    def finish(
        self, micro: MicroBatch, received: Tensor, tokens: int, *, returns: bool
    ) -> tuple[float, Tensor]:
        """Run C on B's hidden states `received` (tokens, width), and its backward pass.

        Return the summed loss, nats, and the gradient of `received` for the loss divided by
        `tokens`, which is empty (0, width) unless it `returns`.
        """
        self.part.reseed_dropout(micro.dropout_seed)
        rows = received.to(self.part.device).requires_grad_(returns)
        width = micro.batch["input_ids"].shape[1]
        hidden, mask = unpack(rows, micro.lengths, width, "right")

        with self.passing():
            logits = self.part.logits(hidden, mask)
            loss = summed_loss(*shifted(logits, micro.batch["labels"]))

        with self.recomputing(micro.dropout_seed), self._set_aside(micro):
            (loss / tokens).backward()  # type: ignore[no-untyped-call]

        gradient = rows[:0] if rows.grad is None else rows.grad
        return float(loss.detach()), gradient

    def backward(self, micro: MicroBatch, gradient: Tensor) -> None:
        """Run A's backward pass from the gradient of its hidden states (tokens, width)."""
        for name, tensor in micro.behind.items():
            parameter = self._front[name]
            parameter.grad = tensor if parameter.grad is None else parameter.grad.add_(tensor)

        with self.recomputing(micro.dropout_seed):
            micro.backward(gradient)

    @contextmanager
    def _set_aside(self, micro: MicroBatch) -> Iterator[None]:
        """Let the gradients of A's tensors that come in this block be those `micro.behind`."""
        before = {name: parameter.grad for name, parameter in self._front.items()}
        for parameter in self._front.values():
            parameter.grad = None

        yield
        for name, parameter in self._front.items():
            if parameter.grad is not None:
                micro.behind[name] = parameter.grad
            parameter.grad = before[name]
