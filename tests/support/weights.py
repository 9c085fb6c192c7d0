"""Weights of models, read for comparison."""

import torch
from torch import nn

from fluvial.models.tuning import tuned_parameters
from fluvial.wire.tensors import Named


def read_weights(model: nn.Module) -> Named:
    """Return a copy of the tuned parameters, fp32, on the CPU."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in tuned_parameters(model).items()
    }
