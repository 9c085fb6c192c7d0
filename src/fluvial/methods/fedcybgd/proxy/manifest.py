"""The manifest of a proxy: which layers, neurons and groups of heads are sent."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from torch import Tensor

from fluvial.errors import WireError
from fluvial.methods.fedcybgd.proxy.anatomy import Anatomy, Layer, Prunable

_HEX = re.compile("[0-9a-f]*")


@dataclass(frozen=True)
class Manifest:
    """The selection of layers, neurons and groups that is sent around the trained layers."""

    anatomy: Anatomy = field(repr=False)
    trained: tuple[int, ...]
    dropped: tuple[int, ...]
    neurons: Mapping[int, tuple[int, ...]]
    """Neurons that stay in each pruned layer, in order."""
    groups: Mapping[int, tuple[int, ...]]
    """Groups that stay in each pruned layer, in order."""
    gains: Mapping[int, float]
    """Factor on the change that a layer makes, where it is not 1."""
    moments: Mapping[int, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Second moments of the neurons of each pruned layer whose output weights are corrected; known
    to the server alone."""

    def values(self) -> dict[str, Any]:
        """Return the manifest for a message: units that stay are one bit each, in hexadecimal
        digits."""
        layers = self.anatomy.layers
        return {
            "dropped": list(self.dropped),
            "neurons": {
                str(i): _pack_units(stay, layers[i].mlp.units) for i, stay in self.neurons.items()
            },
            "groups": {
                str(i): _pack_units(stay, heads_of(layers[i]).units)
                for i, stay in self.groups.items()
            },
            "gains": {str(i): gain for i, gain in self.gains.items()},
        }

    @classmethod
    def from_values(
        cls, values: Mapping[str, Any], anatomy: Anatomy, trained: Sequence[int]
    ) -> Self:
        """Invert `values`; raises `WireError` for what does not fit this model and these
        trained layers."""
        if set(values) != {"dropped", "neurons", "groups", "gains"}:
            raise WireError(
                "proxy manifest: expected dropped, neurons, groups and gains, found "
                f"{sorted(values)[:5]}"
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
        neurons = by_layer(values, "neurons", rest)
        groups = by_layer(values, "groups", rest)
        gains = by_layer(values, "gains", [index for index in droppable if index not in dropped])

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
                i: _read_units(bits, heads_of(layers[i]).units, f"groups of layer {i}")
                for i, bits in groups.items()
            },
            gains,
        )


def heads_of(layer: Layer) -> Prunable:
    """Return the attention heads of `layer`, whose anatomy must be known."""
    assert layer.attention is not None, "heads of this anatomy are not pruned"
    return layer.attention


def _pack_units(kept: Sequence[int], units: int) -> str:
    bits = np.zeros(units, dtype=np.uint8)
    bits[list(kept)] = 1
    return np.packbits(bits).tobytes().hex()


def _read_units(text: object, units: int, what: str) -> tuple[int, ...]:
    """Invert `_pack_units`; raises `WireError` unless some units stay and some do not."""
    if type(text) is not str or len(text) != 2 * math.ceil(units / 8) or not _HEX.fullmatch(text):
        raise WireError(
            f"proxy manifest: {what}: {text!r:.40} is not one bit for each of {units} in "
            "hexadecimal digits"
        )

    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))
    stay = tuple(np.flatnonzero(bits).tolist())
    if not 0 < len(stay) < units or stay[-1] >= units:
        raise WireError(
            f"proxy manifest: {what}: {len(stay)} of {units} stay, or bits beyond these are set"
        )

    return stay


def by_layer(values: Mapping[str, Any], name: str, layers: Sequence[int]) -> dict[int, Any]:
    """Return an object whose keys are among `layers`, by number; raises `WireError`."""
    entries = values[name]
    numbers = {str(index): index for index in layers}

    if type(entries) is not dict or not entries.keys() <= numbers.keys():
        raise WireError(
            f"proxy manifest: {name}={entries!r:.80}, expected an object with keys among layers "
            f"{layers}"
        )

    return {index: entries[key] for key, index in numbers.items() if key in entries}
