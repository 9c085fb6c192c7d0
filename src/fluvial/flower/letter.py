"""Requests on their way over Flower, with the numbers of their messages."""

from dataclasses import dataclass

from fluvial.federation.transport import Request


@dataclass(eq=False)
class Letter:
    """A request on its way over Flower."""

    request: Request
    since_s: float
    """Time at which it was sent, and until then when it was to be."""
    number: str = ""
    """Flower's number of the message that was sent last."""
    seq: int = 0
    """Our number of that message."""
    greeted_again: bool = False
    """True once the site was greeted again because it did not know the run."""
    kept: bool = False
    """True where the site keeps something with its answer."""
