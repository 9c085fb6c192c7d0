"""Coding of states: the difference to a reference that both ends hold.

The sender adds what it coded to its reference, as the receiver does: what one frame loses is in the
next difference, so errors do not add up. This is error feedback at the sender (EF21-P of
Gruntkowska et al., ICML 2023).
"""

from fluvial.exchange.coding import NOTHING, Coder, State, Wrapper
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named, add, subtract

REFERENCE = "reference"
"""Slot of the state that the receiver has decoded so far."""


class Difference(Wrapper):
    """A coder of states, around a coder of updates."""

    def __init__(self, inner: Coder) -> None:
        super().__init__(inner)
        self.slots = (*inner.slots, REFERENCE)

    def encode(
        self, update: Named, state: State = NOTHING, *, seed: int = 0, round: int = 0
    ) -> tuple[bytes, dict[str, Payload]]:
        """Return the frame that leads from the reference towards `update`, here a whole state.

        The new reference is what the receiver holds after it has decoded the frame.
        """
        reference = self._reference(state)
        change = subtract(update, reference)
        frame, after = self.inner.encode(change, state, seed=seed, round=round)
        moved = add(reference, self.inner.decode(frame, state))

        return frame, {**after, REFERENCE: Payload(moved)}

    def decode(self, frame: bytes, state: State = NOTHING, *, round: int | None = None) -> Named:
        """Return the state after `frame`, which is the receiver's next reference."""
        return add(self._reference(state), self.inner.decode(frame, state, round=round))

    def _reference(self, state: State) -> Named:
        reference = state[REFERENCE].tensors
        self.layout.check(reference, REFERENCE)
        return reference
