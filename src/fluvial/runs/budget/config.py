"""Settings of a budget: what a run may cost, and what is tried within it."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field

from fluvial.settings import Settings

TriedCodec = Literal["int8", "int4", "nf4", "trellis", "hadamard", "powersgd"]
TriedDownlink = Literal["exact", "int8", "int4", "nf4", "trellis", "hadamard", "powersgd"]


class BudgetConfig(Settings):
    """Cost limits of a run. What the configuration leaves open is chosen within them, by trials on
    public text. Ours."""

    up_bytes: int | None = Field(None, ge=1, le=10**15)
    """Bytes that one site may send for training in the whole run, headers included."""
    total_bytes: int | None = Field(None, ge=1, le=10**15)
    """Bytes that one site may send and receive for training in the whole run, headers included."""
    run_s: float | None = Field(None, ge=1e-3, le=1e9)
    """Seconds that all rounds may take over `fleet.line`: local steps and coding as measured on
    this machine, and the transfer in both directions. Measures, set-up and baselines come on
    top."""
    total_steps: int | None = Field(None, ge=2, le=10**9)
    """Optimizer steps of one site in the whole run. Unset, the run has `rounds`, each with the
    steps that are chosen. Set, `rounds` is chosen too: as many as have these steps, so that runs of
    many short rounds and of few long ones are compared at equal steps and bytes."""
    target_modules: tuple[str, ...] = Field(
        ("q_proj+v_proj", "attention", "all-linear"), min_length=1
    )
    """Candidates of `lora.target_modules`, where it is not set: "attention", "all-linear", or
    names joined by "+". Those that the model does not have are left out."""
    r: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field((1, 2, 4, 8, 16), min_length=1)
    """Candidates of `lora.r`, where it is not set."""
    max_steps: tuple[Annotated[int, Field(ge=1, le=10**6)], ...] = Field((4, 8, 16), min_length=1)
    """Candidates of `train.max_steps`, where neither it nor `train.num_train_epochs` is set."""
    codecs: Annotated[tuple[TriedCodec, ...], Field(min_length=1)] | None = None
    """Candidates of the codec, where there is no `[codec]`, the most exact first. Each has the rate
    that the budget allows, and error feedback. Unset, they are int8, int4 and trellis, with
    `run_s` also nf4, and with `total_bytes` also nf4 and powersgd."""
    downlinks: Annotated[tuple[TriedDownlink, ...], Field(min_length=1)] | None = None
    """Candidates of the downlink's codec, where there is no `[downlink]` and `run_s` or
    `total_bytes` counts downloads; "exact" codes nothing. Unset, they are exact, int8, nf4 and
    trellis, and with `total_bytes` also powersgd."""
    trial_rounds: int = Field(8, ge=2, le=10**4)
    """Rounds of the longest trials, at most those of the run; the worse two thirds of the adapters
    end after a quarter of them, and two thirds of the rest after a half. With `total_steps` they
    are rounds of the middle one of `max_steps`, and other trials have as many steps."""
    trial_sites: int | None = Field(None, ge=2, le=8)
    """Sites that the server simulates on public text, a fifth of which is held out. Unset, they are
    as many as take part in a round, from 2 to 8: the mean of fewer updates has more of a codec's
    noise."""

    def within(self, rounds: int) -> Self:
        """Return these settings for a run of `rounds`, which no trial exceeds."""
        if self.total_steps is not None:
            rounds = self.rounds_of(self.first_steps)
        return self.model_copy(update={"trial_rounds": min(self.trial_rounds, rounds)})

    @property
    def first_steps(self) -> int:
        """Return the steps of a round with which all adapters are tried: the fewest, or where all
        candidates have equal steps in the whole run, the middle."""
        steps = sorted(set(self.max_steps))
        return steps[0 if self.total_steps is None else len(steps) // 2]

    def rounds_of(self, max_steps: int) -> int:
        """Return the rounds of `max_steps` that have `total_steps`."""
        assert self.total_steps is not None
        return self.total_steps // max_steps

    def trial_of(self, rounds: int, max_steps: int | None) -> int:
        """Return the rounds of a trial with `max_steps` that are compared with `rounds` of
        `first_steps`."""
        if self.total_steps is None or max_steps is None:
            return rounds
        return max(1, rounds * self.first_steps // max_steps)

    def simulated_sites(self, cohort: int) -> int:
        """Return the number of simulated sites, for a run with `cohort` sites in a round."""
        return self.trial_sites or min(max(cohort, 2), 8)

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.up_bytes is None and not self.counts_downloads:
            yield (
                "up_bytes, total_bytes, run_s: a budget needs one of the three; set it, or remove "
                "the table"
            )
        for name in self.target_modules:
            parts = name.split("+")
            if not all(parts) or len(set(parts)) < len(parts):
                yield (
                    f"target_modules: {name!r} has an empty name or one twice; write names joined "
                    'by "+", such as "q_proj+v_proj"'
                )
        for key in ("r", "max_steps"):
            yield from self.repeated(key)
        if self.total_steps is not None and self.rounds_of(max(self.max_steps)) < 2:
            yield (
                f"max_steps: {max(self.max_steps)} steps a round leave fewer than two rounds of "
                f"total_steps={self.total_steps}; remove it, or raise total_steps"
            )
        if self.downlinks is not None and not self.counts_downloads:
            yield (
                "downlinks: without effect, because only total_bytes and run_s count downloads; "
                "remove it"
            )

    @property
    def limits(self) -> dict[str, float | None]:
        """Return the limits by name, None for one that is not set."""
        return {name: getattr(self, name) for name in ("up_bytes", "total_bytes", "run_s")}

    @property
    def counts_downloads(self) -> bool:
        """Return whether a limit counts what a site receives."""
        return self.total_bytes is not None or self.run_s is not None

    @property
    def tried_codecs(self) -> tuple[TriedCodec, ...]:
        """Return the candidates of the codec."""
        if self.codecs is not None:
            return self.codecs
        cheap: tuple[TriedCodec, ...] = ("nf4",) if self.counts_downloads else ()
        low_rank: tuple[TriedCodec, ...] = () if self.total_bytes is None else ("powersgd",)
        return ("int8", "int4", *cheap, "trellis", *low_rank)

    @property
    def tried_downlinks(self) -> tuple[TriedDownlink, ...]:
        """Return the candidates of the downlink's codec."""
        if self.downlinks is not None:
            return self.downlinks
        low_rank: tuple[TriedDownlink, ...] = () if self.total_bytes is None else ("powersgd",)
        return ("exact", "int8", "nf4", "trellis", *low_rank)
