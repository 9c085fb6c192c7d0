"""Scores and spectra of all candidate weights, over sites and probes, as the server has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from fluvial.errors import WireError
from fluvial.federation.replies import fields, weight_of
from fluvial.methods.fedpipe.importance import averaged, federated, read_scores
from fluvial.methods.fedpipe.planner.candidates import Candidate
from fluvial.wire.payload import Payload, Value


@dataclass(frozen=True)
class Probe:
    """The probe of one site, as it came."""

    score: Mapping[str, float]
    spectrum: Mapping[str, tuple[float, ...]]
    """Squared singular values of the probe's change, by module."""
    weight: int
    """Samples of the site."""


def read_probe(_site: str, reply: Payload, *, modules: Sequence[str], rank: int) -> Probe:
    """Return the probe in a reply; raises `WireError` for what no probe gives."""
    fields(reply, ("n",), ("score", "spectrum"))
    spectrum = reply.tensor("spectrum")
    if spectrum.shape != (len(modules), rank) or spectrum.dtype != torch.float32:
        raise WireError(f"spectrum: {tuple(spectrum.shape)}, expected ({len(modules)}, {rank})")
    if not bool(torch.isfinite(spectrum).all()) or bool((spectrum < 0).any()):
        raise WireError("spectrum: a value is negative, NaN or Inf")

    return Probe(
        read_scores(reply.tensor("score"), modules),
        {name: _shares(row) for name, row in zip(modules, spectrum, strict=True)},
        weight_of(reply),
    )


def _shares(row: Tensor) -> tuple[float, ...]:
    """Return the energies of one module in descending order, of sum 1; equal ones for zeros."""
    energies = sorted(row.double().tolist(), reverse=True)
    total = sum(energies)
    return tuple(energy / total if total > 0 else 1 / len(energies) for energy in energies)


@dataclass
class Scores:
    """The moving average over probes of the federated mean of the sites' scores."""

    score: dict[str, float] = field(default_factory=dict)
    """Score of each module, of sum 1; empty before a probe."""
    spectrum: dict[str, list[float]] = field(default_factory=dict)
    """Share of the energy in each component, by module."""

    def take(self, probes: Mapping[str, Probe], decay: float) -> None:
        """Fold in the probes of several sites."""
        weights = {site: probe.weight for site, probe in probes.items()}
        now = federated({site: probe.score for site, probe in probes.items()}, weights)
        self.score = averaged(self.score, now, decay)

        total = sum(weights.values())
        for module in now:
            rows = [
                (weights[site] / total, probes[site].spectrum[module]) for site in sorted(probes)
            ]
            mean = [sum(w * row[place] for w, row in rows) for place in range(len(rows[0][1]))]
            before = self.spectrum.get(module)
            self.spectrum[module] = (
                mean
                if before is None
                else [
                    decay * old + (1 - decay) * new for old, new in zip(before, mean, strict=True)
                ]
            )

    def candidates(self, uninformed: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates with what is known of them."""
        if not self.score:
            return list(uninformed)
        return [
            replace(
                candidate,
                score=self.score[candidate.module],
                spectrum=tuple(self.spectrum[candidate.module]),
            )
            for candidate in uninformed
        ]

    def to_values(self) -> dict[str, Value]:
        """Return the values of a checkpoint."""
        return {"score": cast(Value, self.score), "spectrum": cast(Value, self.spectrum)}

    @classmethod
    def from_values(cls, values: Mapping[str, Value]) -> "Scores":
        """Return the inverse of `to_values`."""
        return cls(
            cast(dict[str, float], values["score"]),
            cast(dict[str, list[float]], values["spectrum"]),
        )
