"""From profiles and scores to the plan of each site."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import ceil

from fluvial.codecs import CodecSettings
from fluvial.codecs.forecast import frame_size
from fluvial.federation.adapters import AggregationSettings
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.holding import smallest
from fluvial.methods.fedpipe.planner.candidates import Candidate, linear_candidates
from fluvial.methods.fedpipe.planner.decision import SIDE_BYTES, Models, Planner
from fluvial.methods.fedpipe.planner.formats import FORMATS, Format, layered
from fluvial.methods.fedpipe.planner.memory import Activations, MemoryModel, MemoryPoint
from fluvial.methods.fedpipe.planner.plan import SitePlan
from fluvial.methods.fedpipe.planner.profile import Profile
from fluvial.methods.fedpipe.planner.refusal import refusal
from fluvial.methods.fedpipe.planner.replanning import replanned
from fluvial.methods.fedpipe.planner.settings import PlannerSettings
from fluvial.methods.fedpipe.planner.sizes import Sizes, sizes_of
from fluvial.methods.fedpipe.planner.time import TimeModel
from fluvial.methods.fedpipe.profiles import read_profile
from fluvial.methods.fedpipe.scores import Scores
from fluvial.methods.fedpipe.site_configuration import (
    SiteConfiguration,
    format_of,
    layers_of,
)
from fluvial.methods.planning import OPTIMIZER_BYTES
from fluvial.models.assignment import Assignment
from fluvial.models.pool import ModelPool
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout

FROZEN_BYTES = 4
"""Bytes of a value of an adapter that is not trained."""


def _rate(codec: CodecSettings, layout: Layout) -> int:
    """Return the bytes of an update for each byte of its frame, as a whole number."""
    return max(1, round(layout.raw_bytes / frame_size(codec, layout)))


@dataclass(frozen=True)
class Deciding:
    """Everything about the model that all plans of a run share."""

    settings: PlannerSettings
    sizes: Sizes
    run: Assignment
    """Assignment of the run, whose ranks no plan exceeds."""
    uninformed: tuple[Candidate, ...]
    """Candidates about which nothing was measured."""
    rate: int
    """Rate of the run's codec, which carries the updates of all sites."""
    down_rate: int
    """Rate of the codec of the downlink; 1 without one."""
    trained_share: float
    """Share of an adapter's values that sites train, at most: that of B where A is frozen, in the
    weight that has most outputs for its inputs."""
    seed: int

    @classmethod
    def of(
        cls,
        config: FedPipeConfig,
        pool: ModelPool,
        codec: CodecSettings,
        downlink: CodecSettings | None,
        seed: int,
    ) -> "Deciding":
        """Return what the plans of a run share."""
        outline = pool.outline
        run = outline.assignment
        most = max(rank for _, rank in run.ranks)
        ranks = tuple(rank for rank in config.planner.ranks if rank <= most) or (most,)
        width = 4 if run.precision == "float32" else 2
        modules = [name for name, _ in run.ranks]
        candidates = tuple(linear_candidates(outline.base, modules))
        return cls(
            config.planner.model_copy(update={"ranks": ranks}),
            sizes_of(outline.base, width, pool.config.quantization_correction),
            run,
            candidates,
            _rate(codec, pool.layout),
            1 if downlink is None else _rate(downlink, pool.layout),
            max(each.rows / each.width for each in candidates) if config.factors == "B" else 1.0,
            seed,
        )

    @property
    def format(self) -> Format:
        """Return the run's own format, in which sites measure that have room for it."""
        own = layered(format_of(self.run), layers_of(self.run))
        whole = tuple(enumerate(own.by_layer(self.sizes.layers)))
        return replace(own, layers=whole if own.layers else ())

    def other_formats(self, profiles: Mapping[str, Profile]) -> dict[str, str]:
        """Return the formats in which sites measured that have no room for the run's own."""
        return {
            site: profile.format
            for site, profile in sorted(profiles.items())
            if profile.format != self.format.name
        }

    @property
    def lora(self) -> int:
        """Return the parameters of the run's adapter."""
        return self.run.layout.numel

    @cached_property
    def measured(self) -> int:
        """The parameters of the adapter with which sites measure."""
        return smallest(self.run, self.settings.ranks).layout.numel

    def read_profile(self, site: str, reply: Payload) -> Profile:
        """Return the profile in a reply; raises `WireError` for one that no honest site sends."""
        return read_profile(
            site,
            reply,
            held={self.format.name, *self.settings.formats},
            formats=self.settings.measured_formats,
            layers=self.sizes.layers,
        )

    def held(self, profile: Profile) -> Format:
        """Return the format in which a site measured."""
        return self.format if self.format.name in profile.speeds else FORMATS[profile.format]

    def side_parameters(self, module: str, rank: int) -> int:
        """Return the parameters of a module's side path of `rank`."""
        return rank * next(each.width for each in self.uninformed if each.module == module)

    def beside_parameters(self, aggregation: AggregationSettings) -> int:
        """Return the parameters of the components that `aggregation` leaves beside the adapter."""
        if not aggregation.sends_side:
            return 0
        return sum(
            self.side_parameters(name, min(aggregation.residual_rank, self.run.width(name)))
            for name, _ in self.run.ranks
        )

    def planners(self, scores: Scores, profiles: Mapping[str, Profile]) -> dict[str, Planner]:
        """Return the planner of each site, for the scores that are known.

        Sites whose longest sequences are equally long share one, whose knapsack is solved once.
        """
        lengths = {site: profile.tokens[-1].length for site, profile in profiles.items()}
        by_length = {length: self._planner(scores, length) for length in set(lengths.values())}
        return {site: by_length[length] for site, length in lengths.items()}

    def _planner(self, scores: Scores, length: int) -> Planner:
        return Planner(
            scores.candidates(self.uninformed),
            self.settings,
            length=length,
            format=self.format,
            rates=(self.rate,),
            beside=self.lora,
            seed=self.seed,
        )

    def models(self, profile: Profile, slowness: float = 1.0) -> Models:
        """Return the models of one site, calibrated by what it measured.

        `slowness` is the measured over the predicted time of its last rounds.
        """
        mean = Fraction(sum(each.width for each in self.uninformed), len(self.uninformed))
        memory = MemoryModel(
            self.sizes,
            Activations.of(self.sizes, checkpointing=False, scores=True),
            Activations.of(self.sizes, checkpointing=True, scores=True),
            reserve=0,
            candidate_width=mean,
        )
        points = [
            MemoryPoint(
                peak.batch,
                peak.length,
                peak.checkpointing,
                self.held(profile),
                self.measured,
                peak.bytes,
            )
            for peak in profile.peaks
        ]
        time = TimeModel(
            self.sizes.parameters, self.measured, self.down_rate, self.trained_share, slowness
        )
        frozen = FROZEN_BYTES + ceil((OPTIMIZER_BYTES - FROZEN_BYTES) * self.trained_share)
        # Sites measure with both factors trained.
        return Models(profile, replace(memory.calibrated(points), lora_bytes=frozen), time)

    def memory_bytes(self, profile: Profile, configuration: SiteConfiguration) -> int:
        """Return the most bytes of a site's training by its configuration, with its side path."""
        assignment = configuration.assignment
        trained = assignment.trained.numel
        memory = self.models(profile).memory.total(
            layered(format_of(assignment), layers_of(assignment)),
            assignment.batch,
            min(configuration.length, profile.tokens[-1].length),
            checkpointing=configuration.checkpointing,
            lora=trained,
        )
        return memory + SIDE_BYTES * (assignment.layout.numel - trained)

    def decide(
        self,
        profiles: Mapping[str, Profile],
        scores: Scores,
        present: Mapping[str, SitePlan],
        slowness: Mapping[str, float],
        deadline_s: float | None,
    ) -> tuple[dict[str, SitePlan], dict[str, str]]:
        """Return the plans of sites, and why other sites have none.

        A present plan stays until another one is better by `planner.hysteresis`.
        """
        plans: dict[str, SitePlan] = {}
        refused: dict[str, str] = {}
        planners = self.planners(scores, profiles)

        for site in sorted(profiles):
            planner = planners[site]
            models = self.models(profiles[site], slowness.get(site, 1.0))
            old = present.get(site)
            if old is None:
                plan = planner.plan(models, deadline_s)
            else:
                plan = replanned(planner, models, old, deadline_s)

            if plan is None:
                why = refusal(planner, site, models, deadline_s)
                refused[site] = str(why).removeprefix(f"site {site!r}: ")
            else:
                plans[site] = plan

        return plans, refused
