"""Rates of a site's link, by the messages that it receives and sends."""

from collections import deque
from dataclasses import dataclass, field

LEAST_BYTES = 2**16
"""Bytes of a message from which its transfer is more than the waiting for it."""
LEAST_DOWN_S = 2.0
"""Seconds of a message to the site from which its transfer is a measure of the link. It is noticed
within 0.2 s, so that the rate is within a tenth."""
LEAST_UP_S = 6.0
"""The same of an answer, which waits for up to 0.5 s before it is sent."""


def _two() -> deque[tuple[int, float]]:
    return deque(maxlen=2)


@dataclass
class Transfers:
    """The rates of a site's link by its last two large messages each way, of which the faster one
    counts, so that one that a busy machine holds up does not."""

    _down: deque[tuple[int, float]] = field(default_factory=_two)
    _up: deque[tuple[int, float]] = field(default_factory=_two)

    @property
    def down_bytes_s(self) -> float | None:
        """Return bytes a second from the server to the site; None where messages were too short."""
        return _rate(self._down, LEAST_DOWN_S)

    @property
    def up_bytes_s(self) -> float | None:
        """Return bytes a second from the site to the server; None where answers were too short."""
        return _rate(self._up, LEAST_UP_S)

    def received(self, size: int, seconds: float) -> None:
        """Take note of a message of `size` bytes that came in `seconds`."""
        if size >= LEAST_BYTES:
            self._down.append((size, seconds))

    def sent(self, size: int, seconds: float) -> None:
        """Take note of an answer of `size` bytes that left in `seconds`."""
        if size >= LEAST_BYTES:
            self._up.append((size, seconds))


def _rate(messages: deque[tuple[int, float]], least_s: float) -> float | None:
    if len(messages) < 2 or any(seconds < least_s for _, seconds in messages):
        return None
    return max(size / seconds for size, seconds in messages)
