"""Scores of layers, neurons and groups of heads, measured on public text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.data import Example
from fluvial.methods.fedcybgd.proxy.anatomy import Anatomy, linear_axes
from fluvial.training.train import collate, predictions

_BATCH = 8  # sequences of one forward pass of `measure`


@dataclass(frozen=True)
class Scores:
    """Scores of layers, neurons and groups on public text; larger is more important."""

    influence: tuple[float, ...]
    """Block influence of each layer: 1 - mean cosine of the stream before and after it."""
    neurons: tuple[Tensor, ...]
    """(neurons,) of each layer, fp64: rms activation times the sum of the magnitudes of its output
    weights."""
    groups: tuple[Tensor, ...]
    """(groups,) of each layer, fp64: rms Euclidean norm of what the group adds to the stream; (0,)
    if not pruned."""
    moments: tuple[Tensor, ...] = ()
    """(neurons, neurons) of each layer, fp64: sum of the products of activations over tokens, where
    it was asked for."""


@torch.no_grad()
def measure(
    model: nn.Module,
    anatomy: Anatomy,
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    moments: bool = False,
) -> Scores:
    """Return the scores of `model` over all tokens of `examples`, in one pass; with the second
    moments of neurons if `moments`.

    Block influence after Men et al., "ShortGPT", 2024, https://arxiv.org/abs/2403.03853, section 3;
    the others ours.
    """
    assert examples, "no examples"
    meter = ScoreMeter(anatomy, moments)
    handles = meter.attach(model)
    device = next(model.parameters()).device

    try:
        for start in range(0, len(examples), _BATCH):
            batch = collate(examples[start : start + _BATCH], pad_token_id, device)
            meter.read = batch["attention_mask"].bool()
            predictions(model, batch)
    finally:
        for handle in handles:
            handle.remove()

    return meter.scores(model, sum(len(example.input_ids) for example in examples))


class ScoreMeter:
    """Sums over tokens, by hooks."""

    def __init__(self, anatomy: Anatomy, moments: bool) -> None:
        self.anatomy = anatomy
        self.crossed = [torch.zeros((), dtype=torch.float64) for _ in anatomy.layers if moments]
        self.read = torch.zeros(0, dtype=torch.bool)
        """(batch, seq): which positions of the batch count."""
        layers = range(len(anatomy.layers))
        self.cosines = [0.0 for _ in layers]
        self.squares = [torch.zeros((), dtype=torch.float64) for _ in layers]
        self.moments = [torch.zeros((), dtype=torch.float64) for _ in layers]

    def attach(self, model: nn.Module) -> list[Any]:
        """Attach hooks to every layer."""
        handles = []
        for index, layer in enumerate(self.anatomy.layers):
            module = model.get_submodule(f"{self.anatomy.path}.{index}")
            handles.append(module.register_forward_hook(partial(self._see_layer, index)))
            mlp = model.get_submodule(layer.mlp.out)
            handles.append(mlp.register_forward_pre_hook(partial(self._see_neurons, index)))

            if layer.attention is not None:
                attention = model.get_submodule(layer.attention.out)
                handles.append(
                    attention.register_forward_pre_hook(partial(self._see_groups, index))
                )

        return handles

    def _see_layer(
        self, index: int, _module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        before = args[0][self.read].float()
        after = stream_of(output)[self.read].float()
        self.cosines[index] += float(nn.functional.cosine_similarity(before, after, dim=-1).sum())

    def _see_neurons(self, index: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        hidden = args[0][self.read].float()
        squares = hidden.square().sum(0).double()
        self.squares[index] = self.squares[index].to(squares.device) + squares
        if self.crossed:
            products = (hidden.T @ hidden).double()
            self.crossed[index] = self.crossed[index].to(products.device) + products

    def _see_groups(self, index: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        prunable = self.anatomy.layers[index].attention
        assert prunable is not None, "hooked without need"
        hidden = args[0][self.read].float()
        hidden = hidden.view(len(hidden), prunable.units, -1).transpose(0, 1)
        moments = (hidden.transpose(1, 2) @ hidden).double()
        self.moments[index] = self.moments[index].to(moments.device) + moments

    def scores(self, model: nn.Module, tokens: int) -> Scores:
        """Return the scores after a pass over `tokens` positions."""
        neurons = []
        groups = []

        for layer, squares, moments in zip(
            self.anatomy.layers, self.squares, self.moments, strict=True
        ):
            weights = _rows(model, layer.mlp.out).abs().sum(1)
            neurons.append((weights * (squares / tokens).sqrt()).cpu())
            if layer.attention is None:
                groups.append(torch.zeros(0, dtype=torch.float64))
                continue

            weights = _rows(model, layer.attention.out)
            weights = weights.reshape(layer.attention.units, -1, weights.shape[1])
            energy = (weights * (moments @ weights)).sum((1, 2)) / tokens
            groups.append(energy.clamp(min=0).sqrt().cpu())

        return Scores(
            tuple(1 - cosine / tokens for cosine in self.cosines),
            tuple(neurons),
            tuple(groups),
            tuple(products.cpu() for products in self.crossed),
        )


def _rows(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a linear module as (inputs, outputs), fp64."""
    module = model.get_submodule(name)
    axes = linear_axes(module)
    assert axes is not None, "the anatomy has linear modules only"
    weight: Tensor = module.weight  # type: ignore[assignment]

    return (weight.T if axes == (0, 1) else weight).double()


def stream_of(output: Any) -> Tensor:
    """Return the stream that a layer returned, in some versions of transformers as the first of a
    tuple."""
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream
