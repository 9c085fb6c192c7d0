"""Table of bytes and memory of a visit, for models in half precision and every form of download."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fluvial.methods.fedcybgd.blocks import partition
from fluvial.methods.fedcybgd.memory import badam_bytes, client_memory
from fluvial.methods.fedcybgd.visit_sizes import (
    Cache,
    Form,
    Full,
    LowBit,
    Proxy,
    Sizes,
    StaleSubset,
    visit_bytes,
)
from fluvial.wire.tensors import Layout


@dataclass(frozen=True)
class ShapeRow:
    """A model in half precision and one form of download; of unequal blocks the largest."""

    model: str
    form: str
    parameters: int
    blocks: int
    block: int
    fixed: int
    """Parameters that no block has."""
    up_half: int
    """The paper's upload: the block in half precision."""
    up_fp32: int
    """The block's change in fp32."""
    up_coded: int
    """The block's change, coded."""
    down_half: int
    """With the trained block in half precision, as in the paper."""
    down_fp32: int
    """With the trained block in fp32."""
    memory: int
    """`ClientMemory.states`."""
    peak: int
    """`ClientMemory.peak` without activations."""
    full_memory: int
    """`ClientMemory.states` of full tuning."""
    badam: float
    """`badam_bytes`."""


def shape_table(
    layouts: Mapping[str, Layout],
    *,
    coded_bits: float,
    kept: float = 0.5,
    share: float = 0.5,
    bits: float = 4.25,
    visits: int = 64,
) -> list[ShapeRow]:
    """Return the bytes and memory of a visit to a decoder layer, for models in half precision and
    every form of download.

    A coded change takes `coded_bits` per value. `kept` is of `Proxy`, `share` of `StaleSubset` once
    all blocks are updated, `bits` of `LowBit` at a first visit; a client of `Cache` comes back
    after `visits`, 64 being a cycle of the paper's LLaMA run.
    """
    rows = []
    for model, layout in layouts.items():
        parts = partition(layout)
        largest = max(range(len(parts)), key=lambda index: parts.blocks[index].numel)
        sizes = Sizes.of(parts, largest)
        coded = math.ceil(coded_bits * sizes.block / 8)
        forms: dict[str, Form] = {
            "full": Full(),
            "proxy": Proxy(kept),
            "stale-subset": StaleSubset(share, len(parts)),
            "low-bit": LowBit(bits),
            "cache": Cache(visits, len(parts), coded),
        }

        for name, form in forms.items():
            half = visit_bytes(sizes, form, width=2, block_width=2)
            ours = visit_bytes(sizes, form, width=2)
            memory = client_memory(sizes, form, width=2)
            rows.append(
                ShapeRow(
                    model=model,
                    form=name,
                    parameters=sizes.total,
                    blocks=len(parts),
                    block=sizes.block,
                    fixed=parts.fixed.numel,
                    up_half=half.up,
                    up_fp32=ours.up,
                    up_coded=visit_bytes(sizes, form, width=2, coded=coded).up,
                    down_half=half.down,
                    down_fp32=ours.down,
                    memory=memory.states,
                    peak=memory.peak(),
                    full_memory=client_memory(Sizes.full(sizes.total), Full(), width=2).states,
                    badam=badam_bytes(sizes.total, len(parts)),
                )
            )

    return rows
