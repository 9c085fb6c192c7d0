"""Weights in few bits: matrices as codec frames, vectors as they are."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fluvial.codecs import Codec, CodecSettings, build
from fluvial.errors import WireError
from fluvial.methods.fedcybgd.blocks import Partition
from fluvial.methods.fedcybgd.download import LowBitDownload
from fluvial.methods.fedcybgd.download.holder import (
    Holder,
    Overlay,
    check_tensors,
    held_weights,
    layouts_of,
)
from fluvial.models.weight_sources import MemorySource, Source
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named


def coded(weights: Named, settings: CodecSettings) -> Named:
    """Return the matrices as codec frames of their own (1-D uint8), vectors as they are."""
    return {
        name: tensor
        if tensor.dim() < 2
        else torch.frombuffer(
            bytearray(matrix_codec(settings, name, tensor.shape).encode({name: tensor})),
            dtype=torch.uint8,
        )
        for name, tensor in weights.items()
    }


def matrix_codec(settings: CodecSettings, name: str, shape: Iterable[int]) -> Codec:
    """Return the codec of one matrix, which is a frame of its own."""
    return build(settings, Layout(((name, tuple(shape)),)))


def decode_others(
    config: LowBitDownload,
    holder: Holder,
    tensors: Named,
    versions: list[Any],
    parts: Partition,
    index: int,
) -> Source | None:
    """Return all parts but the trained one: from the message, or as the site keeps them; None if it
    keeps another version."""
    layouts = layouts_of(parts)
    if len(versions) != len(layouts):
        raise WireError(f"visit: versions of {len(versions)} parts, expected {len(layouts)}")

    unknown = tensors.keys() - {name for layout in layouts for name in layout.names}
    if unknown:
        raise WireError(f"visit: tensors of no block, first {sorted(unknown)[:2]}")

    kinds = holder.pool.outline.dtypes
    shapes = dict(holder.pool.layout.shapes)

    def decode(name: str, frame: bytes) -> Tensor:
        weight: Tensor = (
            matrix_codec(config.codec, name, shapes[name]).decode(frame)[name].to(kinds[name])
        )
        return weight

    sources: list[Source] = []
    for number, layout in enumerate(layouts):
        if number == index or not layout.names:
            continue

        received = {name: tensors[name] for name in layout.names if name in tensors}
        if received:
            check_tensors(
                {
                    name: _vector_or_frame(name, tensor, layout, decode)
                    for name, tensor in received.items()
                },
                dict(layout.shapes),
                kinds,
            )
            holder.keep(
                f"rest-{number}", Payload(received, {"version": versions[number]}), draft=True
            )

        version, rest = held_weights(holder, f"rest-{number}", decode)
        if rest is None or version != versions[number]:
            return None

        sources.append(rest)

    return Overlay(MemorySource({}), sources)


def _vector_or_frame(
    name: str, tensor: Tensor, layout: Layout, decode: Callable[[str, bytes], Tensor]
) -> Tensor:
    """Return what a tensor of a low-bit message stands for; raises `WireError` for a frame that
    cannot be decoded."""
    if len(dict(layout.shapes)[name]) < 2:
        return tensor
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise WireError(
            f"visit: {name!r} is {tensor.dtype} with {tensor.dim()} axes, expected a coded matrix"
        )

    return decode(name, tensor.numpy().tobytes())
