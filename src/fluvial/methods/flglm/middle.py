"""The server's layers in training, B: one replica for one round."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fluvial.codecs.activations.rows import pack, unpack
from fluvial.errors import WireError
from fluvial.methods.flglm.tuned_part import TunedPart
from fluvial.models.split import Part


def pass_rows(part: Part, rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return B's hidden states of A's `rows`, both (tokens, width); `lengths` are of sequences."""
    counts = torch.tensor(lengths, device=part.device)
    before, mask = unpack(rows, counts, max(lengths), "right")
    return pack(part.middle(before, mask), mask)


class Middle(TunedPart):
    """The server's part between the hidden states that sites send and those they receive."""

    _graph: tuple[Tensor, Tensor] | None = None
    """Hidden states in and out of the forward pass whose gradient is awaited."""

    @property
    def tokens(self) -> int:
        """Tokens whose gradient is awaited: none where neither middle nor front are tuned."""
        assert self._graph is not None, "no forward pass"
        sent = self._graph[1]
        return len(sent) if sent.requires_grad else 0

    def forward(
        self, rows: Tensor, lengths: Sequence[int], *, returns: bool, dropout_seed: int
    ) -> Tensor:
        """Return hidden states behind the layers of those before them, both (tokens, width).

        `returns` says that the gradient of `rows` will be asked for.
        """
        received = rows.to(self.part.device).requires_grad_(returns)
        self.part.reseed_dropout(dropout_seed)

        with self.passing():
            sent = pass_rows(self.part, received, lengths)

        self._graph = (received, sent)
        return sent.detach()

    def drop_gradients(self) -> None:
        """Begin a step again, without the pass whose gradient is awaited."""
        super().drop_gradients()
        self._graph = None

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, float]:
        """Add up gradients from that of `forward`'s result.

        Return the gradient of its `rows`, and the squared norm of what is added up. The first is
        None where `forward` was told that none is needed. Raises `WireError` where the sum is
        not finite.
        """
        assert self._graph is not None, "a backward pass without a forward pass"
        received, sent = self._graph
        self._graph = None
        if sent.requires_grad:
            sent.backward(gradient.to(sent.device, sent.dtype))  # type: ignore[no-untyped-call]

        norm = self.squared_norm()
        if not math.isfinite(norm):
            raise WireError("the gradients of the server's layers are not finite")

        return received.grad, norm
