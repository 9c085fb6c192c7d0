"""Check of a codec of the caller's own: one update is coded and decoded before the run."""

import math

import torch

from fluvial.codecs import CODECS, CodecSettings
from fluvial.codecs.base import Codec, LearnedCodec
from fluvial.errors import ConfigError, WireError, wrong_return
from fluvial.seeds import generator
from fluvial.wire.frame import OVERHEAD
from fluvial.wire.tensors import Layout, Named, cosine

MOST_VALUES = 2**20
"""Values of the update that is coded; of a larger layout the first tensors are taken."""

DRAWS = 4
"""Updates that are coded."""

LEAST_SIGMAS = 4.0
"""Standard deviations by which the mean cosine of an update and its decoded form must exceed that
of independent updates, which is 0 with a deviation of 1 / sqrt(values * draws)."""


def check_own(settings: CodecSettings, layout: Layout) -> None:
    """Raise `ConfigError` for a codec whose frames are not as it says, or decode to another update.

    A codec that learns is measured by its gate instead, after its fit.
    """
    codec_type = CODECS[settings.name]
    size: object = codec_type.frame_size(settings, layout)
    name = f"codec {settings.name!r}"
    if not isinstance(size, int) or isinstance(size, bool) or size < OVERHEAD:
        expected = f"a whole number of bytes, at least {OVERHEAD}"
        raise ConfigError(wrong_return(f"frame_size of {name}", size, expected))

    if issubclass(codec_type, LearnedCodec):
        return

    sample = _sample(layout)
    codec = codec_type(settings, sample)
    source = generator(0, "codec of one's own")
    cosines = []
    for _ in range(DRAWS):
        update = sample.unflatten(torch.randn(sample.numel, generator=source))
        frame = codec.encode(update, seed=1, round=1)
        _check_frame(codec, frame, update, sample)
        try:
            cosines.append(cosine(update, codec.decode(frame, round=1)))
        except WireError as error:
            raise ConfigError(f"{name}: parse refuses what body made: {error}") from error

    likeness = sum(cosines) / DRAWS
    if not likeness > LEAST_SIGMAS / math.sqrt(sample.numel * DRAWS):
        raise ConfigError(
            f"{name}: what parse returns has a cosine of {likeness:.3g} with the update that body "
            "coded, no more than two updates without relation; parse must invert body"
        )


def _check_frame(codec: Codec, frame: bytes, update: Named, layout: Layout) -> None:
    """Raise `ConfigError` for a frame of another size than the codec says, or another one for the
    same update and seed."""
    name = f"codec {codec.settings.name!r}"
    most = codec.frame_size(codec.settings, layout)
    if len(frame) > most or (codec.exact and len(frame) != most):
        bound = "exactly" if codec.exact else "at most"
        raise ConfigError(
            f"{name}: a frame has {len(frame)} bytes, and frame_size says {bound} {most}; mend one "
            "of the two"
        )

    if codec.encode(update, seed=1, round=1) != frame:
        raise ConfigError(
            f"{name}: encoding the same update twice with one seed gives other bytes, so no run "
            "could be repeated or resumed; draw random numbers from the argument `seed` alone"
        )


def _sample(layout: Layout) -> Layout:
    """Return the layout, or as many of its first tensors as have at most `MOST_VALUES` values."""
    if layout.numel <= MOST_VALUES:
        return layout

    shapes = layout.shapes[:1]
    while Layout(layout.shapes[: len(shapes) + 1]).numel <= MOST_VALUES:
        shapes = layout.shapes[: len(shapes) + 1]

    return Layout(shapes)
