"""Bits by layer: two formats for one base, the smaller one in the layers that bear it best.

It is our concretisation of the specification's mixed precision. The error of a base is

    err = sum over layers of w_l err_l(format of l)

where err_l = ||W - Q(W)|| / ||W|| over the weights of a layer is measured at the site, and w_l is
the layer's share of the importance scores. Of two formats, a layer's sensitivity is what the
smaller one adds to err for each byte that it saves; the first k layers in this order have the
smaller one. Where layers have equal bytes, no other k layers have a smaller error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations

from fluvial.methods.fedpipe.planner.candidates import Candidate
from fluvial.methods.fedpipe.planner.formats import FORMATS, Format
from fluvial.methods.fedpipe.planner.memory import layer_bytes, value_bytes
from fluvial.methods.fedpipe.planner.sizes import Sizes

Errors = Mapping[str, Sequence[float]]
"""Relative errors of each layer's weights, by quantised format."""


def shares_of_layers(candidates: Sequence[Candidate], count: int) -> tuple[float, ...]:
    """Return each decoder layer's share of the importance, of sum 1; equal shares where no
    candidate in a layer has any."""
    shares = [0.0] * count
    for candidate in candidates:
        if 0 <= candidate.layer < count:
            shares[candidate.layer] += candidate.score

    total = sum(shares)
    return tuple(share / total if total > 0 else 1 / count for share in shares)


def with_error(format: Format, errors: Errors, shares: Sequence[float]) -> Format:
    """Return a format with the error that its layers have together."""
    kinds = format.by_layer(len(shares))
    error = 0.0
    for layer, (kind, share) in enumerate(zip(kinds, shares, strict=True)):
        error += share * error_of(kind, errors, layer)
    return replace(format, error=error)


def error_of(kind: str, errors: Errors, layer: int) -> float:
    """Return the relative error of a layer in a format: as measured, else that of normal
    weights."""
    return errors[kind][layer] if kind in errors else FORMATS[kind].error


def mixtures(
    formats: Sequence[Format],
    sizes: Sizes,
    errors: Errors,
    shares: Sequence[float],
    groups: int,
) -> list[Format]:
    """Return the mixtures of any two formats, the smaller one of which is quantised.

    The layers of a mixture's smaller format are the least sensitive ones, as many as one or more of
    `groups` equal groups have, and not all.
    """
    mixed = []
    for large, small in permutations(formats, 2):
        saved = saved_bytes(large, small, sizes)
        if not small.quantised or min(saved) < 0 or not any(saved):
            continue

        order = least_sensitive(large, small, saved, errors, shares)
        counts = {round(group * len(order) / groups) for group in range(1, groups)}
        for count in sorted(counts - {0, len(order)}):
            kinds = [large.name] * sizes.layers
            for layer in order[:count]:
                kinds[layer] = small.name
            mixed.append(replace(large, layers=tuple(enumerate(kinds))))
    return mixed


def saved_bytes(large: Format, small: Format, sizes: Sizes) -> list[int]:
    """Return the bytes that each layer saves in the smaller one of two formats."""
    width = value_bytes(sizes, large)
    return [
        layer_bytes(sizes, layer, large.name, width) - layer_bytes(sizes, layer, small.name, width)
        for layer in range(sizes.layers)
    ]


def least_sensitive(
    large: Format, small: Format, saved: Sequence[int], errors: Errors, shares: Sequence[float]
) -> list[int]:
    """Return the layers that save bytes in the smaller format, those first that add the least error
    for each byte; of equal ones the first layer."""
    added = {
        layer: share
        * (error_of(small.name, errors, layer) - error_of(large.name, errors, layer))
        / saved[layer]
        for layer, share in enumerate(shares)
        if saved[layer]
    }
    return sorted(added, key=lambda layer: (added[layer], layer))
