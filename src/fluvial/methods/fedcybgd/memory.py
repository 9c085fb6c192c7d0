"""Bytes of a visit by formula: what travels, and what the client holds while it trains one block.

Sizes are in bytes, counts in parameters. A *width* is bytes per value: 2 for half precision, 4 for
fp32; beta in the method's formulas is the width of the model. The paper moves the trained block in
the model's own type (`block_width` = `width`), we move it in fp32 (`block_width` = 4) or coded.
What frames and headers add to a message is not counted.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, Self

from fluvial.methods.fedcybgd.blocks import Partition, partition
from fluvial.training.train import AT_ONCE
from fluvial.wire.tensors import Layout

Width = Literal[2, 4]


@dataclass(frozen=True)
class Sizes:
    """A model's parameters as one visit parts them."""

    block: int
    """Trained."""
    layers: int
    """Of the other decoder layers."""
    outside: int
    """Of embeddings, norm and head, where they are not the trained block."""

    @classmethod
    def of(cls, parts: Partition, block: int) -> Self:
        """The sizes of a visit to block number `block`; blocks count from 0."""
        others = [other for index, other in enumerate(parts.blocks) if index != block]
        layers = sum(other.numel for other in others if other.layers)
        outside = parts.fixed.numel + sum(other.numel for other in others if not other.layers)
        return cls(parts.blocks[block].numel, layers, outside)

    @classmethod
    def full(cls, parameters: int) -> Self:
        """Full tuning: everything is trained."""
        return cls(parameters, 0, 0)

    @property
    def rest(self) -> int:
        """What is not trained."""
        return self.layers + self.outside

    @property
    def total(self) -> int:
        """All parameters."""
        return self.block + self.rest


class Form(ABC):
    """How a client gets and holds what it does not train."""

    sends_block: ClassVar[bool] = True
    """Whether the trained block is sent as it is, besides what `sent` counts."""

    @abstractmethod
    def sent(self, sizes: Sizes, width: Width) -> int:
        """Download without the trained block."""

    def held(self, sizes: Sizes, width: Width) -> int:
        """In memory for the rest of the model: all of it in the model's type, where the form says
        nothing else."""
        return width * sizes.rest


@dataclass(frozen=True)
class Full(Form):
    """The rest as it is, at every visit."""

    def sent(self, sizes: Sizes, width: Width) -> int:
        """All of the rest."""
        return width * sizes.rest


@dataclass(frozen=True)
class Proxy(Form):
    """The paper's design: of the other layers a share is kept, what is outside them is sent
    whole."""

    kept: float
    """Share of the other layers' parameters, rho; (1 - q)(1 - s) for a share q of layers dropped
    and s pruned."""

    def sent(self, sizes: Sizes, width: Width) -> int:
        """The smaller model, without the trained block."""
        return width * (sizes.outside + round(self.kept * sizes.layers))

    def held(self, sizes: Sizes, width: Width) -> int:
        """What was sent."""
        return self.sent(sizes, width)


@dataclass(frozen=True)
class StaleSubset(Form):
    """The base is installed, and of the blocks updated since then a random share is sent, the
    others stay the base's.

    The released code sends nothing else: its download is `sent` alone. We send the trained block in
    any case; where it is among those drawn, what is really sent is one block less.
    """

    share: float
    """c, over 0 and at most 1."""
    updated: int
    """|U|: blocks updated so far, each as large as the trained one."""

    def sent(self, sizes: Sizes, width: Width) -> int:
        """The drawn blocks."""
        return width * subset_size(self.share, self.updated) * sizes.block


@dataclass(frozen=True)
class LowBit(Form):
    """The rest in few bits; held decoded, unless it is read from disk.

    Vectors, which travel as they are, are counted as if they were coded: of LLaMA-2-7B they are
    0.004 %.
    """

    bits: float
    """Per value, with the scales: 8.25 for int8 and 4.25 for nf4, with one bf16 scale for 64
    values."""
    changed: int | None = None
    """Other blocks, each as large as the trained one, that are not as the client last got them;
    None: it has nothing, and all of the rest is sent."""

    def sent(self, sizes: Sizes, width: Width) -> int:  # noqa: ARG002 - whatever the model's type
        """What changed, coded."""
        return math.ceil(
            self.bits * (sizes.rest if self.changed is None else self.changed * sizes.block) / 8
        )


@dataclass(frozen=True)
class Cache(Form):
    """The base is installed, and the client replays the commits to any block since it last held it.

    This brings the trained block too. Of a block whose commits are larger than itself, the fp32
    change is sent instead.
    """

    sends_block: ClassVar[bool] = False
    visits: int
    """Of all clients, spread evenly over the blocks, since this one's last began, which is in
    general a cycle; before its first, all visits so far."""
    blocks: int
    """Each as large as the trained one."""
    coded: int
    """Of one commit."""

    def sent(self, sizes: Sizes, width: Width) -> int:  # noqa: ARG002 - whatever the model's type
        """The commits, or blocks in fp32."""
        each, more = divmod(self.visits, self.blocks)
        whole = 4 * sizes.block

        return (self.blocks - more) * min(each * self.coded, whole) + more * min(
            (each + 1) * self.coded, whole
        )


@dataclass(frozen=True)
class OnDisk(Form):
    """Another form, of which nothing is held: each weight is read when it is used (hold =
    "disk")."""

    form: Form

    def sent(self, sizes: Sizes, width: Width) -> int:
        """As the form has it."""
        return self.form.sent(sizes, width)

    def held(self, sizes: Sizes, width: Width) -> int:  # noqa: ARG002
        """Nothing; the one weight in use is not counted."""
        return 0


def subset_size(share: float, updated: int) -> int:
    """ceil(share * updated), with `share` as it is written: 0.28 of 25 blocks is 7, though 0.28 *
    25 > 7."""
    assert 0 < share <= 1, "a share over 0 and at most 1"
    return math.ceil(Fraction(str(share)) * updated)


@dataclass(frozen=True)
class VisitBytes:
    """What one visit moves."""

    up: int
    block_down: int
    """The trained block, exact."""
    rest_down: int
    """The rest, in its form."""

    @property
    def down(self) -> int:
        """The whole download."""
        return self.block_down + self.rest_down


def visit_bytes(
    sizes: Sizes, form: Form, *, width: Width, block_width: Width = 4, coded: int | None = None
) -> VisitBytes:
    """Bytes of a visit to a model of `width` whose trained block travels in `block_width`, up as
    `coded` if given."""
    block = block_width * sizes.block
    return VisitBytes(
        block if coded is None else coded, block if form.sends_block else 0, form.sent(sizes, width)
    )


@dataclass(frozen=True)
class ClientMemory:
    """What a client holds while `train.train` tunes a block with AdamW, in bytes.

    Per trained value, for a model in fp32 and in half precision:

                    fp32   half
        weights        4      2
        masters        -      4   fp32, from the first step to the last
        gradient       4      4   in half precision 2 before the step, which turns tensor after tensor into fp32
        moments        8      8   fp32, two
        start          4      4   fp32: what was received, from which the change is taken; in `visit` alone
        workspace      4      4   fp32 root of the second moment, of all tensors at once, only during the step; none
                                  from `train.AT_ONCE` values on, where tensor after tensor is stepped

    Not counted: activations and what autograd saves, one tensor's gradient at a time that is being
    made or converted, messages while they are read or written and updates while they are coded, the
    base under blocks of an adapter, and the libraries.
    """

    frozen: int
    """The rest of the model, in the form held."""
    weights: int
    masters: int
    gradient: int
    moments: int
    workspace: int

    @property
    def states(self) -> int:
        """Without the workspace: of P parameters and b trained ones, none compressed, 4P + 12b in
        fp32, and 2P + 16b in half precision, which is how BAdam counts."""
        return self.frozen + self.weights + self.masters + self.gradient + self.moments

    @property
    def backward(self) -> int:
        """Beside the activations: gradients are still in the model's type, so as large as the
        weights."""
        return self.frozen + 2 * self.weights + self.masters + self.moments

    def peak(self, activations: int = 0) -> int:
        """The most at once, where a backward pass needs `activations` besides: there, or in the
        optimizer's step."""
        return max(self.backward + activations, self.states + self.workspace)

    def visit(self, activations: int = 0) -> int:
        """`peak`, and what was received, which waits to be taken from what was trained."""
        return self.peak(activations) + self.gradient


def client_memory(sizes: Sizes, form: Form, *, width: Width) -> ClientMemory:
    """Memory of a client that trains one block of a model of `width`; with `Sizes.full`, of full
    tuning."""
    fp32 = 4 * sizes.block
    return ClientMemory(
        frozen=form.held(sizes, width),
        weights=width * sizes.block,
        masters=0 if width == 4 else fp32,
        gradient=fp32,
        moments=2 * fp32,
        workspace=fp32 if sizes.block < AT_ONCE else 0,
    )


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes that one process holds as the server and all sites, where all weights are tuned.

    The base lies on disk; what is not trained is mapped from there, once for all sites that measure
    at a time. Not counted: what `ClientMemory` does not count, and up to 0.2 GB that the allocator
    keeps.
    """

    visit: int
    """A site in its visit: `ClientMemory.visit`."""
    state: int
    """The server's changes, fp32, of the blocks that have moved."""
    log: int
    """The frames of one commit to each of these; more are kept as long as they are smaller than
    their block."""
    merge: int
    """Folding one answer: the decoded update, flattened, two fp64 sums and the mean, of one
    block."""
    evaluate: int
    """Measuring: the base once, the message, and for each site at a time the changes it read and
    put into a model."""

    @property
    def server(self) -> int:
        """Held all the time."""
        return self.state + self.log

    @property
    def peak(self) -> int:
        """The most at once."""
        return self.server + max(self.visit, self.merge, self.evaluate)


def process_memory(
    sizes: Sizes, form: Form, *, width: Width, moved: int, coded: int, workers: int
) -> ProcessMemory:
    """Memory of one process with all sites, of which `workers` measure at a time, once `moved`
    blocks have moved.

    `coded` is the bytes of one commit; every block counts as large as the trained one.
    """
    changes = 4 * min(moved * sizes.block, sizes.total)
    return ProcessMemory(
        visit=client_memory(sizes, form, width=width).visit(),
        state=changes,
        log=moved * coded,
        merge=28 * sizes.block,
        evaluate=width * sizes.total + changes + workers * (changes + width * changes // 4),
    )


def badam_bytes(parameters: int, blocks: int) -> float:
    """2M + 16M / D: BAdam's estimate (Luo et al., NeurIPS 2024, https://arxiv.org/abs/2404.02827),
    as if the D blocks were the whole model; `ClientMemory.states` has the block's own size in place
    of M / D."""
    return 2 * parameters + 16 * parameters / blocks


def mixed_adam_bytes(parameters: int) -> int:
    """18M: BAdam's estimate for full tuning with Adam in mixed precision."""
    return 18 * parameters


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
    """Bytes and memory of a visit to a decoder layer, for models in half precision and every form
    of download.

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
