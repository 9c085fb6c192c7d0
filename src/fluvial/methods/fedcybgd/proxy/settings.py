"""Settings of a proxy: how much of the layers that a site does not train is sent."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fluvial.settings import Settings

Prune = Literal["neurons", "neurons and heads"]
Correction = Literal["none", "least-squares"]

TOLERANCE = 0.01
"""Share of the requested parameters by which a proxy may miss them."""


class ProxySettings(Settings):
    """Settings of the share that a site gets of the layers that it does not train. The defaults are
    ours; the paper's are not known."""

    kept: float = Field(0.5, gt=0, le=1)
    """Share of the other decoder layers' parameters that is sent (rho); met within 1 %."""
    drop: float = Field(0.25, ge=0, lt=1)
    """Share of the other decoder layers that is dropped, rounded down to whole layers; pruning does
    the rest."""
    prune: Prune = "neurons"
    """Units that are pruned in the layers that stay. Heads are pruned by about the same share as
    neurons."""
    multiple: int = Field(64, ge=1, le=10**6)
    """Divisor of the number of neurons that stay in a pruned layer; it is halved, and halved again,
    where `kept` cannot be met otherwise."""
    correction: Correction = "none"
    """Change of the output weights of an MLP's neurons that stay: none, or the least-squares one
    (ours), with which they stand in for the neurons that are not sent. It costs no byte; the server
    keeps a matrix of neurons by neurons for every layer."""
    randomised: bool = False
    """Random choice of the dropped layers in every visit. What a layer that stays adds to the
    stream is divided by its chance to stay, so that the expectation is what the whole model
    adds."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.kept > 1 - self.drop + 1e-9:
            yield (
                f"kept={self.kept}: with drop={self.drop} a share of {1 - self.drop:.4g} is left "
                "at most; choose kept "
                f"at most {1 - self.drop:.4g}, or drop at most {1 - self.kept:.4g}"
            )

        for name in ("prune", "multiple", "correction"):
            if self.kept == 1 and self.differs(name):
                yield f"{name}: without effect under kept=1; remove it"

        if self.randomised and self.drop == 0:
            yield "randomised: without effect under drop=0; remove it"
