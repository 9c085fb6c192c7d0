"""A part of the model in one round of training: its passes, its gradients and its optimizer."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from fluvial.models.split import Part
from fluvial.training.config import TrainConfig
from fluvial.training.stepper import Stepper
from fluvial.wire.tensors import Named


class TunedPart:
    """A borrowed part, some of whose tensors are trained; gradients add up until a step."""

    def __init__(
        self, part: Part, tuned: Sequence[str], train: TrainConfig, *, steps: int, start: Named
    ) -> None:
        """Train the tensors `tuned` of `part` for `steps` steps; their values are `start`."""
        self.part = part
        self._train = train
        trained = {name: part.tuned()[name] for name in tuned}
        for name, parameter in part.tuned().items():
            parameter.requires_grad_(name in trained)

        self._trained = trained
        self._stepper = Stepper(trained, train, steps=steps, start=start)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Run a pass in training: with dropout, and under autocast where it is configured."""
        kind = self.part.device.type
        self.part.switch_dropout(active=True)

        try:
            with torch.autocast(kind, torch.bfloat16) if self._train.bf16 else nullcontext():
                yield
        finally:
            self.part.switch_dropout(active=False)

    @contextmanager
    def recomputing(self, dropout_seed: int) -> Iterator[None]:
        """Run a backward pass, in which layers may be recomputed with the dropout of their own
        forward pass: others may have come in between."""
        self.part.reseed_dropout(dropout_seed)
        self.part.switch_dropout(active=True)

        try:
            yield
        finally:
            self.part.switch_dropout(active=False)

    def squared_norm(self) -> float:
        """Return the sum of squares of the gradients."""
        gradients = [each.grad for each in self._trained.values() if each.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) ** 2 if gradients else 0.0

    def gradients(self) -> Named:
        """Return the gradients by name, fp32, on the CPU; zeros where there are none."""
        return {
            name: torch.zeros(parameter.shape)
            if parameter.grad is None
            else parameter.grad.detach().to("cpu", torch.float32)
            for name, parameter in self._trained.items()
        }

    def replace_gradients(self, gradients: Named) -> None:
        """Take `gradients` in the place of the own ones."""
        for name, parameter in self._trained.items():
            parameter.grad = gradients[name].to(parameter.device, parameter.dtype, copy=True)

    def drop_gradients(self) -> None:
        """Begin a step again."""
        for parameter in self._trained.values():
            parameter.grad = None

    def step(self, number: int, factor: float) -> None:
        """Make step `number`, counted from 0, with the gradients times `factor`."""
        for parameter in self._trained.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

        self._stepper.step(number)

    def replace(self, weights: Named) -> None:
        """Go on from `weights`, fp32; the optimizer keeps its moments."""
        self._stepper.replace(weights)

    def restore(self, state: Named, steps: int) -> None:
        """Go on from the `Stepper.state` of a stepper that has made `steps` steps."""
        self._stepper.restore(state, steps)

    def plan_steps(self, steps: int) -> None:
        """Let learning rates decay over another number of steps."""
        self._stepper.steps = steps

    def weights(self) -> Named:
        """Return the trained tensors by name, fp32, on the CPU."""
        return self._stepper.weights()


def factor_of(squared_norm: float, max_norm: float) -> float:
    """Return the factor that clips gradients of this squared norm, as `clip_grad_norm_` has it."""
    return min(1.0, max_norm / (math.sqrt(squared_norm) + 1e-6)) if max_norm else 1.0
