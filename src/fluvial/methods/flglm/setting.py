"""The facts of one run that the server half of FL-GLM works with."""

from dataclasses import dataclass
from functools import cached_property

from fluvial.codecs.quantise import Identity
from fluvial.federation.context import Context
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.places import Places
from fluvial.methods.flglm.turns import TurnLimits
from fluvial.models.parts import PartPool
from fluvial.training.config import TrainConfig
from fluvial.wire.tensors import Layout, Named


@dataclass(frozen=True)
class Setting:
    """A run, as the server half sees it; the model's parts are loaded when they are first used."""

    config: FlGlmConfig
    context: Context

    @cached_property
    def places(self) -> Places:
        """The layouts of the parts."""
        pool = self.context.open_pool()
        return Places.of(self.config, pool.outline.base, self.context.layout)

    @property
    def shared(self) -> Layout:
        """The layout of the sites' tuned layers where all sites share them; else it is empty."""
        return self.places.shared

    @cached_property
    def shared_codec(self) -> Identity:
        """The code of updates of the sites' layers."""
        return Identity.of(self.shared)

    @cached_property
    def parts(self) -> PartPool:
        """The pool of the server's layers."""
        return self.context.open_pool().parts(self.places.cut, server=True)

    @property
    def train(self) -> TrainConfig:
        """The settings of training."""
        return self.context.train

    def train_in(self, round: int) -> TrainConfig:
        """Return the settings of training in one round, with the learning rate that it has."""
        return self.train.in_round(round, self.context.rounds)

    @cached_property
    def longest(self) -> int | None:
        """Tokens that the model reads at most; None without a limit."""
        return self.context.open_pool().outline.context

    @cached_property
    def limits(self) -> TurnLimits:
        """Bounds on the numbers in a site's turns."""
        return TurnLimits.of(self.train, self.longest, names_samples=self.config.remembers)

    def weights(self, state: Named) -> Named:
        """Return the values that the parameters named in `state` have, fp32."""
        return self.context.open_pool().weights(state)
