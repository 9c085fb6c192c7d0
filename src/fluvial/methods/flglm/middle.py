"""The server's layers in training, B: one replica for one round."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fluvial.errors import WireError
from fluvial.methods.flglm.passes import length_groups, pass_groups, pass_rows
from fluvial.methods.flglm.tuned_part import TunedPart
from fluvial.models.split import Part
from fluvial.training.config import TrainConfig
from fluvial.wire.tensors import Named


@dataclass(frozen=True)
class _Graph:
    """A forward pass."""

    received: Tensor
    """Hidden states before the layers, (tokens, width)."""
    sent: Tensor
    """Those behind them."""
    dropout_seed: int


class Middle(TunedPart):
    """The server's part between the hidden states that sites send and those they receive."""

    def __init__(
        self, part: Part, tuned: Sequence[str], train: TrainConfig, *, steps: int, start: Named
    ) -> None:
        """See `TunedPart`."""
        super().__init__(part, tuned, train, steps=steps, start=start)
        self._graphs: dict[int, _Graph] = {}
        """Forward passes whose gradient is awaited, by micro-batch."""

    def tokens(self, micro: int) -> int:
        """Return the tokens of a micro-batch whose gradient is awaited: none where neither middle
        nor front are tuned."""
        sent = self._graphs[micro].sent
        return len(sent) if sent.requires_grad else 0

    def forward(
        self,
        rows: Tensor,
        lengths: Sequence[int],
        *,
        micro: int,
        returns: bool,
        dropout_seed: int,
        grouped: bool = False,
    ) -> Tensor:
        """Return hidden states behind the layers of those before them, both (tokens, width).

        `returns` says that the gradient of `rows` will be asked for. With `grouped`, sequences of
        unlike length have passes of their own where that is quicker; else the masks of dropout are
        those of one padded batch, as in the whole model.
        """
        received = rows.to(self.part.device).requires_grad_(returns)
        groups = length_groups(lengths, self.part.device) if grouped else []
        self.part.reseed_dropout(dropout_seed)

        with self.passing():
            if len(groups) > 1:
                sent = pass_groups(self.part, received, lengths, groups, dropout_seed)
            else:
                sent = pass_rows(self.part, received, lengths)

        self._graphs[micro] = _Graph(received, sent, dropout_seed)
        return sent.detach()

    def drop_gradients(self) -> None:
        """Begin a step again, without the passes whose gradient is awaited."""
        super().drop_gradients()
        self._graphs = {}

    def backward(self, gradient: Tensor, *, micro: int) -> tuple[Tensor | None, float]:
        """Add up gradients from that of `forward`'s result for a micro-batch.

        Return the gradient of its `rows`, and the squared norm of what is added up. The first is
        None where `forward` was told that none is needed. Raises `WireError` where the sum is
        not finite.
        """
        graph = self._graphs.pop(micro)
        received, sent = graph.received, graph.sent
        if sent.requires_grad:
            with self.recomputing(graph.dropout_seed):
                sent.backward(gradient.to(sent.device, sent.dtype))  # type: ignore[no-untyped-call]

        norm = self.squared_norm()
        if not math.isfinite(norm):
            raise WireError("the gradients of the server's layers are not finite")

        return received.grad, norm
