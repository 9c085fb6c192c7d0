"""Terms of an exchange: what server and sites agree on before the first message."""

from dataclasses import dataclass
from typing import Literal

from fluvial.codecs import CodecSettings, must_learn
from fluvial.exchange.representation import Representation
from fluvial.exchange.tgap import NO_TGAP, TgapConfig
from fluvial.federation.sites import Factors, Sent, factor_layout
from fluvial.wire.tensors import Layout

Basis = Literal["fixed", "resized", "moving"]
"""Factors that sites receive: those that they have trained; the same in ranks that may change; or
others of the same product."""


@dataclass(frozen=True)
class Terms:
    """A method makes its terms from its config; both ends make the same."""

    tgap: TgapConfig = NO_TGAP
    """Pre-training of a codec that learns; without effect for the others."""
    factors: Sent = "A and B"
    """Factors that are sent."""
    representation: Representation = "delta"
    """Form of what is coded: the update, or the whole adapter."""
    basis: Basis = "fixed"
    """Factors of the adapter that sites receive, in which error feedback expresses its residual."""

    def sent(self, layout: Layout) -> Layout:
        """Return the layout of what a site sends, for an adapter of `layout`."""
        return factor_layout(layout, self.factors)

    @property
    def trained(self) -> Factors:
        """The factors that are trained at TGAP, which sends all of them."""
        assert self.factors in ("A and B", "B"), "no other method has a TGAP"
        return "B" if self.factors == "B" else "A and B"

    def pretraining(self, codec: CodecSettings) -> TgapConfig:
        """Return the pre-training as it happens with `codec`: none for one that learns nothing."""
        return self.tgap if must_learn(codec) else NO_TGAP
