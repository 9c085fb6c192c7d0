"""Rules of an exchange: further values of replies, bounds, and what sites hold before a message."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fluvial.federation.fleet import Fleet
from fluvial.training.config import TrainConfig
from fluvial.wire.payload import Payload, Value
from fluvial.wire.tensors import Named

COMPONENTS = "k"
"""Name of the reply value that counts the components in each module that a site trains, in order of
the names; a reply without it has the whole update."""


@dataclass(frozen=True)
class Further:
    """Values of a reply beside sample count, loss and frame, which a method sends and reads."""

    names: tuple[str, ...]
    """Names of the values; a reply has all of them."""
    read: Callable[[str, Payload], Mapping[str, Any]]
    """Returns them, checked, from the name of a site and its reply; what it raises is that site's
    failure."""


NO_FURTHER = Further((), lambda _site, _reply: {})


@dataclass(frozen=True)
class Rule:
    """Checks by which a reply becomes an update, beside its decoding; the defaults suit most
    methods."""

    frame_only: bool = False
    """True where the sites add noise and send a frame and nothing else; each counts with 1."""
    clip: Callable[[Named], Named] | None = None
    """Applied to each decoded update, for a bound that its site cannot exceed."""
    bounded: bool = True
    """True where an update that no training of a site can make is refused; noise is longer."""
    compared: bool = True
    """True where a site fails by an update much longer than the others' of its round. Under
    differential privacy of the aggregate, such a failure would tell of the others."""
    components: bool = False
    """True where a reply may have the largest components of the change instead of the update."""
    further: Further = NO_FURTHER
    """Further values of a reply."""
    training: Callable[[str], TrainConfig] | None = None
    """Returns the training of a site by its name, which bounds its update; None for the run's."""


EVERY_REPLY = Rule()
"""The rule of replies that carry an update, a sample count and a loss."""


class Handout(Protocol):
    """Something that sites must hold before they can use a message, such as a plan of their own.

    A site that lacks it when its message comes answers `STALE`.
    """

    def ready(self, fleet: Fleet, round: int, sites: Sequence[str]) -> list[str]:
        """Send it to those of `sites` that lack it; return those that hold it then."""
        ...

    def values(self, site: str) -> Mapping[str, Value]:
        """Return the values by which a site's message names what the site must hold."""
        ...

    def forget(self, sites: Sequence[str]) -> None:
        """Note that these sites must be sent it again."""
        ...
