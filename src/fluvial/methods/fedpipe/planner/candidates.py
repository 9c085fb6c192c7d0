"""Candidate weights of a plan: shape, place in the model, importance, and what a rank covers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from typing import Literal

from torch import nn

from fluvial.models.hf import PreTrainedModel
from fluvial.models.targets import linear_modules

Kind = Literal["attention", "mlp"]
Granularity = Literal["instance", "type"]

VALUE_UNIT = 10**9
"""Units of a value of 1: importance times coverage is rounded to whole units, which decide."""

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_ATTENTION = re.compile(r"(^|\.)\w*(attn|attention|self_attn)\w*(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """A weight that may get an adapter."""

    module: str
    """Name of the module in the base."""
    rows: int
    """Output dimension."""
    columns: int
    """Input dimension."""
    layer: int
    """Number of its decoder layer, -1 outside of them."""
    kind: Kind
    score: float
    """Importance S_m; those of all candidates of a plan add up to 1."""
    spectrum: tuple[float, ...]
    """Squared singular values of the probe's adapter, in descending order."""

    @property
    def width(self) -> int:
        """Return d_in + d_out: the adapter's parameters for each rank."""
        return self.rows + self.columns

    @property
    def type(self) -> str:
        """Return the last name of the module, such as q_proj."""
        return self.module.rpartition(".")[2]

    def coverage(self, rank: int) -> float:
        """Return E_m(r), the share of the probe's energy in its first r components; concave, and 1
        from the probe's own rank on."""
        total = 0.0
        covered = 0.0
        for place, energy in enumerate(self.spectrum):
            total += energy
            if place < rank:
                covered += energy
        return covered / total if total > 0 else 0.0

    def value(self, rank: int) -> int:
        """Return S_m E_m(r) in units; of an adapter at least one, so that a weight of no
        importance is better than none."""
        return max(int(rank > 0), round(self.score * self.coverage(rank) * VALUE_UNIT))


def linear_candidates(base: PreTrainedModel, modules: Sequence[str]) -> list[Candidate]:
    """Return `modules` of a base, which may be without weights, as candidates about which nothing
    was measured: equal importance, and components that each hold 3/4 of the energy of the one
    before (ours)."""
    linear = linear_modules(base)
    share = 1 / len(modules)
    return [
        Candidate(name, *_shape(linear[name]), _layer(name), kind_of(name), share, uninformed())
        for name in sorted(modules)
    ]


def uninformed(rank: int = 32) -> tuple[float, ...]:
    """Return the spectrum of a candidate that was not measured."""
    return tuple(accumulate([1.0] + [0.75] * (rank - 1), mul))


def kind_of(module: str) -> Kind:
    """Return whether a module belongs to attention or to the MLP, by its name."""
    return "attention" if _ATTENTION.search(module) else "mlp"


def normalised(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates in order of their names, with scores that add up to 1.

    Where all scores are 0, which a probe without a step leaves, all candidates are equal.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.module)
    total = 0.0
    for candidate in ordered:
        total += candidate.score

    if total <= 0:
        return [replace(candidate, score=1 / len(ordered)) for candidate in ordered]
    return [replace(candidate, score=candidate.score / total) for candidate in ordered]


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in); GPT-2's Conv1D holds its weight as (in, out)."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    first, second = weight.shape
    return (first, second) if isinstance(module, nn.Linear) else (second, first)


def _layer(name: str) -> int:
    match = _LAYER.search(name)
    return int(match[1]) if match else -1
