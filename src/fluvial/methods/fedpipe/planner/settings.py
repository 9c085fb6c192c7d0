"""Settings of the planner: its choices and its objective, and the budgets of sites."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from fluvial.methods.fedpipe.planner.candidates import Granularity
from fluvial.methods.fedpipe.planner.formats import FORMATS
from fluvial.settings import Settings

Objective = Literal["value", "value-per-second"]
Selection = Literal["importance", "uniform", "random", "all"]
Whole = Annotated[int, Field(ge=1, le=2**20)]
Length = Annotated[int, Field(ge=2, le=2**20)]
"""Tokens of a sequence, of which the last one or more are predicted from those before."""
Rank = Annotated[int, Field(ge=1, le=4096)]
Eighths = Annotated[int, Field(ge=1, le=8)]


class PlannerSettings(Settings):
    """The choices that the planner has for a site, and its objective; all of it is ours."""

    objective: Objective = "value-per-second"
    """Measure of a plan: importance covered ("value"), or that for each second of a round on the
    site's own link, with the share of its data that is processed ("value-per-second")."""
    selection: Selection = "importance"
    """Choice of the weights: by importance, or, within the same bytes, one rank for all weights and
    the next one for some ("uniform"), random ranks ("random"), or one rank for all ("all")."""
    granularity: Granularity = "instance"
    """Ranks for each weight apart ("instance"), or one for all weights of a name ("type")."""
    ranks: tuple[Rank, ...] = (2, 4, 8, 16, 32)
    """Ranks that a weight may get, beside none; one rank switches rank adaptation off."""
    batches: tuple[Whole, ...] = (1, 2, 4, 8, 16)
    """Sequences of a forward pass; one entry switches batch adaptation off."""
    critical_batch: float = Field(16, ge=1e-3, le=1e9)
    """Batch (sequences) of which each step lowers the loss half as much as one with the exact
    gradient; a smaller batch makes more steps of the same tokens. At 1e9 tokens count alone."""
    lengths: tuple[Length, ...] = ()
    """Tokens of a sequence at most; unset, `data.max_length` alone."""
    formats: tuple[str, ...] = ()
    """Formats of the base; unset, that of the model alone. Earlier ones are preferred to later ones
    of equal worth."""
    layer_groups: int = Field(4, ge=1, le=64)
    """Groups of as many decoder layers, in order of their sensitivity to a smaller format, where
    `formats` has several: a plan may have the first of them in the smaller one of two formats and
    the others in the larger one. 1 gives all layers one format."""
    checkpointing: Literal["never", "always", "choose"] = "choose"
    """Gradient checkpointing: whether the planner may choose it."""
    eighths: tuple[Eighths, ...] = (8, 7, 6, 5, 4, 3, 2, 1)
    """Local steps, in eighths of those of the site's whole data."""
    weight_of_data: float = Field(1.0, ge=0, le=1e3)
    """Value lost where what a site processes has no worth (lambda_u); of objective "value"."""
    weight_of_error: float = Field(0.5, ge=0, le=1e3)
    """Value lost for a relative error of 1 of the base's output (lambda_q)."""
    safety: float = Field(1.2, ge=1, le=100)
    """Factor on the predicted time where a round must end by the deadline."""
    hysteresis: float = Field(0.05, ge=0, le=10)
    """Relative gain from which a new plan takes the place of the present one."""

    @property
    def quantises(self) -> bool:
        """True where a plan may have a quantised base."""
        return any(FORMATS[name].quantised for name in self.formats)

    @property
    def measured_formats(self) -> tuple[str, ...]:
        """Quantised formats whose loss the sites measure by layer: all of `formats`, where a plan
        may mix two of them."""
        return self.mixed_formats if self.layer_groups > 1 else ()

    @property
    def mixed_formats(self) -> tuple[str, ...]:
        """Quantised ones of `formats`, where it has a further format to mix them with."""
        quantised = tuple(name for name in self.formats if FORMATS[name].quantised)
        return quantised if len(self.formats) > 1 else ()

    def conflicts(self) -> Iterator[str]:
        """Yield lists that are empty or hold a number twice, unknown formats, and settings without
        effect."""
        for name in self.formats:
            if name not in FORMATS:
                yield f"formats: {name!r:.40} is unknown; choose among {', '.join(FORMATS)}"
        for key in ("ranks", "batches", "lengths", "eighths"):
            yield from self.repeated(key)
            if not getattr(self, key) and key != "lengths":
                yield f"{key}: names at least one number, or leave it out"

        if self.differs("layer_groups") and not self.mixed_formats:
            yield (
                "layer_groups: without effect, because formats has no quantised format and a "
                "larger one; remove it"
            )
        if self.objective != "value" and self.differs("weight_of_data"):
            yield (
                f"weight_of_data: without effect under objective={self.objective!r}, which "
                "multiplies by the share of the data; remove it"
            )
        if self.selection == "all" and self.granularity != "instance":
            yield "granularity: without effect, because all weights get one rank; remove it"


class SiteBudget(Settings):
    """Limits of a site, set by the user; a measured profile completes them."""

    site: str
    """Name of the site."""
    memory_mb: float | None = Field(None, ge=1e-6, le=1e9)
    """Memory, in 10^6 bytes; unset, what is free on the GPU, or, without one, all that the machine
    allows the process."""
    up_mbit_s: float | None = Field(None, ge=1e-6, le=8e6)
    """Rate from the site to the server, in 10^6 bits a second; unset, that of its long messages,
    else that of `fleet.line`."""
    down_mbit_s: float | None = Field(None, ge=1e-6, le=8e6)
    """Rate from the server to the site, in 10^6 bits a second; unset, that of its long messages,
    else that of `fleet.line`."""
    rtt_ms: float | None = Field(None, ge=0, le=1e6)
    """Round-trip time, in milliseconds; unset, that of `fleet.line`."""
    speed: float = Field(1.0, ge=1e-4, le=1e3)
    """Speed of the site against the machine that measures, for plans before a run and for sites
    that are slowed down in one process."""
    tokens_s: float | None = Field(None, ge=1e-3, le=1e12)
    """Training speed at every batch size, in tokens a second; unset, the site measures it. Where
    every site has one, the plan is the same on every machine."""
