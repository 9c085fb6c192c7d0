"""Rates of a site's link, by the messages that it receives and sends."""

from dataclasses import dataclass

LEAST_DOWN_S = 2.0
"""Seconds of a message to the site from which its transfer is a measure of the link. It is noticed
within 0.2 s, so that the rate is within a tenth."""
LEAST_UP_S = 6.0
"""The same of an answer, which waits for up to 0.5 s before it is sent."""


@dataclass
class Transfers:
    """The rates of the last transfers that were long beside what they are timed with."""

    down_bytes_s: float | None = None
    """Bytes a second from the server to the site; None where no message took long enough."""
    up_bytes_s: float | None = None
    """Bytes a second from the site to the server; None where no answer took long enough."""

    def received(self, size: int, seconds: float) -> None:
        """Take note of a message of `size` bytes that came in `seconds`."""
        if seconds >= LEAST_DOWN_S:
            self.down_bytes_s = size / seconds

    def sent(self, size: int, seconds: float) -> None:
        """Take note of an answer of `size` bytes that left in `seconds`."""
        if seconds >= LEAST_UP_S:
            self.up_bytes_s = size / seconds
