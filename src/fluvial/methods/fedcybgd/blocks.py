"""A model's weights, or its adapter's factors, as blocks that are trained one at a time.

The blocks follow from the names: a decoder layer is what stands under one number, as
`model.layers.3.` in Llama, Qwen, Mistral and GLM-4, `transformer.h.3.` in GPT-2, or
`transformer.encoder.layers.3.` in ChatGLM.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fluvial.errors import ConfigError
from fluvial.wire.tensors import Layout

Extra = Literal["embeddings", "norm", "head"]
"""Parameters outside the layers: token and position embeddings, the final norm, an output head that
is not tied."""

_NUMBERED = re.compile(r"(.*?\.)(\d+)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|output_layer|embed_out|score|classifier)\.")


@dataclass(frozen=True)
class Block:
    """Parameters that are trained together."""

    name: str
    layers: tuple[int, ...]
    """The decoder layers in it, by number; none for an extra block."""
    layout: Layout

    @property
    def numel(self) -> int:
        """Values in it."""
        return self.layout.numel


@dataclass(frozen=True)
class Partition:
    """Disjoint blocks and the fixed rest; together they are the layout."""

    blocks: tuple[Block, ...]
    fixed: Layout
    """Parameters that no block has; they are never trained."""
    prefix: str
    """Beginning of a name before the layer's number, as `model.layers.`."""
    num_layers: int

    def __len__(self) -> int:
        return len(self.blocks)


def partition(
    layout: Layout, *, extra: Sequence[Extra] = (), layers_per_block: int = 1, whole: bool = False
) -> Partition:
    """Return the blocks of consecutive decoder layers, bottom up, then those `extra` ones that are
    asked for.

    `whole` makes one block of everything. Raises `ConfigError` where there are no layers, or
    nothing of an extra kind.
    """
    assert layers_per_block >= 1, "a block has a layer"
    prefix = _stack(layout)
    numbers: dict[str, int] = {}

    for name in layout.names:
        match = _NUMBERED.match(name)
        if match and match[1] == prefix:
            numbers[name] = int(match[2])

    layers = sorted(set(numbers.values()))
    if whole:
        everything = Block("model", tuple(layers), layout)
        return Partition((everything,), Layout(()), prefix, len(layers))

    blocks = []
    for start in range(0, len(layers), layers_per_block):
        inside = layers[start : start + layers_per_block]
        title = f"layer {inside[0]}" if len(inside) == 1 else f"layers {inside[0]} to {inside[-1]}"
        blocks.append(
            Block(
                title,
                tuple(inside),
                _part(layout, {n for n, at in numbers.items() if at in inside}),
            )
        )

    outside = {name: _kind(name, shape) for name, shape in layout.shapes if name not in numbers}
    for kind in dict.fromkeys(extra):
        names = {name for name, match in outside.items() if match == kind}
        if not names:
            there = ", ".join(sorted(set(outside.values()))) or "nothing but layers"
            raise ConfigError(
                f"method.extra: there is no {kind!r} to train (a tied head is part of the "
                f"embeddings); found {there}"
            )

        blocks.append(Block(kind, (), _part(layout, names)))

    taken = {name for block in blocks for name in block.layout.names}
    return Partition(tuple(blocks), _part(layout, set(layout.names) - taken), prefix, len(layers))


def _stack(layout: Layout) -> str:
    """Return the prefix of the layers: of all numbered groups the one with the most values."""
    sizes: Counter[str] = Counter()
    for name, shape in layout.shapes:
        match = _NUMBERED.match(name)
        if match:
            sizes[match[1]] += math.prod(shape)

    if not sizes:
        raise ConfigError(
            "the model has no numbered layers, such as 'model.layers.0.', that could be blocks; "
            "use order = 'full'"
        )

    return sizes.most_common(1)[0][0]


def _kind(name: str, shape: tuple[int, ...]) -> Extra:
    if _HEAD.search(name):
        return "head"
    return "norm" if len(shape) < 2 else "embeddings"


def _part(layout: Layout, names: set[str]) -> Layout:
    return Layout(tuple(entry for entry in layout.shapes if entry[0] in names))
