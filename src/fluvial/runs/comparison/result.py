"""The result of a comparison, as compare.json holds it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Over = Literal["seeds", "sites"]
"""Pairs of a test: the means of each seed, or the sites of the only seed."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Score(_Frozen):
    """A measure of a contender."""

    mean: float
    """Mean over the seeds."""
    low: float | None
    """Lower end of its 95 % t-interval; None with one seed."""
    high: float | None
    """Upper end of its 95 % t-interval; None with one seed."""
    by_seed: dict[int, float]
    """Value of each finished run, by seed."""


class Difference(_Frozen):
    """A contender's measure less the baseline's, run by run."""

    mean: float
    """Mean over the seeds of the mean over the sites that both have measured."""
    low: float | None
    """Lower end of its 95 % t-interval over the pairs; None where nothing is tested."""
    high: float | None
    """Upper end of its 95 % t-interval over the pairs; None where nothing is tested."""
    over: Over | None
    """Pairs of interval and test; None where there is one pair only."""
    pairs: int
    """Number of these pairs."""
    p: float | None
    """Two-sided p of the paired t-test; None where nothing is tested or all pairs are equal."""
    p_holm: float | None
    """The same, corrected by Holm's method for the number of contenders."""
    better: int
    """Cells, each a site under a seed, in which the contender is better than the baseline."""
    cells: int
    """Cells that both have measured; seeds, where a measure is over all sites together."""


class ComparedRun(_Frozen):
    """A run of a contender."""

    seed: int
    folder: str
    """Folder of the run, relative to that of the comparison."""
    finished: bool
    failed: str | None
    """Error that ended the run; None for a run that is finished or has not been made yet."""
    weights_sha256: str | None
    """Digest of the final weights, where there is one model for all sites."""
    wall_s: float | None
    """Seconds of the method with its set-up and measures, without its baselines."""
    peak_rss_bytes: int | None
    """Largest resident memory of the run's process."""


class ComparedContender(_Frozen):
    """A contender; values are means over its finished runs, None without any."""

    name: str
    method: str
    codec: str | None
    """Codec of the updates; None where none carries them."""
    pooled: bool
    """True where the data of all sites lie in one place, so that there is no value for a site."""
    trained_parameters: int | None
    """Trained parameters, as `fluvial check` counts them."""
    optimizer_steps: float | None
    """Optimizer steps of all sites in the whole run, as [train] and the cohort set them."""
    runs: tuple[ComparedRun, ...]
    scores: dict[str, Score]
    """Held-out measures by name: means over the sites. Names that end in `_pooled` are means over
    the label tokens or questions of all sites together."""
    differences: dict[str, Difference]
    """Differences to the baseline by measure; empty for the baseline itself."""
    up_bytes_per_site: float | None
    """Bytes up of one site, set-up included."""
    down_bytes_per_site: float | None
    """Bytes down to one site, set-up included."""
    bytes_total: float | None
    """Bytes of all sites both ways, set-up included."""
    amortised_ratio: float | None
    """These bytes against an uncompressed run of the same rounds."""
    wall_s: float | None
    """Seconds of a run."""
    peak_rss_bytes: int | None
    """Largest resident memory of all runs."""

    @property
    def finished(self) -> int:
        """Return the number of finished runs."""
        return sum(run.finished for run in self.runs)


class Compared(_Frozen):
    """Several configurations on the same seeds, beside each other."""

    fluvial: str
    """Version of Fluvial."""
    seeds: tuple[int, ...]
    baseline: str
    """Name of the contender that the others are compared with."""
    verdict: str
    """One line that says which contender is better than the baseline."""
    measures: tuple[str, ...]
    """Names of the measures, the loss first."""
    notes: tuple[str, ...]
    """Remarks on what is not equal among the contenders."""
    differing: dict[str, dict[str, Any]]
    """Settings in which the contenders differ: the value of each contender by name."""
    contenders: tuple[ComparedContender, ...]

    def contender(self, name: str) -> ComparedContender:
        """Return the contender of this name."""
        return next(each for each in self.contenders if each.name == name)

    @property
    def complete(self) -> bool:
        """Return whether every run is finished."""
        return all(run.finished for each in self.contenders for run in each.runs)
