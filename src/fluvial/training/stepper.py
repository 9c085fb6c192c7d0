"""The optimizer of one round, with its learning rates and fp32 masters."""

import math

import torch
from torch import Tensor, nn

from fluvial.training.config import TrainConfig
from fluvial.wire.tensors import Layout, Named


def learning_rate_share(step: int, steps: int, config: TrainConfig) -> float:
    """Return the share of the peak learning rate at `step` (0-based) of `steps`.

    It rises in the warm-up, then decays by the formulas of transformers' `get_scheduler`, whose
    first step of a warm-up has none.
    """
    warmup = config.warmup(steps)
    kind = config.lr_scheduler_type
    if step < warmup:
        return (step + 1) / warmup
    if kind in ("constant", "constant_with_warmup"):
        return 1.0
    if kind == "inverse_sqrt":
        scale = warmup or INVERSE_SQRT_STEPS
        return 1.0 / math.sqrt((step - warmup + scale) / scale)

    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 1.0 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))


INVERSE_SQRT_STEPS = 10_000
"""Time scale of "inverse_sqrt" without a warm-up, as in transformers."""
AT_ONCE = 2**24
"""Parameters below which AdamW updates all tensors at once, with 4 more bytes for each."""


class Stepper:
    """The optimizer of one round for some parameters of a model, with its learning rates.

    Parameters in half precision are tuned by way of fp32 masters that last for all steps, because a
    step is smaller than what half precision resolves (Micikevicius et al., ICLR 2018,
    https://arxiv.org/abs/1710.03740).
    """

    def __init__(
        self,
        trained: dict[str, nn.Parameter],
        config: TrainConfig,
        *,
        steps: int,
        start: Named | None = None,
    ) -> None:
        """Begin `steps` steps; masters begin at `start`, by name, or else at the parameters."""
        self.steps = steps
        self._trained = trained
        self._config = config
        self._masters = _masters(trained, start or {})
        self._optimizer = _optimizer(list(self._masters.values()), config) if trained else None

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Make step `number`, counted from 0, with the parameters' gradients, and drop these."""
        if self._optimizer is None:
            return

        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * learning_rate_share(
                number, self.steps, self._config
            )

        copies = [
            (parameter, self._masters[name])
            for name, parameter in self._trained.items()
            if self._masters[name] is not parameter
        ]
        for parameter, master in copies:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for parameter, master in copies:
            parameter.copy_(master)

    @torch.no_grad()
    def replace(self, weights: Named) -> None:
        """Go on from `weights`, fp32, by name; the optimizer keeps its moments."""
        for name, parameter in self._trained.items():
            self._masters[name].copy_(weights[name])
            parameter.copy_(self._masters[name])

    def state(self) -> Named:
        """Return weights and moments after at least one step, in the `stepper_layout`, fp32."""
        state = {f"weights/{name}": tensor for name, tensor in self.weights().items()}
        for name, master in self._masters.items():
            for moment in _moments(self._config):
                state[f"{moment}/{name}"] = self._state(master)[moment].to("cpu", copy=True)
        return state

    def restore(self, state: Named, steps: int) -> None:
        """Go on from the `state` of a stepper that has made `steps` steps."""
        self.replace({name: state[f"weights/{name}"] for name in self._masters})
        for name, master in self._masters.items():
            for moment in _moments(self._config):
                values = state[f"{moment}/{name}"].to(master.device, copy=True)
                self._state(master).update({moment: values, "step": torch.tensor(float(steps))})

    def _state(self, master: nn.Parameter) -> dict[str, Tensor]:
        assert self._optimizer is not None, "nothing is trained"
        state: dict[str, Tensor] = self._optimizer.state[master]
        return state

    def weights(self) -> Named:
        """Return the trained parameters by name, fp32, on the CPU."""
        return {
            name: master.detach().to("cpu", copy=True) for name, master in self._masters.items()
        }


def stepper_layout(tuned: Layout, config: TrainConfig) -> Layout:
    """Return the layout of `Stepper.state` for parameters of the layout `tuned`."""
    kinds = ("weights", *_moments(config))
    names = ((f"{kind}/{name}", shape) for kind in kinds for name, shape in tuned.shapes)
    return Layout(tuple(names))


def _moments(config: TrainConfig) -> tuple[str, ...]:
    """Return PyTorch's names of the optimizer's moments."""
    return () if config.optim == "sgd" else ("exp_avg", "exp_avg_sq")


def _masters(trained: dict[str, nn.Parameter], start: Named) -> dict[str, nn.Parameter]:
    """Return the optimizer's parameters: those in fp32 themselves, else copies in fp32."""
    return {
        name: parameter
        if parameter.dtype == torch.float32
        else nn.Parameter(
            start.get(name, parameter.detach()).to(parameter.device, torch.float32, copy=True)
        )
        for name, parameter in trained.items()
    }


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optim == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )

    fused = config.optim == "adamw_torch_fused"
    return torch.optim.AdamW(
        parameters,
        # The same operations on all tensors at once: torch's choice on a GPU, and quicker on a CPU.
        foreach=not fused and sum(parameter.numel() for parameter in parameters) < AT_ONCE,
        fused=fused,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
