"""Forecast of the length of a frame, before anything is trained, for a model of any size."""

from functools import lru_cache

import torch

from fluvial.codecs import CODECS, CodecSettings, build
from fluvial.codecs.auto import AutoSettings
from fluvial.codecs.base import LearnedCodec
from fluvial.errors import ConfigError
from fluvial.wire.tensors import Layout

TYPICAL_UPDATE = 1e-3
"""Root mean square of the values of an update that is coded to see how long it becomes."""
MEASURED = 2**18
"""Values up to which the update itself is coded; above, one whose tensors are that much smaller."""


def frame_size(settings: CodecSettings, layout: Layout) -> int:
    """Return the bytes of one coded update, in time and memory that do not grow with the values.

    Computed where they follow from the layout. Else an update of typical size is coded, or, of a
    large layout, one of smaller tensors, whose share of the bytes that a frame has at most is then
    the large one's. Raises `ConfigError` if the layout cannot be coded.
    """
    if isinstance(settings, AutoSettings):
        return int(layout.raw_bytes / settings.target(layout))

    kind = CODECS[settings.name]
    most = kind.frame_size(settings, layout)
    if kind.exact or issubclass(kind, LearnedCodec):
        return most
    if layout.numel <= MEASURED:
        return _measured(settings, layout)

    small = shrunk(layout, MEASURED)
    try:
        return round(
            most * _measured(settings, small, even=True) / kind.frame_size(settings, small)
        )
    except (
        ConfigError
    ):  # the small one has no room for the headers of its tensors, so the large one is filled
        return most


def shrunk(layout: Layout, numel: int) -> Layout:
    """Return a layout of about `numel` values with the same tensors, each smaller by the same
    share."""
    share = numel / layout.numel
    return Layout(tuple((name, _shorter(shape, share)) for name, shape in layout.shapes))


def _shorter(shape: tuple[int, ...], share: float) -> tuple[int, ...]:
    """Return `shape` with `share` of its values, at least one; no axis vanishes, the longer ones
    make up for it."""
    sides = list(shape)
    left = share

    for place, axis in enumerate(sorted(range(len(shape)), key=lambda axis: shape[axis])):
        sides[axis] = max(1, round(shape[axis] * left ** (1 / (len(shape) - place))))
        left *= shape[axis] / sides[axis]

    return tuple(sides)


@lru_cache(256)
def _measured(settings: CodecSettings, layout: Layout, *, even: bool = False) -> int:
    """Return the bytes of a random update; with `even` all tensors have the same RMS, as large ones
    would."""
    random = torch.Generator().manual_seed(0)
    update = {
        name: TYPICAL_UPDATE * torch.randn(shape, generator=random) for name, shape in layout.shapes
    }

    if even:
        update = {
            name: tensor * (TYPICAL_UPDATE / tensor.square().mean().sqrt())
            for name, tensor in update.items()
        }

    return len(build(settings, layout).encode(update))
