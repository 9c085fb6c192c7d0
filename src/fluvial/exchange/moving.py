"""Error feedback when the adapter that sites receive changes its basis or its ranks.

A residual (E_A, E_B) belongs to the factors (A, B) that its update started from: to first order the
weights lack T = B E_A + E_B A. After a product SVD, or with another rank, the next factors (A', B')
are others, and the residual as it was would add errors in the wrong places. So T is expressed in
the next factors: E_B' = T A'^+ and E_A' = B'^+ (T - T A'^+ A'). That is all of T where A' spans its
rows or B' its columns; the remainder is dropped. Ours.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fluvial.exchange.coding import NOTHING, Coder, State
from fluvial.exchange.feedback import RESIDUAL, Feedback
from fluvial.federation.adapters import factor_names
from fluvial.models.adapters import module_of
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, factor

START = "residual-start"
"""Slot of the adapter that the residual's update started from."""
_SMALL = 1e-2
"""Singular values of a factor below this share of its largest do not carry a residual: dividing by
them would make it large."""


class MovingFeedback(Feedback):
    """Error feedback for updates that start from `received`, in other factors in each round."""

    def __init__(self, inner: Coder, received: Named, *, decay: float) -> None:
        super().__init__(inner, decay=decay)
        self.received = received
        self.slots = (*self.slots, START)

    def encode(
        self, update: Named, state: State = NOTHING, *, seed: int = 0, round: int = 0
    ) -> tuple[bytes, dict[str, Payload]]:
        """Return the frame, and the new residual with the adapter that it belongs to."""
        before = state.get(RESIDUAL, Payload())
        start = state.get(START, Payload())
        if before.tensors and start.tensors:
            moved = project(before.tensors, start.tensors, self.received, self.layout)
            state = {**state, RESIDUAL: Payload(moved, before.values)}

        frame, after = super().encode(update, state, seed=seed, round=round)
        return frame, {**after, START: Payload(_factors(self.received, self.layout.names))}


def project(residual: Named, start: Named, received: Named, layout: Layout) -> Named:
    """Return the `residual` of updates from `start` as one of updates from `received`, of `layout`.

    A factor of a module that had no residual gets zeros. Tensors that are no factors stay.
    """
    projected = {}

    for name, shape in layout.shapes:
        kind = factor(name)
        own = residual.get(name)
        if kind is None:
            projected[name] = torch.zeros(shape) if own is None else own
            continue

        a, b = _pair(name)
        if not start.keys() >= {a, b} or not residual.keys() & {a, b}:
            projected[name] = torch.zeros(shape)
            continue

        left = torch.cat([start[b], _or_zero(residual, b, start)], dim=1).double()
        right = torch.cat([_or_zero(residual, a, start), start[a]], dim=0).double()
        rows = received[a].double()
        onto_rows = right @ _inverse(rows)
        if kind == "B":
            moved = left @ onto_rows
        else:
            columns = _inverse(received[b].double())
            moved = (columns @ left) @ (right - onto_rows @ rows)
        projected[name] = moved.float()

    return projected


def _factors(received: Named, names: Iterable[str]) -> Named:
    """Return both factors of the modules that have one of `names`."""
    wanted = {partner for name in names if factor(name) for partner in _pair(name)}
    return {name: tensor for name, tensor in received.items() if name in wanted}


def _pair(name: str) -> tuple[str, str]:
    """Return the names of A and B of the module of a factor."""
    name_b, name_a = factor_names(module_of(name))
    return name_a, name_b


def _or_zero(residual: Named, name: str, start: Named) -> Tensor:
    """Return a residual, zero for a factor that is not sent."""
    return residual[name] if name in residual else torch.zeros_like(start[name])


def _inverse(factor: Tensor) -> Tensor:
    """Return the pseudoinverse of a factor, without directions in which it is small."""
    inverse: Tensor = torch.linalg.pinv(factor, rtol=_SMALL)
    return inverse
