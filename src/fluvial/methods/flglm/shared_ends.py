"""The layers that the sites share in a client batch, at the server."""

from torch import nn

from fluvial.codecs.quantise import Identity
from fluvial.methods.flglm.setting import Setting
from fluvial.training.stepper import Stepper, stepper_layout
from fluvial.wire.tensors import Named


class SharedEnds:
    """The layers that the sites share: the server makes the steps that the sites make."""

    def __init__(self, setting: Setting, state: Named, *, round: int) -> None:
        """Begin `round` with their values in `state`, that of the whole model."""
        self.start = {name: state[name] for name in setting.shared.names}
        self._parameters = {
            name: nn.Parameter(tensor.clone()) for name, tensor in self.start.items()
        }
        self._codec = Identity.of(stepper_layout(setting.shared, setting.train))
        self._stepper = Stepper(self._parameters, setting.train_in(round), steps=1)

    def step(self, number: int, gradients: Named, factor: float) -> None:
        """Make step `number` with the sites' summed gradients."""
        for name, parameter in self._parameters.items():
            parameter.grad = gradients[name] * factor
        self._stepper.step(number)

    def plan_steps(self, steps: int) -> None:
        """Let learning rates decay over another number of steps."""
        self._stepper.steps = steps

    def weights(self) -> Named:
        """Return the present values."""
        return self._stepper.weights()

    def frame(self) -> bytes | None:
        """Return weights and moments after at least one step, for a site that rejoins; None where
        sites share nothing."""
        return self._codec.encode(self._stepper.state()) if self._parameters else None
