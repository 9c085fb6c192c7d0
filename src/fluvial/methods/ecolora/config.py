"""Settings of EcoLoRA."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fluvial.codecs.golomb import Values
from fluvial.errors import ConfigError
from fluvial.methods.interface import SampledSettings
from fluvial.wire.tensors import Layout


class EcoLoraConfig(SampledSettings):
    """EcoLoRA; with one segment, nothing left out, fp32 and no mixing it is FedAvg."""

    name: Literal["ecolora"] = "ecolora"
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort; 0.1 of 100 in the paper."""
    segments: int = Field(5, ge=1, le=10**6)
    """Number N_s of segments; the cohort should have at least as many sites, or a segment is
    missing in some rounds."""
    most: float = Field(0.95, ge=1e-4, le=1)
    """Share k_max of the values that is sent in round 1."""
    least_a: float = Field(0.6, ge=1e-4, le=1)
    """Share k_min of A, which is approached as the loss falls."""
    least_b: float = Field(0.5, ge=1e-4, le=1)
    """Share k_min of B, whose changes are concentrated in fewer values."""
    gamma_a: float = Field(1.0, ge=0, le=1e6)
    """Rate at which the share of A falls, per nat of training loss (ours; see the method's
    page)."""
    gamma_b: float = Field(2.0, ge=0, le=1e6)
    """Rate at which the share of B falls, per nat of training loss (ours; see the method's
    page)."""
    mixing: Literal["staleness", "none"] = "staleness"
    """Start of a site: the global adapter mixed with its own last one, or the global one alone."""
    beta: float = Field(1.0, ge=1e-6, le=1e6)
    """Rate at which the weight of the site's own adapter, of s rounds ago, falls: exp(-beta * s)
    (ours)."""
    values: Values = "fp16"
    """Form of a value on the wire."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.most < max(self.least_a, self.least_b):
            yield (
                f"most={self.most} is below least_a={self.least_a} or least_b={self.least_b}; "
                "raise it"
            )
        for factor, least, gamma in (
            ("a", self.least_a, self.gamma_a),
            ("b", self.least_b, self.gamma_b),
        ):
            if least == self.most and self.differs(f"gamma_{factor}"):
                yield (
                    f"gamma_{factor}: without effect, because most and least_{factor} are the same "
                    "share; remove it"
                )
            if gamma == 0 and self._chosen(f"least_{factor}"):
                yield (
                    f"least_{factor}: without effect under gamma_{factor}=0, which keeps the share "
                    "of round 1; remove it"
                )

        if self.mixing == "none" and self.differs("beta"):
            yield "beta: without effect under mixing='none'; remove it"

    def _chosen(self, name: str) -> bool:
        """Return true for a least share that differs from its default without need: where `most` is
        below the default, a lower one must be set."""
        default: float = type(self).model_fields[name].default
        value: float = getattr(self, name)
        return value != default and self.most >= default

    def idle(self, cohort: int) -> dict[str, str]:
        """Return the settings that cannot change a run with a `cohort`, and why."""
        if self.segments < cohort:
            return {}
        return {
            "fleet.max_weight_share": (
                f"each of its {self.segments} segments comes from one site of a cohort of {cohort}"
            )
        }

    def later(self, rounds: int) -> dict[str, str]:
        """Return the settings that act only in later rounds than a run of `rounds` has, and why."""
        later = {}
        if rounds == 1:
            why = "a site has an adapter of its own from round 2 on"
            later = dict.fromkeys(("method.mixing", "method.beta"), why)
        if rounds < 3:
            why = f"the shares fall from round 3 on, and the run has {rounds}"
            names = ["gamma_a", "gamma_b", *filter(self._chosen, ("least_a", "least_b"))]
            later |= {f"method.{name}": why for name in names}

        return later


def check_segments(config: EcoLoraConfig, layout: Layout) -> None:
    """Raise `ConfigError` if a segment would be empty."""
    if config.segments > layout.numel:
        raise ConfigError(
            f"ecolora: method.segments={config.segments} exceeds the {layout.numel} values; "
            "choose fewer"
        )
