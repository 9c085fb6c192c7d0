"""Snapshots after coding and decoding, on which gate and probe measure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fluvial.codecs.base import Codec, Snapshot
from fluvial.exchange.coding import NOTHING, Coder, State
from fluvial.exchange.feedback import RESIDUAL, Feedback
from fluvial.exchange.representation import Representation, coded_object, innovation
from fluvial.exchange.weighting import weighted
from fluvial.wire.tensors import Named, cosine, norm, subtract

PASSES = 6
"""Times that an update is coded with error feedback; the later half of them counts (ours: on the
quick start the error of klt_trellis rises for four passes, from 0.25 to 0.5)."""


@dataclass(frozen=True)
class Recoded:
    """Held-out snapshots, and what a receiver of their frames would have of each."""

    updates: list[Named]
    """True innovations: differences to the received adapter."""
    coded: list[Named]
    """Objects that the codec was given: innovations or states."""
    frames: list[bytes]
    decoded: list[Named]
    """`coded` as it comes out of the frames."""
    guesses: list[Named]
    """Innovations that follow from `decoded`."""
    shuffled: list[Named]
    """Innovations when each snapshot is guessed from the frame before its own, which is another
    site's of the same round where there is one."""

    @classmethod
    def of(
        cls, codec: Codec, heldout: Sequence[Snapshot], representation: Representation
    ) -> "Recoded":
        """Code and decode `heldout`, which must not be empty."""
        assert heldout, "no held-out snapshots"
        coded = []
        frames = []
        decoded = []

        for number, snapshot in enumerate(heldout):
            coded.append(coded_object(snapshot.received, snapshot.update, representation))
            coder = weighted(codec, snapshot.received)
            frame, _ = coder.encode(coded[-1], seed=number)
            frames.append(frame)
            decoded.append(coder.decode(frame))

        def innovations(values: Sequence[Named]) -> list[Named]:
            return [
                innovation(snapshot.received, value, representation)
                for snapshot, value in zip(heldout, values, strict=True)
            ]

        return cls(
            [snapshot.update for snapshot in heldout],
            coded,
            frames,
            decoded,
            innovations(decoded),
            innovations([decoded[-1], *decoded[:-1]]),
        )

    @property
    def lost(self) -> list[Named]:
        """Errors of the guesses."""
        return [subtract(x, y) for x, y in zip(self.updates, self.guesses, strict=True)]

    @property
    def cosines(self) -> list[float]:
        """Cosines between updates and guesses."""
        return [cosine(x, y) for x, y in zip(self.updates, self.guesses, strict=True)]

    @property
    def contraction(self) -> float:
        """Largest ratio of the norm of an error to that of its update."""
        return max(
            norm(error) / max(norm(update), 1e-30)
            for error, update in zip(self.lost, self.updates, strict=True)
        )


def feedback_error(
    codec: Codec, heldout: Sequence[Snapshot], representation: Representation
) -> float:
    """Return the mean relative squared error after some rounds of error feedback.

    What a round did not carry is added to the next update, which makes it unlike the updates that a
    learned codec was fitted to. Each update of `heldout` is coded `PASSES` times in a row, as if
    the same one came in every round.
    """
    errors = []

    for snapshot in heldout:
        update = coded_object(snapshot.received, snapshot.update, representation)
        coder: Coder = Feedback(
            weighted(codec, snapshot.received), decay=codec.settings.feedback_decay
        )
        state: State = NOTHING

        for number in range(PASSES):
            _, state = coder.encode(update, state, seed=number, round=number)
            if number >= PASSES // 2:
                errors.append(state[RESIDUAL].value("error", float))

    return math.fsum(errors) / len(errors)
