"""The paper's form of download: a smaller model around the trained block, by layer dropping and
structured pruning.

Wang et al. (2024), https://arxiv.org/abs/2406.11187, name the two operations and give no formula;
the scores and the choice are ours. The server measures on public text what each decoder layer, each
MLP neuron and each group of heads adds to the residual stream (`measure`), decides what a site gets
(`plan_proxy`) and sends only that (`cut`), with the manifest. The site shapes an empty model
accordingly (`slim`): a dropped layer passes its input on, a pruned layer is narrower, and the
trained block is whole.

Layers are counted from 0. A *group* is a key-value head with the query heads that read it; they are
pruned together.
"""

import heapq
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fluvial.data import Example
from fluvial.errors import ConfigError, WireError
from fluvial.seeds import generator
from fluvial.settings import Settings
from fluvial.training.train import collate, predictions
from fluvial.wire.tensors import Named

Prune = Literal["neurons", "neurons and heads"]

_TOLERANCE = 0.01  # of the requested share
_BATCH = 8  # sequences of one forward pass of `measure`
_HEX = re.compile("[0-9a-f]*")
_ATTENTION = ("self_attn", "attn")
_MLPS: tuple[tuple[dict[str, int], str], ...] = (
    ({"gate_proj": 1, "up_proj": 1}, "down_proj"),
    ({"gate_up_proj": 2}, "down_proj"),
    ({"c_fc": 1}, "c_proj"),
)
"""How an MLP may be built: the modules that write its activations, with how many times these lie
side by side in the output, and the one that reads them."""


class ProxySettings(Settings):
    """How much a site gets of the layers that it does not train. The defaults are ours; the paper's
    are not known."""

    kept: float = Field(0.5, gt=0, le=1)
    """Share of the other decoder layers' parameters that is sent (rho); met within 1 %."""
    drop: float = Field(0.25, ge=0, lt=1)
    """Share of the other decoder layers that is dropped, rounded down to whole layers; pruning does
    the rest."""
    prune: Prune = "neurons"
    """What is pruned in the layers that stay. Heads are pruned by about the same share as
    neurons."""
    multiple: int = Field(64, ge=1, le=10**6)
    """Neurons that stay in a pruned layer are a multiple of this; of its half, quarter and so on
    where `kept` cannot be met otherwise."""
    randomised: bool = False
    """Draw the dropped layers anew in every visit. What a layer that stays adds to the stream is
    divided by its chance to stay, so that the expectation is what the whole model adds."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.kept > 1 - self.drop + 1e-9:
            yield (
                f"kept={self.kept}: with drop={self.drop} a share of {1 - self.drop:.4g} is left at most; choose kept "
                f"at most {1 - self.drop:.4g}, or drop at most {1 - self.kept:.4g}"
            )

        for name in ("prune", "multiple"):
            if self.kept == 1 and getattr(self, name) != type(self).model_fields[name].default:
                yield f"{name}: without effect under kept=1; remove it"

        if self.randomised and self.drop == 0:
            yield "randomised: without effect under drop=0; remove it"


@dataclass(frozen=True)
class Side:
    """An axis of a parameter along which units lie: `parts` times all of them, each `width` entries
    wide."""

    name: str
    axis: int
    width: int
    parts: int


@dataclass(frozen=True)
class Part:
    """The MLP or the attention of a layer, made of equal units that can be taken out."""

    units: int
    """Neurons or groups."""
    cost: int
    """Parameters of one unit."""
    sides: tuple[Side, ...]
    out: str
    """The module that brings the units' activations back to the stream."""


@dataclass(frozen=True)
class Layer:
    """A decoder layer."""

    size: int
    """Parameters."""
    mlp: Part
    attention: Part | None
    """None where heads are not pruned."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What can be pruned."""
        return (self.mlp,) if self.attention is None else (self.mlp, self.attention)

    @property
    def fixed(self) -> int:
        """Parameters that pruning never takes: norms, output biases, and attention where heads are
        not pruned."""
        return self.size - sum(part.units * part.cost for part in self.parts)


@dataclass(frozen=True)
class Anatomy:
    """Where the decoder layers of a model lie and what can be pruned in them."""

    path: str
    """Of the list of layers, as `model.layers`."""
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, model: nn.Module, prune: Prune) -> Self:
        """Found by the names of modules; works on the meta device.

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
        """The layers that are not trained."""
        return [index for index in range(len(self.layers)) if index not in trained]

    def droppable(self, trained: Sequence[int]) -> list[int]:
        """The layers that are not first, last, trained or next to a trained one."""
        stay = {0, len(self.layers) - 1} | {
            near for index in trained for near in (index - 1, index, index + 1)
        }
        return [index for index in range(len(self.layers)) if index not in stay]

    def size(self, trained: Sequence[int]) -> int:
        """Parameters of the layers that are not trained."""
        return sum(self.layers[index].size for index in self.others(trained))

    def num_dropped(self, trained: Sequence[int], settings: ProxySettings) -> int:
        """How many layers are dropped: the share asked for, as far as layers may be dropped.

        A randomised drop leaves one of these at least, since no chance to stay may be zero.
        """
        wanted = math.floor(settings.drop * len(self.others(trained)) + 1e-9)
        return max(0, min(wanted, len(self.droppable(trained)) - settings.randomised))

    def attainable(self, trained: Sequence[int], settings: ProxySettings) -> tuple[float, float]:
        """The least and the largest share of the other layers that can be kept, whichever of them
        are dropped."""
        total = self.size(trained)
        if total == 0:
            return 1.0, 1.0

        least = {
            index: self.layers[index].fixed + sum(part.cost for part in self.layers[index].parts)
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

        if least <= settings.kept * (1 + _TOLERANCE) and settings.kept * (1 - _TOLERANCE) <= most:
            return

        more = ", or prune='neurons and heads'" if settings.prune == "neurons" else ""
        remedy = f"raise kept or drop{more}" if settings.kept < least else "lower kept or drop"
        raise ConfigError(
            f"method.download: kept={settings.kept} cannot be reached with drop={settings.drop} and "
            f"prune={settings.prune!r} when layers {list(trained)} of {len(self.layers)} are trained: attainable is "
            f"{least:.4f} to {most:.4f}; {remedy}"
        )


def _stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers."""
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    found = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == count
    ]

    if len(found) != 1:
        raise ConfigError(
            f"method.download: {type(model).__name__} has {len(found)} module lists as long as its num_hidden_layers "
            f"({count}); one was looked for, such as 'model.layers' or 'transformer.h'. Choose another form"
        )

    return found[0]


def _mlp(layer: nn.Module, name: str) -> Part:
    """The MLP as neurons."""
    owner = getattr(layer, "mlp", None)
    for into, out in _MLPS:
        part = _part(
            owner, f"{name}.mlp", {leaf: (1, parts) for leaf, parts in into.items()}, out, 1
        )
        if part is not None:
            return part

    kinds = "; ".join(", ".join((*into, out)) for into, out in _MLPS)
    raise ConfigError(
        f"method.download: {name} ({type(layer).__name__}) has no 'mlp' that can be pruned; looked for linear modules "
        f"{kinds}, of matching sizes. Choose another form"
    )


def _attention(layer: nn.Module, name: str, prune: Prune) -> Part | None:
    """The attention as groups: Llama's kind, which takes the number of heads from what it computes,
    or GPT-2's.

    It must be there in any case, so that a dropped layer can be made the identity.
    """
    leaf = next(
        (leaf for leaf in _ATTENTION if isinstance(getattr(layer, leaf, None), nn.Module)), None
    )
    if leaf is None:
        raise ConfigError(
            f"method.download: {name} ({type(layer).__name__}) has no {' or '.join(map(repr, _ATTENTION))}, which was "
            "looked for. Choose another form"
        )

    if prune == "neurons":
        return None

    owner: Any = getattr(layer, leaf)
    width = getattr(owner, "head_dim", 0)
    queries = getattr(owner, "num_key_value_groups", 0)
    part = None

    if width and queries and not hasattr(owner, "num_heads"):
        into = {"q_proj": (queries * width, 1), "k_proj": (width, 1), "v_proj": (width, 1)}
        part = _part(owner, f"{name}.{leaf}", into, "o_proj", queries * width)
    elif width and hasattr(owner, "split_size"):
        part = _part(owner, f"{name}.{leaf}", {"c_attn": (width, 3)}, "c_proj", width)

    if part is None or not _only_per_head(owner, f"{name}.{leaf}", part, width):
        raise ConfigError(
            f"method.download.prune='neurons and heads': the heads of {name}.{leaf} ({type(owner).__name__}) cannot be "
            "pruned; looked for linear modules q_proj, k_proj, v_proj, o_proj with head_dim and num_key_value_groups, "
            "or c_attn, c_proj with head_dim and split_size, and no weights across heads. Use prune = 'neurons'"
        )

    return part


def _axes(module: object) -> tuple[int, int] | None:
    """Output and input axis of a linear module's weight (transformers' Conv1D is a transposed one),
    else None."""
    if isinstance(module, nn.Linear):
        return 0, 1
    return (1, 0) if hasattr(module, "nf") and hasattr(module, "nx") else None


def _part(
    owner: Any, name: str, into: Mapping[str, tuple[int, int]], out: str, out_width: int
) -> Part | None:
    """The part between the modules `into` of `owner`, each with the width of a unit and how many
    times all units lie in its output, and the module `out`. None if a module is missing or sizes
    disagree.
    """
    sides = []
    shapes = {}

    for leaf in (*into, out):
        module = getattr(owner, leaf, None)
        axes = _axes(module)
        if module is None or axes is None:
            return None

        width, parts = into.get(leaf, (out_width, 1))
        sides.append(Side(f"{name}.{leaf}.weight", axes[leaf == out], width, parts))
        shapes[f"{name}.{leaf}.weight"] = module.weight.shape

        if leaf != out and module.bias is not None:
            sides.append(Side(f"{name}.{leaf}.bias", 0, width, parts))
            shapes[f"{name}.{leaf}.bias"] = module.bias.shape

    counts = {shapes[side.name][side.axis] / (side.width * side.parts) for side in sides}
    units = int(min(counts))
    if counts != {units}:
        return None

    return Part(
        units,
        sum(shape.numel() for shape in shapes.values()) // units,
        tuple(sides),
        f"{name}.{out}",
    )


def _only_per_head(owner: nn.Module, name: str, part: Part, width: int) -> bool:
    """Whether what is not cut, but for the output's bias, is per head, such as the norms of queries
    and keys."""
    known = {side.name for side in part.sides} | {f"{part.out}.bias"}
    rest = [
        parameter for leaf, parameter in owner.named_parameters() if f"{name}.{leaf}" not in known
    ]

    return all(parameter.shape == (width,) for parameter in rest)


@dataclass(frozen=True)
class Scores:
    """What layers, neurons and groups do on public text; larger is more."""

    influence: tuple[float, ...]
    """Of each layer: 1 - mean cosine of the stream before and after it."""
    neurons: tuple[Tensor, ...]
    """(neurons,) of each layer, fp64: rms activation times the sum of the magnitudes of its output
    weights."""
    groups: tuple[Tensor, ...]
    """(groups,) of each layer, fp64: rms Euclidean norm of what the group adds to the stream; (0,)
    if not pruned."""


@torch.no_grad()
def measure(
    model: nn.Module, anatomy: Anatomy, examples: Sequence[Example], *, pad_token_id: int
) -> Scores:
    """Scores of `model` over all tokens of `examples`, in one pass.

    Block influence after Men et al., "ShortGPT", 2024, https://arxiv.org/abs/2403.03853, section 3;
    the others ours.
    """
    assert examples, "no examples"
    meter = _Meter(anatomy)
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


class _Meter:
    """Sums over tokens, by hooks."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.read = torch.zeros(0, dtype=torch.bool)
        """(batch, seq): which positions of the batch count."""
        layers = range(len(anatomy.layers))
        self.cosines = [0.0 for _ in layers]
        self.squares = [torch.zeros((), dtype=torch.float64) for _ in layers]
        self.moments = [torch.zeros((), dtype=torch.float64) for _ in layers]

    def attach(self, model: nn.Module) -> list[Any]:
        """Hook into every layer."""
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
        after = _stream(output)[self.read].float()
        self.cosines[index] += float(nn.functional.cosine_similarity(before, after, dim=-1).sum())

    def _see_neurons(self, index: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        squares = args[0][self.read].float().square().sum(0).double()
        self.squares[index] = self.squares[index].to(squares.device) + squares

    def _see_groups(self, index: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        part = self.anatomy.layers[index].attention
        assert part is not None, "hooked without need"
        hidden = args[0][self.read].float()
        hidden = hidden.view(len(hidden), part.units, -1).transpose(0, 1)
        moments = (hidden.transpose(1, 2) @ hidden).double()
        self.moments[index] = self.moments[index].to(moments.device) + moments

    def scores(self, model: nn.Module, tokens: int) -> Scores:
        """After the pass over `tokens` positions."""
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
            tuple(1 - cosine / tokens for cosine in self.cosines), tuple(neurons), tuple(groups)
        )


def _rows(model: nn.Module, name: str) -> Tensor:
    """The weight of a linear module as (inputs, outputs), fp64."""
    module = model.get_submodule(name)
    axes = _axes(module)
    assert axes is not None, "the anatomy has linear modules only"
    weight: Tensor = module.weight  # type: ignore[assignment]

    return (weight.T if axes == (0, 1) else weight).double()


def _stream(output: Any) -> Tensor:
    """What a layer returned: the stream, in some versions of transformers as the first of a
    tuple."""
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream


@dataclass(frozen=True)
class Manifest:
    """What of the model is sent around the trained layers."""

    anatomy: Anatomy = field(repr=False)
    trained: tuple[int, ...]
    dropped: tuple[int, ...]
    neurons: Mapping[int, tuple[int, ...]]
    """Of each pruned layer, those that stay, in order."""
    groups: Mapping[int, tuple[int, ...]]
    """The same."""
    gains: Mapping[int, float]
    """By what the change that a layer makes is multiplied, where that is not 1."""

    def values(self) -> dict[str, Any]:
        """For a message: what stays is one bit for each unit, in hexadecimal digits."""
        layers = self.anatomy.layers
        return {
            "dropped": list(self.dropped),
            "neurons": {
                str(i): _pack_units(kept, layers[i].mlp.units) for i, kept in self.neurons.items()
            },
            "groups": {
                str(i): _pack_units(kept, _heads(layers[i]).units)
                for i, kept in self.groups.items()
            },
            "gains": {str(i): gain for i, gain in self.gains.items()},
        }

    @classmethod
    def from_values(
        cls, values: Mapping[str, Any], anatomy: Anatomy, trained: Sequence[int]
    ) -> Self:
        """Inverse of `values`; raises `WireError` for what does not fit this model and these
        trained layers."""
        if set(values) != {"dropped", "neurons", "groups", "gains"}:
            raise WireError(
                f"proxy manifest: expected dropped, neurons, groups and gains, found {sorted(values)[:5]}"
            )

        dropped = values["dropped"]
        droppable = anatomy.droppable(trained)
        if type(dropped) is not list or not all(
            type(index) is int and index in droppable for index in dropped
        ):
            raise WireError(
                f"proxy manifest: dropped={dropped!r:.80}, expected layers among {droppable}"
            )

        if dropped != sorted(set(dropped)):
            raise WireError(
                f"proxy manifest: dropped={dropped!r:.80} is not in order, or not distinct"
            )

        rest = [index for index in anatomy.others(trained) if index not in dropped]
        neurons = _table(values, "neurons", rest)
        groups = _table(values, "groups", rest)
        gains = _table(values, "gains", [index for index in droppable if index not in dropped])

        if groups and any(anatomy.layers[index].attention is None for index in groups):
            raise WireError("proxy manifest: groups are pruned, where only neurons are to be")

        for index, gain in gains.items():
            if type(gain) is not float or not 1 < gain <= 2 * len(anatomy.layers):
                raise WireError(
                    f"proxy manifest: gain {gain!r:.40} of layer {index} is out of range"
                )

        layers = anatomy.layers
        return cls(
            anatomy,
            tuple(trained),
            tuple(dropped),
            {
                i: _read_units(bits, layers[i].mlp.units, f"neurons of layer {i}")
                for i, bits in neurons.items()
            },
            {
                i: _read_units(bits, _heads(layers[i]).units, f"groups of layer {i}")
                for i, bits in groups.items()
            },
            gains,
        )


def _heads(layer: Layer) -> Part:
    assert layer.attention is not None, "heads of this anatomy are not pruned"
    return layer.attention


def _pack_units(kept: Sequence[int], units: int) -> str:
    bits = np.zeros(units, dtype=np.uint8)
    bits[list(kept)] = 1
    return np.packbits(bits).tobytes().hex()


def _read_units(text: object, units: int, what: str) -> tuple[int, ...]:
    """Inverse of `_pack_units`; raises `WireError` unless some units stay and some do not."""
    if type(text) is not str or len(text) != 2 * math.ceil(units / 8) or not _HEX.fullmatch(text):
        raise WireError(
            f"proxy manifest: {what}: {text!r:.40} is not one bit for each of {units} in hexadecimal digits"
        )

    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))
    kept = tuple(np.flatnonzero(bits).tolist())
    if not 0 < len(kept) < units or kept[-1] >= units:
        raise WireError(
            f"proxy manifest: {what}: {len(kept)} of {units} stay, or bits beyond these are set"
        )

    return kept


def _table(values: Mapping[str, Any], name: str, layers: Sequence[int]) -> dict[int, Any]:
    """An object whose keys are among `layers`, by number; raises `WireError`."""
    found = values[name]
    known = {str(index): index for index in layers}

    if type(found) is not dict or not found.keys() <= known.keys():
        raise WireError(
            f"proxy manifest: {name}={found!r:.80}, expected an object with keys among layers {layers}"
        )

    return {index: found[key] for key, index in known.items() if key in found}


def plan_proxy(
    scores: Scores,
    anatomy: Anatomy,
    *,
    trained: Sequence[int],
    settings: ProxySettings,
    seed: int,
    visit: int | str,
) -> Manifest:
    """What a site gets that trains the layers `trained` (none, for a block outside the layers).

    Depends on nothing else; on `seed` and `visit` only where `settings.randomised`. Raises
    `ConfigError` where the share to be kept cannot be reached (see `Anatomy.check`).
    """
    anatomy.check(trained, settings)
    dropped, gains = _drop(scores, anatomy, trained, settings, generator(seed, "proxy", visit))
    rest = {
        index: anatomy.layers[index] for index in anatomy.others(trained) if index not in dropped
    }
    goal = settings.kept * anatomy.size(trained)
    room = goal - sum(layer.fixed for layer in rest.values())
    mlps = {index: layer.mlp for index, layer in rest.items()}
    heads = {index: layer.attention for index, layer in rest.items() if layer.attention is not None}
    share = room / max(1, sum(layer.size - layer.fixed for layer in rest.values()))
    # Rounded away from one half, so that neurons, of which there are more, can make up for what is
    # missed.
    half = math.copysign(max((part.cost for part in heads.values()), default=0) / 2, share - 0.5)
    all_heads = sum(part.units * part.cost for part in heads.values())
    groups = _fill(heads, scores.influence, share * all_heads + half, step=1)
    room -= sum(heads[index].cost * count for index, count in groups.items())
    step = settings.multiple

    while True:
        neurons = _fill(mlps, scores.influence, room, step)
        missed = abs(sum(mlps[index].cost * count for index, count in neurons.items()) - room)
        if missed <= _TOLERANCE * goal or step == 1:
            break
        step //= 2

    if missed > _TOLERANCE * goal:
        raise ConfigError(
            f"method.download: kept={settings.kept} is missed by {missed / goal:.1%}, because in this small model a "
            "neuron more or less is a larger step; ask for more"
        )

    return Manifest(
        anatomy,
        tuple(trained),
        dropped,
        {
            i: _best(scores.neurons[i], count)
            for i, count in neurons.items()
            if count < mlps[i].units
        },
        {
            i: _best(scores.groups[i], count)
            for i, count in groups.items()
            if count < heads[i].units
        },
        gains,
    )


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` units of the highest scores, in order."""
    kept = scores.argsort(descending=True, stable=True)[:count]
    return tuple(sorted(kept.tolist()))


def _fill(
    parts: Mapping[int, Part], influence: Sequence[float], goal: float, step: int
) -> dict[int, int]:
    """Units that stay in each layer: about the same share everywhere, multiples of `step` or all of
    them.

    Starting from the least, the layer with the smallest share gets the next `step` units, of equal
    ones the most influential, until `goal` parameters are there.
    """
    counts = {index: min(step, part.units) for index, part in parts.items()}
    there = sum(parts[index].cost * count for index, count in counts.items())
    queue = [
        (count / parts[index].units, -influence[index], index) for index, count in counts.items()
    ]
    heapq.heapify(queue)

    while queue:
        _, least, index = heapq.heappop(queue)
        part = parts[index]
        count = min(counts[index] + step, parts[index].units)
        more = (count - counts[index]) * part.cost

        if there + more / 2 > goal:
            break
        if more:
            counts[index] = count
            there = there + more
            heapq.heappush(queue, (count / part.units, least, index))

    return counts


def _drop(
    scores: Scores,
    anatomy: Anatomy,
    trained: Sequence[int],
    settings: ProxySettings,
    draw: torch.Generator,
) -> tuple[tuple[int, ...], dict[int, float]]:
    """The dropped layers, in order, and the gains of those that might have been."""
    layers = anatomy.droppable(trained)
    count = anatomy.num_dropped(trained, settings)

    if not settings.randomised:
        ranked = sorted(layers, key=lambda index: (scores.influence[index], index))
        return tuple(sorted(ranked[:count])), {}

    if count == 0:
        return (), {}

    stay = chances([scores.influence[index] for index in layers], len(layers) - count)
    picked = _systematic(1 - stay, draw)
    dropped = tuple(index for index, gone in zip(layers, picked, strict=True) if gone)
    gains = {
        i: 1 / p
        for i, p, gone in zip(layers, stay.tolist(), picked, strict=True)
        if not gone and p < 1
    }

    return dropped, gains


def chances(influence: Sequence[float], stay: int) -> Tensor:
    """(layers,) fp64: the chance of each layer to stay, `stay` in sum, where so many of them stay.

    A layer that adds r and stays with chance p, its change divided by p, has variance r^2 (1 / p -
    1); for a given sum of chances these are least for p in proportion to r. r is sqrt(influence),
    the size of the change against the stream. No chance is above 1, nor below half of the mean, so
    that gains are bounded (ours).
    """
    size = torch.tensor(influence, dtype=torch.float64).clamp(min=1e-12).sqrt()
    least = stay / len(influence) / 2
    low = 0.0
    high = 1 / float(size.min())

    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if float((middle * size).clamp(least, 1).sum()) < stay else (low, middle)
        )

    return (high * size).clamp(least, 1)


def _systematic(shares: Tensor, draw: torch.Generator) -> list[bool]:
    """A draw of a fixed number of items, each with its chance in `shares`, which sum to a whole
    number.

    Systematic sampling in random order (Madow, 1949): the items are laid end to end, each as long
    as its chance, and those are picked in which a mark falls; marks are 1 apart from a random
    start.
    """
    order = torch.randperm(len(shares), generator=draw)
    ends = shares[order].cumsum(0)
    ends *= ends[-1].round() / ends[-1]
    marks = (ends - torch.rand((), dtype=torch.float64, generator=draw)).floor()
    picked = torch.zeros(len(shares), dtype=torch.bool)
    picked[order] = marks.diff(prepend=torch.full((1,), -1.0, dtype=torch.float64)) > 0

    return picked.tolist()


def kept_fraction(manifest: Manifest) -> float:
    """Share of the parameters of the layers that are not trained that the manifest keeps; 1 if all
    are trained."""
    anatomy = manifest.anatomy
    total = manifest.anatomy.size(manifest.trained)
    gone = sum(anatomy.layers[index].size for index in manifest.dropped)

    for index, kept in manifest.neurons.items():
        part = anatomy.layers[index].mlp
        gone += (part.units - len(kept)) * part.cost

    for index, kept in manifest.groups.items():
        part = _heads(anatomy.layers[index])
        gone += (part.units - len(kept)) * part.cost

    return 1 - gone / total if total else 1.0


def cut(state: Named, manifest: Manifest) -> Named:
    """What is sent of `state`, the weights by name: no dropped layer, and of pruned layers the
    units that stay."""
    dropped = tuple(f"{manifest.anatomy.path}.{index}." for index in manifest.dropped)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(dropped)}

    for name, (axis, entries) in _entries(manifest).items():
        if name in kept:
            kept[name] = kept[name].index_select(axis, entries.to(kept[name].device))

    return kept


def _entries(manifest: Manifest) -> dict[str, tuple[int, Tensor]]:
    """Of each parameter that is not sent whole: the axis, and the entries along it that stay
    (kept,), int64."""
    layers = manifest.anatomy.layers
    parts = [(layers[index].mlp, kept) for index, kept in manifest.neurons.items()]
    parts += [(_heads(layers[index]), kept) for index, kept in manifest.groups.items()]
    found = {}

    for part, kept in parts:
        units = torch.tensor(kept)
        for side in part.sides:
            starts = torch.cat(
                [(units + number * part.units) * side.width for number in range(side.parts)]
            )
            found[side.name] = side.axis, (starts[:, None] + torch.arange(side.width)).flatten()

    return found


def slim(skeleton: nn.Module, manifest: Manifest) -> nn.Module:
    """`skeleton`, changed in place so that names and shapes of its parameters are those of `cut`.

    The changed parameters are on the meta device. A dropped layer keeps its place and adds nothing
    to the stream; a gain is applied to what its layer returns.
    """
    for index in manifest.dropped:
        _silence(skeleton.get_submodule(f"{manifest.anatomy.path}.{index}"))
    for name, (axis, entries) in _entries(manifest).items():
        owner, _, leaf = name.rpartition(".")
        module = skeleton.get_submodule(owner)
        whole = getattr(module, leaf)
        shape = [len(entries) if dim == axis else side for dim, side in enumerate(whole.shape)]
        empty = torch.empty(shape, dtype=whole.dtype, device="meta")
        setattr(module, leaf, nn.Parameter(empty, requires_grad=whole.requires_grad))

        if leaf == "weight":
            _resize(module, shape)

    for index, kept in manifest.groups.items():
        attention: Any = skeleton.get_submodule(
            _heads(manifest.anatomy.layers[index]).out.rpartition(".")[0]
        )
        if hasattr(attention, "split_size"):  # GPT-2's; the others count heads by what they compute
            attention.num_heads, attention.split_size = len(kept), len(kept) * attention.head_dim

    for index, gain in manifest.gains.items():
        skeleton.get_submodule(f"{manifest.anatomy.path}.{index}").register_forward_hook(
            Rescale(gain)
        )

    return skeleton


def _resize(module: Any, shape: Sequence[int]) -> None:
    """Tell a linear module the shape of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    else:
        module.nx, module.nf = shape


def _silence(layer: nn.Module) -> None:
    """Make a decoder layer the identity, whatever form its result has: what it adds to the stream
    becomes zero."""
    for name, _ in list(layer.named_children()):
        if name in _ATTENTION:
            setattr(layer, name, Silence(pair=True))
        else:
            setattr(layer, name, Silence(pair=False) if name == "mlp" else nn.Identity())


class Silence(nn.Module):
    """In place of an MLP, or of an attention (`pair`): adds nothing."""

    def __init__(self, *, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(
        self, hidden_states: Tensor, *_args: Any, **_options: Any
    ) -> Tensor | tuple[Tensor, None]:
        """Zeros like `hidden_states`; with None for the attention weights if an attention's are
        expected."""
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.pair else nothing


@dataclass(frozen=True)
class Rescale:
    """A forward hook that multiplies the change a layer makes: x + gain * (layer(x) - x).

    A hook, because a module around the layer would change the names of its parameters.
    """

    gain: float

    def __call__(self, _layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The rescaled result, in the form of `output`."""
        stream = args[0] + self.gain * (_stream(output) - args[0])
        return (stream, *output[1:]) if isinstance(output, tuple) else stream
