"""Error feedback: what a frame lost is added to the next update."""

from fluvial.exchange.coding import NOTHING, Coder, State, Wrapper
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named, add, energy, scale, subtract

RESIDUAL = "residual"
"""Slot of the residual; its values are the `round` of its making and the codec's `error`."""


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
        error = energy(residual) / max(energy(update), 1e-30)

        return frame, {**after, RESIDUAL: Payload(residual, {"round": round, "error": error})}
