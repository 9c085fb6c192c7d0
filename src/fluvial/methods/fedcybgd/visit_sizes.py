"""Bytes that one visit moves, by formula, for every form of download.

Sizes are in bytes, counts in parameters. A *width* is bytes per value: 2 for half precision, 4 for
fp32; beta in the method's formulas is the width of the model. The paper moves the trained block in
the model's own type (`block_width` = `width`), we move it in fp32 (`block_width` = 4) or coded.
What frames and headers add to a message is not counted.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, Self

from fluvial.methods.fedcybgd.blocks import Partition

Width = Literal[2, 4]


@dataclass(frozen=True)
class Sizes:
    """A model's parameters as one visit parts them."""

    block: int
    """Parameters of the trained block."""
    layers: int
    """Parameters of the other decoder layers."""
    outside: int
    """Parameters of embeddings, norm and head, where they are not the trained block."""

    @classmethod
    def of(cls, parts: Partition, block: int) -> Self:
        """Return the sizes of a visit to block number `block`; blocks count from 0."""
        others = [other for index, other in enumerate(parts.blocks) if index != block]
        layers = sum(other.numel for other in others if other.layers)
        outside = parts.fixed.numel + sum(other.numel for other in others if not other.layers)
        return cls(parts.blocks[block].numel, layers, outside)

    @classmethod
    def full(cls, parameters: int) -> Self:
        """Return the sizes of full tuning: everything is trained."""
        return cls(parameters, 0, 0)

    @property
    def rest(self) -> int:
        """Parameters that are not trained."""
        return self.layers + self.outside

    @property
    def total(self) -> int:
        """All parameters."""
        return self.block + self.rest


class Form(ABC):
    """A form in which a client gets and holds the parameters that it does not train."""

    sends_block: ClassVar[bool] = True
    """True where the trained block is sent as it is, besides what `sent` counts."""

    @abstractmethod
    def sent(self, sizes: Sizes, width: Width) -> int:
        """Return the bytes of a download without the trained block."""

    def held(self, sizes: Sizes, width: Width) -> int:
        """Return the bytes in memory for the rest of the model: all of it in the model's type,
        where the form says nothing else."""
        return width * sizes.rest


@dataclass(frozen=True)
class Full(Form):
    """The rest as it is, at every visit."""

    def sent(self, sizes: Sizes, width: Width) -> int:
        """Return the bytes of all the rest."""
        return width * sizes.rest


@dataclass(frozen=True)
class Proxy(Form):
    """The paper's design: of the other layers a share is kept, what is outside them is sent
    whole."""

    kept: float
    """Share of the other layers' parameters, rho; (1 - q)(1 - s) for a share q of layers dropped
    and s pruned."""

    def sent(self, sizes: Sizes, width: Width) -> int:
        """Return the bytes of the smaller model, without the trained block."""
        return width * (sizes.outside + round(self.kept * sizes.layers))

    def held(self, sizes: Sizes, width: Width) -> int:
        """Return the bytes of what was sent."""
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
        """Return the bytes of the drawn blocks."""
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
        """Return the bytes of what changed, coded."""
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
    """Visits of all clients, spread evenly over the blocks, since this client's last visit began,
    which is in general a cycle; before its first, all visits so far."""
    blocks: int
    """Number of blocks, each as large as the trained one."""
    coded: int
    """Bytes of one commit."""

    def sent(self, sizes: Sizes, width: Width) -> int:  # noqa: ARG002 - whatever the model's type
        """Return the bytes of the commits, or of blocks in fp32."""
        visits_each, more = divmod(self.visits, self.blocks)
        whole = 4 * sizes.block

        return (self.blocks - more) * min(visits_each * self.coded, whole) + more * min(
            (visits_each + 1) * self.coded, whole
        )


@dataclass(frozen=True)
class OnDisk(Form):
    """Another form, of which nothing is held: each weight is read when it is used (hold =
    "disk")."""

    form: Form

    def sent(self, sizes: Sizes, width: Width) -> int:
        """Return the bytes of the form that is read from disk."""
        return self.form.sent(sizes, width)

    def held(self, sizes: Sizes, width: Width) -> int:  # noqa: ARG002
        """Return 0: the one weight in use is not counted."""
        return 0


def subset_size(share: float, updated: int) -> int:
    """Return ceil(share * updated), with `share` as it is written: 0.28 of 25 blocks is 7, though
    0.28 * 25 > 7."""
    assert 0 < share <= 1, "a share over 0 and at most 1"
    return math.ceil(Fraction(str(share)) * updated)


@dataclass(frozen=True)
class VisitBytes:
    """Bytes that one visit moves."""

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
    """Return the bytes of a visit to a model of `width` whose trained block travels in
    `block_width`, up as `coded` if given."""
    block = block_width * sizes.block
    return VisitBytes(
        block if coded is None else coded, block if form.sends_block else 0, form.sent(sizes, width)
    )
