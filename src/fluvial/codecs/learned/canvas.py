"""Phi of CG-FedLLM: the LoRA factors of a model as one matrix, or a few, and its exact inverse."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fluvial.errors import ConfigError
from fluvial.wire.tensors import Layout, factor

Mode = Literal["square", "grouped"]

_FIRST = ("q_proj", "k_proj", "v_proj", "o_proj")  # the paper's targets, in the paper's order
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Slot:
    """The place of one factor: the column block `column : column + rank` of canvas `group`."""

    name: str
    group: int
    column: int
    rank: int
    rows: int
    position: int
    """Index of the tensor in the layout."""
    transposed: bool
    """A (rank, in) stands transposed, B (out, rank) as it is."""


class Canvas:
    """The places of all factors. Raises `ConfigError` naming the tensor that does not fit.

    Column order `layer_major_qkvo_AtB`: for each layer, for each target (q, k, v, o, then others by
    name), A^T then B. With M targets of rank r in every layer, layer l, target m, factor f (A 0, B
    1) and rank j have column ((l*M + m)*2 + f)*r + j. The paper gives the shape, the order is ours.
    Mode "square" is the paper's: every factor has d rows; d and the width W are multiples of
    2^stages. Mode "grouped" is ours: one canvas for every number of rows, zero-padded at the bottom
    and at the right. The latent grid (rows, cols) / 2^stages is at least 2x2, which reflection
    padding needs.
    """

    def __init__(self, layout: Layout, mode: Mode, stages: int) -> None:
        self.layout = layout
        self.mode = mode
        self.stages = stages

        if not layout.shapes:
            raise ConfigError("codec: the adapter has no tensors")

        for name, shape in layout.shapes:
            if factor(name) is None or len(shape) != 2:
                raise ConfigError(
                    f"codec: {name!r} with shape {shape} is no LoRA factor; only A and B have a "
                    "canvas"
                )

        self.slots = self._place()
        self.shapes: list[tuple[int, int]] = []
        """(rows, cols) of every canvas, padding included."""

        for rows, cols in zip(self._rows, self._cols, strict=True):
            self._check(rows, cols)
            self.shapes.append((self._padded(rows), self._padded(cols)))

    @property
    def numel(self) -> int:
        """Cells of all canvases, padding included."""
        return sum(rows * cols for rows, cols in self.shapes)

    def pack(self, vector: Tensor) -> list[Tensor]:
        """Return the canvases (rows, cols) of a flattened update (numel,)."""
        pieces = torch.split(vector, list(self.layout.sizes))
        canvases = [vector.new_zeros(shape) for shape in self.shapes]

        for slot in self.slots:
            piece = pieces[slot.position]
            block = (
                piece.view(slot.rank, slot.rows).T
                if slot.transposed
                else piece.view(slot.rows, slot.rank)
            )
            canvases[slot.group][: slot.rows, slot.column : slot.column + slot.rank] = block

        return canvases

    def unpack(self, canvases: list[Tensor]) -> Tensor:
        """Invert `pack`, bit for bit; what stands in the padding is dropped."""
        pieces: list[Tensor] = [torch.empty(0)] * len(self.slots)
        for slot in self.slots:
            block = canvases[slot.group][: slot.rows, slot.column : slot.column + slot.rank]
            pieces[slot.position] = (block.T if slot.transposed else block).reshape(-1)

        return torch.cat(pieces)

    @cached_property
    def _rows(self) -> list[int]:
        """Rows of every canvas before padding, ascending."""
        return sorted({slot.rows for slot in self.slots})

    @cached_property
    def _cols(self) -> list[int]:
        """Columns of every canvas before padding."""
        return [
            sum(slot.rank for slot in self.slots if slot.group == group)
            for group in range(len(self._rows))
        ]

    @property
    def _multiple(self) -> int:
        return 1 << self.stages

    def _padded(self, size: int) -> int:
        return max(-(-size // self._multiple), 2) * self._multiple

    def _place(self) -> list[Slot]:
        order = sorted(
            range(len(self.layout.shapes)), key=lambda position: _key(self.layout.names[position])
        )
        heights = [_rows_and_rank(name, shape)[0] for name, shape in self.layout.shapes]
        groups = {rows: group for group, rows in enumerate(sorted(set(heights)))}
        columns = dict.fromkeys(groups, 0)
        slots = []

        for position in order:
            name, shape = self.layout.shapes[position]
            rows, rank = _rows_and_rank(name, shape)
            slots.append(
                Slot(name, groups[rows], columns[rows], rank, rows, position, factor(name) == "A")
            )
            columns[rows] += rank

        return slots

    def _check(self, rows: int, cols: int) -> None:
        if self.mode == "grouped":
            return

        remedy = 'set lora.target_modules = "attention", codec.canvas = "grouped", or another codec'
        first = self.slots[0]
        for slot in self.slots:
            if slot.rows != first.rows:
                raise ConfigError(
                    f"codec: {slot.name!r} has {slot.rows} rows on the canvas where "
                    f"{first.name!r} has "
                    f"{first.rows}; the paper's canvas needs square targets of one size: {remedy}"
                )

        for what, size in (("rows", rows), ("columns", cols)):
            if size != self._padded(size):
                raise ConfigError(
                    f"codec: the canvas of {first.name!r} and the like has {size} {what}; "
                    f"{self.stages} stages "
                    f"need a multiple of {self._multiple}, at least {2 * self._multiple}: {remedy}"
                )


def target(name: str) -> str:
    """Return the target module of a factor, such as "q_proj"."""
    return path(name).rsplit(".", 1)[-1]


def path(name: str) -> str:
    """Return the module path of a factor, without `.lora_A.` or `.lora_B.` and what follows."""
    return re.split(r"\.lora_[AB]\.", name, maxsplit=1)[0]


def _key(name: str) -> tuple[int, int, str, str, str]:
    """Return layer (first number in the name), target, factor."""
    found = _LAYER.search(name)
    module = target(name)
    place = _FIRST.index(module) if module in _FIRST else len(_FIRST)
    return int(found[1]) if found else -1, place, module, path(name), factor(name) or ""


def _rows_and_rank(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[1], shape[0]) if factor(name) == "A" else (shape[0], shape[1])
