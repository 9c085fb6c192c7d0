"""Codecs with explicit state, and the wrappers that chain them.

A `Coder` is a codec as one end of a link uses it. A codec has no memory; a wrapper around it may
have some (a residual, a reference), which it takes and returns as a value and never keeps. So what
an end must remember can be stored, dropped or restored by whoever owns it, and the same state and
update always give the same frame.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

from fluvial.codecs.base import Codec
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named

State = Mapping[str, Payload]
"""Payloads by the name of the wrapper's slot."""
NOTHING: State = MappingProxyType({})


class Coder(ABC):
    """Codes updates of one layout into frames and back, with explicit state."""

    layout: Layout
    slots: tuple[str, ...] = ()
    """Names of the state that `encode` reads and returns."""

    @abstractmethod
    def encode(
        self, update: Named, state: State = NOTHING, *, seed: int = 0, round: int = 0
    ) -> tuple[bytes, dict[str, Payload]]:
        """Return the frame for `update`, and the state after it (the slots that changed).

        The same update, state, seed and round give the same frame.
        """

    @abstractmethod
    def decode(self, frame: bytes, state: State = NOTHING, *, round: int | None = None) -> Named:
        """Return what `frame` carries, fp32; raise `WireError` for what `encode` did not make.

        With `round`, a frame of another round is refused.
        """


class Plain(Coder):
    """A codec as it is: without state."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.layout = codec.layout

    def encode(
        self,
        update: Named,
        state: State = NOTHING,  # noqa: ARG002 - it has none
        *,
        seed: int = 0,
        round: int = 0,
    ) -> tuple[bytes, dict[str, Payload]]:
        """See `Coder`."""
        return self.frame(update, seed=seed, round=round), {}

    def frame(self, update: Named, *, seed: int, round: int) -> bytes:
        """Return the codec's frame for `update`."""
        return self.codec.encode(update, seed=seed, round=round)

    def decode(
        self,
        frame: bytes,
        state: State = NOTHING,  # noqa: ARG002 - it has none
        *,
        round: int | None = None,
    ) -> Named:
        """See `Coder`."""
        return self.codec.decode(frame, round=round)


class Wrapper(Coder):
    """A coder around another; what a wrapper does not change goes through."""

    def __init__(self, inner: Coder) -> None:
        self.inner = inner
        self.layout = inner.layout
        self.slots = inner.slots

    def encode(
        self, update: Named, state: State = NOTHING, *, seed: int = 0, round: int = 0
    ) -> tuple[bytes, dict[str, Payload]]:
        """See `Coder`."""
        return self.inner.encode(update, state, seed=seed, round=round)

    def decode(self, frame: bytes, state: State = NOTHING, *, round: int | None = None) -> Named:
        """See `Coder`."""
        return self.inner.decode(frame, state, round=round)
