"""The smaller model itself: its weights cut out at the server, its empty shape made at the site."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.methods.fedcybgd.proxy.anatomy import ATTENTION_NAMES
from fluvial.methods.fedcybgd.proxy.manifest import Manifest, heads_of
from fluvial.methods.fedcybgd.proxy.scores import stream_of
from fluvial.wire.tensors import Named


def cut(state: Named, manifest: Manifest) -> Named:
    """Cut `state`, the weights by name, to what is sent: no dropped layer, and of pruned layers the
    units that stay, with output weights that stand in for the others where the manifest has
    moments."""
    dropped = tuple(f"{manifest.anatomy.path}.{index}." for index in manifest.dropped)
    weights = {name: tensor for name, tensor in state.items() if not name.startswith(dropped)}

    entries = _entries(manifest)
    for index, moments in manifest.moments.items():
        name = f"{manifest.anatomy.layers[index].mlp.out}.weight"
        if name in weights:
            axis, stay = entries.pop(name)
            rows = weights[name].movedim(axis, 0)
            weights[name] = compensated(rows, stay, moments).movedim(0, axis).contiguous()

    for name, (axis, stay) in entries.items():
        if name in weights:
            weights[name] = weights[name].index_select(axis, stay.to(weights[name].device))

    return weights


def compensated(rows: Tensor, stay: Tensor, moments: Tensor) -> Tensor:
    """Return the output weights (stay, out) of the units that stay with which their activations
    come closest, in squares over what `moments` (units, units) was summed, to the sum of all units
    with `rows` (units, out).

    They solve C[K, K] V = C[K, :] W, for moments C and units K that stay; the ridge of 1e-4 of the
    mean square is ours.
    """
    among = moments[stay][:, stay]
    ridge = 1e-4 * among.diagonal().mean() * torch.eye(len(stay), dtype=among.dtype)
    solved: Tensor = torch.linalg.solve(among + ridge, moments[stay] @ rows.cpu().double())
    return solved.to(rows.device, rows.dtype)


def _entries(manifest: Manifest) -> dict[str, tuple[int, Tensor]]:
    """Return, for each parameter that is not sent whole, the axis and the entries along it that
    stay (kept,), int64."""
    layers = manifest.anatomy.layers
    pruned = [(layers[index].mlp, stay) for index, stay in manifest.neurons.items()]
    pruned += [(heads_of(layers[index]), stay) for index, stay in manifest.groups.items()]
    entries = {}

    for prunable, stay in pruned:
        units = torch.tensor(stay)
        for along in prunable.axes:
            numbers = [units + repeat * prunable.units for repeat in range(along.repeats)]
            starts = torch.cat(numbers) * along.width
            indices = (starts[:, None] + torch.arange(along.width)).flatten()
            entries[along.name] = along.axis, indices

    return entries


def slim(skeleton: nn.Module, manifest: Manifest) -> nn.Module:
    """Change `skeleton` in place so that names and shapes of its parameters are those of
    `cut`.

    The changed parameters are on the meta device. A dropped layer keeps its place and adds nothing
    to the stream; a gain is applied to what its layer returns.
    """
    for index in manifest.dropped:
        _silence(skeleton.get_submodule(f"{manifest.anatomy.path}.{index}"))
    for name, (axis, entries) in _entries(manifest).items():
        owner, _, leaf = name.rpartition(".")
        module = skeleton.get_submodule(owner)
        whole = getattr(module, leaf)
        shape = [len(entries) if dim == axis else size for dim, size in enumerate(whole.shape)]
        empty = torch.empty(shape, dtype=whole.dtype, device="meta")
        setattr(module, leaf, nn.Parameter(empty, requires_grad=whole.requires_grad))

        if leaf == "weight":
            _resize(module, shape)

    for index, stay in manifest.groups.items():
        attention: Any = skeleton.get_submodule(
            heads_of(manifest.anatomy.layers[index]).out.rpartition(".")[0]
        )
        if hasattr(attention, "split_size"):  # GPT-2's; the others count heads by what they compute
            attention.num_heads, attention.split_size = len(stay), len(stay) * attention.head_dim

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
        if name in ATTENTION_NAMES:
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
        """Return zeros like `hidden_states`; with None for the attention weights if an attention's
        are expected."""
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.pair else nothing


@dataclass(frozen=True)
class Rescale:
    """A forward hook that multiplies the change a layer makes: x + gain * (layer(x) - x).

    A hook, because a module around the layer would change the names of its parameters.
    """

    gain: float

    def __call__(self, _layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the rescaled result, in the form of `output`."""
        stream = args[0] + self.gain * (stream_of(output) - args[0])
        return (stream, *output[1:]) if isinstance(output, tuple) else stream
