"""Attack: read the labels from the gradient dL/dh_B that a site returns to the server.

The server has the public part C, and the hidden states h_B that it sent. The gradient is linear in
what it does not know, the labels y:

    dL/dh_B = w * sum_t J_t^T (softmax(z_t) - onehot(y_t)),    J_t = dz_t / dh_B,

and logits z_t depend on positions up to t only. So labels are read from right to left: at the last
position all |V| candidates, and "no label", are compared with what the labels already read leave of
the gradient. Exact while C is the public one, and untouched by noise on what A sends: in language
modelling the labels are the text.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fluvial.data import IGNORE_INDEX
from fluvial.methods.flglm.leakage.reached import tensor_at
from fluvial.models.split import Part


class PublicBack:
    """Part C from the public base: hidden states to the head's input, and that to logits."""

    def __init__(self, part: Part) -> None:
        self._part = part
        head: Any = part.model.get_output_embeddings()  # type: ignore[operator]
        self._head: nn.Module = head
        self.weight: Tensor = head.weight.detach()
        """Rows (vocabulary, features) of the head."""

    def features(self, hidden: Tensor) -> Tensor:
        """Return the head's input (batch, tokens, features) for h_B (batch, tokens, width)."""
        mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return tensor_at(self._head, "input", lambda: self._part.logits(hidden, mask))

    def errors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return softmax(z), and dz/dx of the head's output x, both (tokens, vocabulary), fp64.

        `hidden` is (1, tokens, width). The second is 1 but where logits are scaled or capped.
        """
        outputs: list[Tensor] = []
        hook = self._head.register_forward_hook(lambda *results: outputs.append(results[-1]))

        try:
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            logits = self._part.logits(hidden.detach().requires_grad_(), mask)
        finally:
            hook.remove()

        (slopes,) = torch.autograd.grad(logits.sum(), outputs[0])
        return logits[0].detach().double().softmax(-1), slopes[0].double()


class GradientMatching:
    """The attack with one public part C."""

    def __init__(self, back: PublicBack, *, weight: float | None = None, batch: int = 128) -> None:
        """Take the `weight` w of a label in the loss; None where the server is to find it out.

        `batch` is the number of rows of a Jacobian that one pass computes.
        """
        self._back = back
        self._weight = weight
        self._batch = batch

    def __call__(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Return labels (tokens,), `IGNORE_INDEX` where there is none.

        `hidden` is h_B, and `gradient` is dL/dh_B, both (tokens, width). The label at a position is
        the token after it.
        """
        states = hidden.detach()[None]
        rest = gradient.detach().double()
        probabilities, slopes = self._back.errors(states)
        rows = self._back.weight.double()
        labels = torch.full((len(hidden),), IGNORE_INDEX)
        weight = self._weight

        for position in reversed(range(len(hidden))):
            jacobian = self._jacobian(states[:, : position + 1])
            slope = slopes[position]
            expected = (probabilities[position] * slope) @ rows
            candidates = (expected - slope[:, None] * rows) @ jacobian
            found = rest[position]

            if weight is None:
                if not found.any():
                    continue
                weight = _scale(found, candidates)

            costs = (found - weight * candidates).square().sum(-1)
            label = int(costs.argmin())
            if float(costs[label]) >= float(found.square().sum()):
                continue

            labels[position] = label
            pull = weight * (expected - slope[label] * rows[label])
            rest[: position + 1] -= self._pulled(states[:, : position + 1], pull)

        return labels

    def _jacobian(self, states: Tensor) -> Tensor:
        """Return d(head's input at the last position) / d(its h_B), (features, width), fp64."""
        size = self._back.weight.shape[1]
        parts = []

        for basis in torch.split(torch.eye(size, dtype=states.dtype), self._batch):
            copies = states.expand(len(basis), -1, -1).clone().requires_grad_()
            last = self._back.features(copies)[:, -1]
            (gradients,) = torch.autograd.grad(last, copies, basis.to(last))
            parts.append(gradients[:, -1].double())

        return torch.cat(parts)

    def _pulled(self, states: Tensor, pull: Tensor) -> Tensor:
        """Return the gradient (tokens, width) for a gradient at the last head input, fp64."""
        inputs = states.clone().requires_grad_()
        last = self._back.features(inputs)[0, -1]
        (gradients,) = torch.autograd.grad(last, inputs, pull.to(last))
        return gradients[0].double()


def _scale(found: Tensor, candidates: Tensor) -> float:
    """Return w for the candidate (of all, (vocabulary, width)) whose direction fits best."""
    products = candidates @ found
    squares = candidates.square().sum(-1)
    best = int((products / squares.clamp(min=1e-300).sqrt()).argmax())
    return float(products[best] / squares[best])


def text_of_labels(labels: Tensor) -> Tensor:
    """Return the tokens (tokens,) that `labels` (tokens,) show: each stands one position later.

    -1 stands where nothing was read.
    """
    text = torch.full_like(labels, -1)
    text[1:] = labels[:-1]
    return text.masked_fill(text == IGNORE_INDEX, -1)
