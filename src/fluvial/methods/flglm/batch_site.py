"""A site in a client batch as the server sees it: its turns, decoded, and its conversation."""

from dataclasses import dataclass, field

from torch import Tensor

from fluvial.methods.flglm.hidden import HiddenStates
from fluvial.methods.flglm.order import Order
from fluvial.methods.flglm.turns import Backward, Forward, Meeting
from fluvial.wire.tensors import Named


@dataclass(frozen=True)
class Answered:
    """A site's reply at the end of a round."""

    site: str
    weight: int
    loss: float


@dataclass(frozen=True)
class Heard:
    """A site's turn, decoded."""

    turn: Forward | Backward | Meeting
    rows: Tensor | None = None
    """Hidden states, or their gradient."""
    gradients: Named = field(default_factory=dict)
    """Gradients of the layers that the sites share."""
    stale: bool = False
    """True for a turn that was on its way when its site was let rejoin."""


@dataclass(eq=False)
class Visit:
    """A conversation with a site, from where it began last."""

    order: Order
    taken: int = 0
    """Steps in which the site took part."""
    forwards: dict[int, Forward] = field(default_factory=dict)
    """Forward turns of its last step, by micro-batch."""
    own_hidden: HiddenStates | None = None

    @property
    def hidden(self) -> HiddenStates:
        """The site's hidden states."""
        assert self.own_hidden is not None, "the order of turns refuses another before the first"
        return self.own_hidden
