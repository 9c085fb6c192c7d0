"""The settings of FedPipe.

The paper gives no value of any setting, so that all defaults are ours; see docs/methods/fedpipe.md.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fluvial.codecs import CodecSettings
from fluvial.federation.adapters import AggregationSettings
from fluvial.federation.sites import Factors
from fluvial.methods.aggregating import frozen_factor
from fluvial.methods.fedpipe.importance import Score
from fluvial.methods.fedpipe.planner.settings import PlannerSettings, SiteBudget
from fluvial.methods.interface import SampledSettings

LEAST_UPLOAD = 0.25
"""Share of an update that a site sends at least under a deadline, unless the settings say."""


class FedPipeConfig(SampledSettings):
    """A plan for every site, made from what the sites measure; unequal adapters that add up."""

    name: Literal["fedpipe"] = "fedpipe"
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort."""
    planner: PlannerSettings = PlannerSettings()
    importance: Score = "invariant"
    """Score of a weight: |<B, dL/dB>|, which does not depend on how the factors are balanced;
    AdaLoRA's sensitivity; or the energy of the probe's change."""
    probe_rank: int = Field(8, ge=1, le=256)
    """Rank of the probe adapter on every candidate weight; a site whose memory has no room for one
    sequence beside it halves it, down to the smallest of `planner.ranks`."""
    probe_steps: int = Field(20, ge=2, le=10**6)
    """Optimizer steps of the probe at each site (K_w)."""
    score_decay: float = Field(0.5, ge=0, lt=1)
    """Weight of the scores of earlier probes in the moving average."""
    aggregation: AggregationSettings = AggregationSettings()
    factors: Factors = "A and B"
    """Factors that are tuned and sent: both, or B with A frozen, which `aggregation.mode = "ffa"`
    needs."""
    learning_rate_by_batch: Literal["sqrt", "constant"] = "sqrt"
    """Learning rate of a site whose batch is not the run's: times the root of the ratio, or as it
    is."""
    deadline_s: float | None = Field(None, ge=1e-3, le=10**7)
    """Seconds of training after which a site stops its local steps and sends its update (tau)."""
    least_upload: float | None = Field(None, gt=0, le=1)
    """Share of its update for which a site leaves time before the deadline. Where its link carries
    no more in what is left, it sends the largest components of its change, and the server counts
    these; 1 sends the whole. Unset, 0.25 under `deadline_s` where components count, which is under
    "svd" and "stack" and a codec without error feedback and weights, else 1 (ours)."""
    replan_every: int = Field(5, ge=0, le=10**6)
    """Rounds from one plan to the next; 0 keeps the first plan."""
    budgets: tuple[SiteBudget, ...] = ()
    """Limits and rates of sites by their names, in the place of what they would measure."""

    def budget(self, site: str) -> SiteBudget:
        """Return the limits and rates of a site."""
        return next((each for each in self.budgets if each.site == site), SiteBudget(site=site))

    def share_of_upload(self, codec: CodecSettings) -> float:
        """Return the share of an update that a site sends at least."""
        if self.deadline_s is None:
            return 1.0
        if self.least_upload is not None:
            return self.least_upload
        return LEAST_UPLOAD if self.components_count(codec) else 1.0

    def components_count(self, codec: CodecSettings) -> bool:
        """Return whether the largest components of a change may stand for all of it.

        Error feedback and weights belong to the factors that a site received, which components are
        not expressed in.
        """
        plain = not codec.error_feedback and not codec.weighted
        return plain and self.aggregation.counts_changes

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        yield from frozen_factor(self.aggregation, self.factors)
        if self.least_upload is not None and self.deadline_s is None:
            yield "least_upload: without effect, because deadline_s is unset; set it, or remove it"

        names = [budget.site for budget in self.budgets]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"budgets: site {name!r} stands twice; remove one"
        empty = [budget.site for budget in self.budgets if budget.model_fields_set == {"site"}]
        for name in empty:
            yield f"budgets: site {name!r} has no limit and no rate; set one, or remove it"

        if self.replan_every == 0:
            if self.differs("score_decay"):
                yield "score_decay: without effect at replan_every=0, one probe; remove it"
            if self.planner.differs("hysteresis"):
                yield "planner.hysteresis: without effect at replan_every=0, one plan; remove it"

        if self.planner.selection == "importance":
            return
        for name in ("importance", "probe_rank", "probe_steps", "score_decay"):
            if self.differs(name):
                yield (
                    f"{name}: without effect under planner.selection="
                    f"{self.planner.selection!r}; remove it"
                )
