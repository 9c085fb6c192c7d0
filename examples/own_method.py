"""A method of one's own: FedAvg with momentum at the server.

    python -m examples.own_method

Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019, https://arxiv.org/abs/1909.06335 (FedAvgM). The sites do what the sites of
FedAvg do, and the server moves by v <- momentum * v + mean update. docs/adding-a-method.md builds
the same method from nothing, as a part of the package.
"""

import tempfile
from dataclasses import replace
from typing import Literal

from pydantic import Field

import fluvial
from fluvial.methods import Metrics
from fluvial.methods.fedavg import METHOD, FedAvgConfig, FedAvgServer
from fluvial.wire.payload import join, split
from fluvial.wire.tensors import Named, add, moved, scale, subtract


class MomentumConfig(FedAvgConfig):
    """FedAvg with momentum at the server."""

    name: Literal["momentum"] = "momentum"  # type: ignore[assignment] # another method's table
    momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the last step that the next step keeps; 0 is FedAvg."""


class MomentumServer(FedAvgServer):
    """The server half of FedAvg, whose step has momentum."""

    def __init__(self, config: MomentumConfig, context: fluvial.Context) -> None:
        super().__init__(config, context)
        self.momentum = config.momentum
        self.velocity: Named = scale(self.adapter, 0.0)

    def round(self, number: int, fleet: fluvial.Fleet) -> Metrics:
        """Run a round of FedAvg and replace its step."""
        before = self.adapter
        metrics = super().round(number, fleet)
        self.velocity = add(scale(self.velocity, self.momentum), subtract(self.adapter, before))
        self.adapter = moved(before, self.velocity)

        return metrics

    def state(self) -> fluvial.Payload:
        """Return the state of FedAvg and the velocity."""
        return join({"fedavg": super().state(), "velocity": fluvial.Payload(self.velocity)})

    def restore(self, state: fluvial.Payload) -> None:
        """Become the server whose `state` this was."""
        parts = split(state, ("fedavg", "velocity"))
        super().restore(parts["fedavg"])
        self.context.layout.check(parts["velocity"].tensors, "checkpoint")
        self.velocity = parts["velocity"].tensors


TRAITS = replace(METHOD.traits, label="FedAvg with momentum")
MOMENTUM = replace(METHOD, config=MomentumConfig, server=MomentumServer, traits=TRAITS)

if __name__ == "__main__":
    table = {"rounds": 2, "method": {"name": "momentum", "momentum": 0.5}}
    with tempfile.TemporaryDirectory() as folder:
        print(fluvial.run(table, folder, methods=[MOMENTUM]))
