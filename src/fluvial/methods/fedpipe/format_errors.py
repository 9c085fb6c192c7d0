"""Relative errors of the base's weights in quantised formats, by decoder layer, at a site."""

import threading
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import nn

from fluvial.models.pool import ModelPool
from fluvial.models.quantisation import Format
from fluvial.models.quantised import layers_of_coded, lost
from fluvial.models.split import decoder_layers

_LOCK = threading.Lock()
_KNOWN: WeakKeyDictionary[ModelPool, dict[str, tuple[float, ...]]] = WeakKeyDictionary()
"""Errors by pool and format; the sites of one process share a pool, and measure once."""
DIGITS = 4
"""Significant digits of an error."""


def layer_errors(pool: ModelPool, formats: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return ||W - Q(W)|| / ||W|| over the linear weights of each decoder layer, by format.

    Weights are read from disk one at a time, also where the base in memory is quantised; the
    correction of a quantised weight counts.
    """
    with _LOCK:
        known = _KNOWN.setdefault(pool, {})
        missing = [kind for kind in formats if kind not in known]
        if missing:
            known |= _measured(pool, missing)
        return {kind: known[kind] for kind in formats}


def _measured(pool: ModelPool, formats: Sequence[str]) -> dict[str, tuple[float, ...]]:
    layers = layers_of_coded(pool.outline.base)
    count = len(decoder_layers(pool.outline.base)[1])
    whole = [0.0] * count
    missing = {kind: [0.0] * count for kind in formats}
    for name, layer in layers.items():
        weight = pool.base.get(f"{name}.weight").to(pool.device)
        module: Any = pool.outline.base.get_submodule(name)
        if not isinstance(module, nn.Linear):
            weight = weight.t()  # transformers' Conv1D
        whole[layer] += float(weight.double().square().sum())
        for kind, sums in missing.items():
            sums[layer] += lost(weight, cast(Format, kind), pool.config.quantization_correction)

    return {
        kind: tuple(
            float(f"{(part / all_of_it) ** 0.5 if all_of_it else 0.0:.{DIGITS}g}")
            for part, all_of_it in zip(sums, whole, strict=True)
        )
        for kind, sums in missing.items()
    }
