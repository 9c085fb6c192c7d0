"""Importance of each candidate weight, from the factors of a probe adapter and their gradients.

Three scores, which the paper calls "SVD plus sensitivity" without formulas, so that they are our
concretisation:

- spectral: `||BA||_F^2`, the energy of the change that the probe made (the scale of the adapter is
  the same for all weights);
- sensitivity: AdaLoRA's (Zhang et al., ICLR 2023, https://arxiv.org/abs/2303.10512, eq. 8 to 11),
  on the entries of the factors;
- invariant: the mean over steps of `|<B, dL/dB>|`, which equals `|<BA, dL/d(BA)>|` and does not
  change under `(B, A) -> (BR, R^-1 A)` for an invertible R.

At B = 0, the start of every LoRA adapter, the gradient of A is zero and so is every product of B
with its gradient. Such a step says nothing about a weight and counts in no mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fluvial.errors import WireError
from fluvial.federation.adapters import factor_names
from fluvial.wire.tensors import Named

Score = Literal["invariant", "sensitivity", "spectral"]
DECAY = 0.85
"""AdaLoRA's decay of both moving averages, of the sensitivity and of its uncertainty."""


def spectrum(matrix_a: Tensor, matrix_b: Tensor) -> Tensor:
    """Return the singular values of `B A`, descending, fp64 (rank,).

    A is (rank, in) and B is (out, rank); the product is never made: QR of B and of A^T, then the
    SVD of the small core.
    """
    upper_b = torch.linalg.qr(matrix_b.double(), mode="r").R
    upper_a = torch.linalg.qr(matrix_a.double().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(upper_b @ upper_a.T)
    return values


@dataclass
class _Moments:
    """AdaLoRA's moving averages of one factor."""

    sensitivity: Tensor
    uncertainty: Tensor


@dataclass
class Meter:
    """The scores of all weights over the steps of one probe."""

    modules: Sequence[str]
    _moments: dict[str, _Moments] = field(default_factory=dict)
    _invariant: dict[str, float] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)

    def watch(self, factors: Named, gradients: Named) -> None:
        """Take the factors and gradients of one step, before the optimizer changes them."""
        for module in self.modules:
            name_b, name_a = factor_names(module)
            if not bool(factors[name_b].any()):
                continue

            product = float((factors[name_b].double() * gradients[name_b].double()).sum())
            self._invariant[module] = self._invariant.get(module, 0.0) + abs(product)
            self._steps[module] = self._steps.get(module, 0) + 1
            for name in (name_a, name_b):
                self._average(name, (factors[name] * gradients[name]).abs().double())

    def _average(self, name: str, value: Tensor) -> None:
        """Fold `|w * dL/dw|` of one step into the averages of a factor."""
        moments = self._moments.get(name)
        if moments is None:
            moments = self._moments[name] = _Moments(
                torch.zeros_like(value), torch.zeros_like(value)
            )

        moments.sensitivity = DECAY * moments.sensitivity + (1 - DECAY) * value
        spread = (value - moments.sensitivity).abs()
        moments.uncertainty = DECAY * moments.uncertainty + (1 - DECAY) * spread

    def score(self, factors: Named, which: Score) -> dict[str, float]:
        """Return the score of each module after the last step; 0 for one whose B never moved."""
        return {module: self._of(module, factors, which) for module in self.modules}

    def _of(self, module: str, factors: Named, which: Score) -> float:
        name_b, name_a = factor_names(module)
        if which == "spectral":
            return float(spectrum(factors[name_a], factors[name_b]).square().sum())
        if module not in self._steps:
            return 0.0
        if which == "invariant":
            return self._invariant[module] / self._steps[module]

        by_a = self._sensitivity(name_a).mean(dim=1)
        by_b = self._sensitivity(name_b).mean(dim=0)
        return float((by_a + by_b).sum())

    def _sensitivity(self, name: str) -> Tensor:
        moments = self._moments[name]
        return moments.sensitivity * moments.uncertainty


def normalised(scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores that sum to 1; equal ones where all are 0."""
    total = sum(scores.values())
    if total <= 0:
        return dict.fromkeys(scores, 1 / len(scores))
    return {name: score / total for name, score in scores.items()}


def federated(
    by_site: Mapping[str, Mapping[str, float]], weights: Mapping[str, int]
) -> dict[str, float]:
    """Return the mean over sites of their normalised scores, weighted by samples.

    Sites are taken in order of their names, so the order of arrival changes nothing.
    """
    total = sum(weights[site] for site in by_site)
    mean: dict[str, float] = {}
    for site in sorted(by_site):
        for module, score in normalised(by_site[site]).items():
            mean[module] = mean.get(module, 0.0) + weights[site] / total * score
    return mean


def averaged(
    before: Mapping[str, float], now: Mapping[str, float], decay: float
) -> dict[str, float]:
    """Return the moving average of scores over probes; `now` where there is none before."""
    if not before:
        return dict(now)
    return {module: decay * before[module] + (1 - decay) * score for module, score in now.items()}


def overlap(left: Mapping[str, float], right: Mapping[str, float], count: int) -> float:
    """Return the share of the `count` best modules that two scores have in common."""
    return len(set(best(left, count)) & set(best(right, count))) / count


def best(scores: Mapping[str, float], count: int) -> list[str]:
    """Return the `count` modules of the highest score; equal scores in order of the names."""
    return sorted(scores, key=lambda module: (-scores[module], module))[:count]


def read_scores(values: Tensor, modules: Sequence[str]) -> dict[str, float]:
    """Return scores by module from a tensor (modules,); raises `WireError` for what no probe
    gives."""
    if values.shape != (len(modules),) or values.dtype != torch.float32:
        raise WireError(f"scores: {tuple(values.shape)} {values.dtype}, expected ({len(modules)},)")
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise WireError("scores: a value is negative, NaN or Inf")
    return dict(zip(modules, values.double().tolist(), strict=True))
