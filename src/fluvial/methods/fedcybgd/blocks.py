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
from itertools import accumulate, pairwise
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
    layout: Layout,
    *,
    extra: Sequence[Extra] = (),
    layers_per_block: int = 1,
    num_blocks: int | None = None,
    whole: bool = False,
) -> Partition:
    """Return the blocks of consecutive decoder layers, bottom up, then those `extra` ones that are
    asked for.

    With `num_blocks` the layers and `extra` are cut into that many blocks instead, between the
    matrices of a layer too, such that the largest block is as small as can be. `whole` makes one
    block of everything. Raises `ConfigError` where there are no layers, nothing of an extra kind,
    or too little for so many blocks.
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

    outside = {name: _kind(name, shape) for name, shape in layout.shapes if name not in numbers}
    _check_extra(extra, set(outside.values()))
    if num_blocks is not None:
        units = _units(layout, prefix, numbers, {n for n, kind in outside.items() if kind in extra})
        cut = _balanced(layout, units, numbers, num_blocks)
        return _with_rest(cut, layout, prefix, len(layers))

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

    for kind in dict.fromkeys(extra):
        names = {name for name, match in outside.items() if match == kind}
        blocks.append(Block(kind, (), _part(layout, names)))

    return _with_rest(blocks, layout, prefix, len(layers))


def _check_extra(extra: Sequence[Extra], there: set[Extra]) -> None:
    for kind in extra:
        if kind not in there:
            found = ", ".join(sorted(there)) or "nothing but layers"
            raise ConfigError(
                f"method.extra: there is no {kind!r} to train (a tied head is part of the "
                f"embeddings); found {found}"
            )


def _with_rest(blocks: Sequence[Block], layout: Layout, prefix: str, layers: int) -> Partition:
    taken = {name for block in blocks for name in block.layout.names}
    return Partition(tuple(blocks), _part(layout, set(layout.names) - taken), prefix, layers)


def _units(
    layout: Layout, prefix: str, numbers: dict[str, int], others: set[str]
) -> dict[str, list[str]]:
    """Return the names of each matrix and norm of a layer, and of each kind of `others`, bottom up:
    the embeddings, every layer's attention and MLP with the norms around them, the norm, the head.
    What stands deeper than a matrix, as experts do, is not cut."""
    found: dict[tuple[int, int, str], list[str]] = {}
    for name, shape in layout.shapes:
        if name in numbers:
            words = name.removeprefix(f"{prefix}{numbers[name]}.").split(".")
            module = ".".join(words[:-1][:2]) or words[0]
            key = (numbers[name], _place_in_layer(words[0]), f"layer {numbers[name]} {module}")
            found.setdefault(key, []).append(name)
        elif name in others:
            kind = _kind(name, shape)
            place = -1 if kind == "embeddings" else max(numbers.values()) + 1
            found.setdefault((place, int(kind == "head"), kind), []).append(name)

    return {key[2]: found[key] for key in sorted(found, key=lambda key: key[:2])}


def _place_in_layer(module: str) -> int:
    """Return the place of a module in its layer, by the names that architectures use: norm before
    the attention 0, attention 1, norm between attention and MLP 2, MLP 3, norm after it 4."""
    name = module.lower()
    if not (name.startswith("ln") or "norm" in name):
        return 1 if "att" in name else 3
    if "post_f" in name or "post_mlp" in name:
        return 4
    between = ("post_att", "ln_2", "ln2", "pre_f", "pre_mlp", "ffn_norm", "mlp_norm")
    return 2 if any(part in name for part in between) else 0


def _balanced(
    layout: Layout, units: dict[str, list[str]], numbers: dict[str, int], count: int
) -> list[Block]:
    """Return `count` blocks of consecutive units, in the order of the layout."""
    if count > len(units):
        raise ConfigError(
            f"method.num_blocks={count}: the model has {len(units)} modules to train; choose at "
            "most as many"
        )

    titles = list(units)
    sizes = [_part(layout, set(names)).numel for names in units.values()]
    blocks = []

    for start, end in pairwise((0, *_cuts(sizes, count))):
        names = {name for title in titles[start:end] for name in units[title]}
        inside = sorted({numbers[name] for name in names if name in numbers})
        title = titles[start] if end - start == 1 else f"{titles[start]} to {titles[end - 1]}"
        blocks.append(Block(title, tuple(inside), _part(layout, names)))

    return blocks


def _cuts(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the ends of `count` runs of consecutive sizes whose largest sum is the least."""
    total = [0, *accumulate(sizes)]
    ends = range(1, len(sizes) + 1)
    best: dict[int, tuple[int, tuple[int, ...]]] = {end: (total[end], (end,)) for end in ends}

    for runs in range(2, count + 1):
        best = {
            end: min(
                (max(best[start][0], total[end] - total[start]), (*best[start][1], end))
                for start in range(runs - 1, end)
            )
            for end in range(runs, len(sizes) + 1)
        }

    return best[len(sizes)][1]


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


def is_sparse(block: Block, layout: Layout) -> bool:
    """Return whether an update of a block of the `layout` changes the rows of a site's tokens
    alone: embeddings without a layer, of a model whose head is not tied to them."""
    kinds = {_kind(name, shape) for name, shape in block.layout.shapes}
    untied = any(map(_HEAD.search, layout.names))
    return untied and not block.layers and "embeddings" in kinds and "head" not in kinds


def _part(layout: Layout, names: set[str]) -> Layout:
    return Layout(tuple(entry for entry in layout.shapes if entry[0] in names))
