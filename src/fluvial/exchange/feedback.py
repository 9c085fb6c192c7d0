"""Error feedback: what a frame lost is added to the next update."""

import torch

from fluvial.exchange.coding import NOTHING, Coder, State, Wrapper
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, add, energy, scale, subtract

RESIDUAL = "residual"
"""Slot of the residual; its values are the `round` of its making and the codec's `error`."""

MOST_ERROR = 1e4
"""Relative squared error that a site can report; an unbiased codec at a low rate exceeds 1."""


def share_lost(lost: Named, coded: Named) -> float:
    """Return the relative squared error that a site reports: ||lost||^2 / ||coded||^2."""
    return energy(lost) / max(energy(coded), 1e-30)


class Feedback(Wrapper):
    """A coder that sends Q(u), u = update + decay^missed * residual, and keeps u - Q(u).

    After Seide et al. (Interspeech 2014) and Karimireddy et al. (ICML 2019). `missed` counts the
    rounds since the residual was made in which this end did not send (ours: with decay 1 an old
    residual counts fully).
    """

    def __init__(self, inner: Coder, *, decay: float) -> None:
        super().__init__(inner)
        self.decay = decay
        self.slots = (*inner.slots, RESIDUAL)

    def encode(
        self, update: Named, state: State = NOTHING, *, seed: int = 0, round: int = 0
    ) -> tuple[bytes, dict[str, Payload]]:
        """Return the frame, and the new residual with the codec's relative squared error.

        Raises `WireError` for a residual of another layout.
        """
        before = state.get(RESIDUAL, Payload())
        if before.tensors:
            self.layout.check(before.tensors, RESIDUAL)
            missed = max(0, round - before.value("round", int) - 1)
            update = add(update, scale(before.tensors, self.decay**missed))

        frame, after = self.inner.encode(update, state, seed=seed, round=round)
        residual = subtract(update, self.inner.decode(frame, state))
        error = share_lost(residual, update)

        return frame, {**after, RESIDUAL: Payload(residual, {"round": round, "error": error})}


class ResizedFeedback(Feedback):
    """Error feedback for factors whose ranks may change between rounds, component by component.

    A component that the new rank has too keeps its residual, a further one begins with none.
    """

    def encode(
        self, update: Named, state: State = NOTHING, *, seed: int = 0, round: int = 0
    ) -> tuple[bytes, dict[str, Payload]]:
        """See `Feedback`; a residual of another layout is brought into that of `update`."""
        before = state.get(RESIDUAL, Payload())
        if before.tensors:
            tensors = resized(before.tensors, self.layout)
            state = {**state, RESIDUAL: Payload(tensors, before.values)}

        return super().encode(update, state, seed=seed, round=round)


def resized(tensors: Named, layout: Layout) -> Named:
    """Return tensors in the shapes of `layout`: what both have, zeros for the rest."""
    result = {}
    for name, shape in layout.shapes:
        result[name] = torch.zeros(shape)
        if name in tensors:
            old = tensors[name]
            common = tuple(slice(min(a, b)) for a, b in zip(old.shape, shape, strict=True))
            result[name][common] = old[common]

    return result
