"""Where the decoder layers of a model lie, and which units of them can be pruned."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from fluvial.errors import ConfigError
from fluvial.methods.fedcybgd.proxy.settings import TOLERANCE, ProxySettings, Prune
from fluvial.models.layer_lists import layer_lists, num_layers

ATTENTION_NAMES = ("self_attn", "attn")
_MLPS: tuple[tuple[dict[str, int], str], ...] = (
    ({"gate_proj": 1, "up_proj": 1}, "down_proj"),
    ({"gate_up_proj": 2}, "down_proj"),
    ({"c_fc": 1}, "c_proj"),
)
"""Known builds of an MLP: the modules that write its activations, with how many times these lie
side by side in the output, and the module that reads them."""


@dataclass(frozen=True)
class UnitAxis:
    """An axis of a parameter along which the units of an MLP or an attention lie."""

    name: str
    """Name of the parameter."""
    axis: int
    """Number of the axis."""
    width: int
    """Entries of one unit."""
    repeats: int
    """Number of times that all units lie along the axis, as queries, keys and values do."""


@dataclass(frozen=True)
class Prunable:
    """The MLP or the attention of a layer, made of equal units that can be taken out."""

    units: int
    """Neurons or groups."""
    cost: int
    """Parameters of one unit."""
    axes: tuple[UnitAxis, ...]
    out: str
    """The module that brings the units' activations back to the stream."""


@dataclass(frozen=True)
class Layer:
    """A decoder layer."""

    size: int
    """Parameters."""
    mlp: Prunable
    attention: Prunable | None
    """None where heads are not pruned."""

    @property
    def prunables(self) -> tuple[Prunable, ...]:
        """The MLP and, where heads are pruned, the attention."""
        return (self.mlp,) if self.attention is None else (self.mlp, self.attention)

    @property
    def fixed(self) -> int:
        """Parameters that pruning never takes: norms, output biases, and attention where heads are
        not pruned."""
        return self.size - sum(prunable.units * prunable.cost for prunable in self.prunables)


@dataclass(frozen=True)
class Anatomy:
    """The places of a model's decoder layers, and the units that can be pruned in them."""

    path: str
    """Path of the list of layers, as `model.layers`."""
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, model: nn.Module, prune: Prune) -> Self:
        """Find the layers by the names of modules; works on the meta device.

        Raises `ConfigError` for a model of another build, naming the modules that were looked for.
        """
        path, stack = _stack(model)
        layers = []

        for index, layer in enumerate(stack):
            name = f"{path}.{index}"
            size = sum(parameter.numel() for parameter in layer.parameters())
            layers.append(Layer(size, _mlp(layer, name), _attention(layer, name, prune)))

        return cls(path, tuple(layers))

    def others(self, trained: Sequence[int]) -> list[int]:
        """Return the layers that are not trained."""
        return [index for index in range(len(self.layers)) if index not in trained]

    def droppable(self, trained: Sequence[int]) -> list[int]:
        """Return the layers that are not first, last, trained or next to a trained one."""
        stay = {0, len(self.layers) - 1} | {
            near for index in trained for near in (index - 1, index, index + 1)
        }
        return [index for index in range(len(self.layers)) if index not in stay]

    def size(self, trained: Sequence[int]) -> int:
        """Return the parameters of the layers that are not trained."""
        return sum(self.layers[index].size for index in self.others(trained))

    def num_dropped(self, trained: Sequence[int], settings: ProxySettings) -> int:
        """Return how many layers are dropped: the share asked for, as far as layers may be dropped.

        A randomised drop leaves one of these at least, since no chance to stay may be zero.
        """
        wanted = math.floor(settings.drop * len(self.others(trained)) + 1e-9)
        return max(0, min(wanted, len(self.droppable(trained)) - settings.randomised))

    def attainable(self, trained: Sequence[int], settings: ProxySettings) -> tuple[float, float]:
        """Return the least and the largest share of the other layers that can be kept, whichever of
        them are dropped."""
        total = self.size(trained)
        if total == 0:
            return 1.0, 1.0

        least = {
            index: self.layers[index].fixed
            + sum(prunable.cost for prunable in self.layers[index].prunables)
            for index in self.others(trained)
        }
        count = self.num_dropped(trained, settings)
        droppable = self.droppable(trained)
        thinnest = sorted(least[index] for index in droppable)[:count]
        thickest = sorted((self.layers[index].size for index in droppable), reverse=True)[:count]

        return (sum(least.values()) - sum(thinnest)) / total, 1 - sum(thickest) / total

    def check(self, trained: Sequence[int], settings: ProxySettings) -> None:
        """Raise `ConfigError` if the share to be kept cannot be reached around these trained
        layers."""
        heads = any(layer.attention is not None for layer in self.layers)
        assert heads == (settings.prune == "neurons and heads"), "an anatomy for other settings"
        least, most = self.attainable(trained, settings)

        if least <= settings.kept * (1 + TOLERANCE) and settings.kept * (1 - TOLERANCE) <= most:
            return

        more = ", or prune='neurons and heads'" if settings.prune == "neurons" else ""
        remedy = f"raise kept or drop{more}" if settings.kept < least else "lower kept or drop"
        raise ConfigError(
            f"method.download: kept={settings.kept} cannot be reached with drop={settings.drop} "
            "and "
            f"prune={settings.prune!r} when layers {list(trained)} of {len(self.layers)} are "
            "trained: attainable is "
            f"{least:.4f} to {most:.4f}; {remedy}"
        )


def _stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path and list of the decoder layers."""
    stacks = layer_lists(model)
    if len(stacks) != 1:
        raise ConfigError(
            f"method.download: {type(model).__name__} has {len(stacks)} module lists as long as "
            f"its num_hidden_layers ({num_layers(model)}); one was looked for, such as "
            "'model.layers' or 'transformer.h'. Choose another form"
        )

    return stacks[0]


def _mlp(layer: nn.Module, name: str) -> Prunable:
    """Return the MLP as neurons."""
    owner = getattr(layer, "mlp", None)
    for into, out in _MLPS:
        prunable = _prunable(
            owner, f"{name}.mlp", {leaf: (1, repeats) for leaf, repeats in into.items()}, out, 1
        )
        if prunable is not None:
            return prunable

    kinds = "; ".join(", ".join((*into, out)) for into, out in _MLPS)
    raise ConfigError(
        f"method.download: {name} ({type(layer).__name__}) has no 'mlp' that can be pruned; "
        "looked for linear modules "
        f"{kinds}, of matching sizes. Choose another form"
    )


def _attention(layer: nn.Module, name: str, prune: Prune) -> Prunable | None:
    """Return the attention as groups: Llama's kind, which takes the number of heads from what it
    computes, or GPT-2's.

    It must be there in any case, so that a dropped layer can be made the identity.
    """
    leaf = next(
        (leaf for leaf in ATTENTION_NAMES if isinstance(getattr(layer, leaf, None), nn.Module)),
        None,
    )
    if leaf is None:
        raise ConfigError(
            f"method.download: {name} ({type(layer).__name__}) has no "
            f"{' or '.join(map(repr, ATTENTION_NAMES))}, which was "
            "looked for. Choose another form"
        )

    if prune == "neurons":
        return None

    owner: Any = getattr(layer, leaf)
    width = getattr(owner, "head_dim", 0)
    queries = getattr(owner, "num_key_value_groups", 0)
    prunable = None

    if width and queries and not hasattr(owner, "num_heads"):
        into = {"q_proj": (queries * width, 1), "k_proj": (width, 1), "v_proj": (width, 1)}
        prunable = _prunable(owner, f"{name}.{leaf}", into, "o_proj", queries * width)
    elif width and hasattr(owner, "split_size"):
        prunable = _prunable(owner, f"{name}.{leaf}", {"c_attn": (width, 3)}, "c_proj", width)

    if prunable is None or not _only_per_head(owner, f"{name}.{leaf}", prunable, width):
        raise ConfigError(
            f"method.download.prune='neurons and heads': the heads of {name}.{leaf} "
            f"({type(owner).__name__}) cannot be "
            "pruned; looked for linear modules q_proj, k_proj, v_proj, o_proj with head_dim and "
            "num_key_value_groups, "
            "or c_attn, c_proj with head_dim and split_size, and no weights across heads. Use "
            "prune = 'neurons'"
        )

    return prunable


def linear_axes(module: object) -> tuple[int, int] | None:
    """Return the output and input axis of a linear module's weight (transformers' Conv1D is a
    transposed one), else None."""
    if isinstance(module, nn.Linear):
        return 0, 1
    return (1, 0) if hasattr(module, "nf") and hasattr(module, "nx") else None


def _prunable(
    owner: Any, name: str, into: Mapping[str, tuple[int, int]], out: str, out_width: int
) -> Prunable | None:
    """Return the prunable between the modules `into` of `owner`, each with the width of a unit and
    how many times all units lie in its output, and the module `out`. None if a module is missing or
    sizes disagree."""
    unit_axes = []
    shapes = {}

    for leaf in (*into, out):
        module = getattr(owner, leaf, None)
        axes = linear_axes(module)
        if module is None or axes is None:
            return None

        width, repeats = into.get(leaf, (out_width, 1))
        unit_axes.append(UnitAxis(f"{name}.{leaf}.weight", axes[leaf == out], width, repeats))
        shapes[f"{name}.{leaf}.weight"] = module.weight.shape

        if leaf != out and module.bias is not None:
            unit_axes.append(UnitAxis(f"{name}.{leaf}.bias", 0, width, repeats))
            shapes[f"{name}.{leaf}.bias"] = module.bias.shape

    counts = {shapes[lies.name][lies.axis] / (lies.width * lies.repeats) for lies in unit_axes}
    units = int(min(counts))
    if counts != {units}:
        return None

    return Prunable(
        units,
        sum(shape.numel() for shape in shapes.values()) // units,
        tuple(unit_axes),
        f"{name}.{out}",
    )


def _only_per_head(owner: nn.Module, name: str, prunable: Prunable, width: int) -> bool:
    """Return whether every parameter of `owner` that pruning leaves whole has shape (width,).

    Such are the norms of queries and keys, which all heads share. The output's bias is left out.
    """
    known = {lies.name for lies in prunable.axes} | {f"{prunable.out}.bias"}
    rest = [
        parameter for leaf, parameter in owner.named_parameters() if f"{name}.{leaf}" not in known
    ]

    return all(parameter.shape == (width,) for parameter in rest)
