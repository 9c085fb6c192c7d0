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
    run_s: float | None = Field(None, ge=1e-3, le=1e9)
    """Seconds that all rounds may take over `fleet.line`: local steps and coding as measured on
    this machine, and the transfer in both directions. Measures, set-up and baselines come on
    top."""
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
    that the budget allows, and error feedback. Unset, they are int8, int4 and trellis, and with
    `run_s` also nf4."""
    downlinks: tuple[TriedDownlink, ...] = Field(("exact", "int8", "nf4", "trellis"), min_length=1)
    """Candidates of the downlink's codec, where there is no `[downlink]` and `run_s` limits the
    time; "exact" codes nothing."""
    trial_rounds: int = Field(8, ge=2, le=10**4)
    """Rounds of the longest trials, at most those of the run; the worse two thirds of the adapters
    end after a quarter of them, and two thirds of the rest after a half."""
    trial_sites: int = Field(4, ge=2, le=8)
    """Sites that the server simulates on public text, a fifth of which is held out."""

    def within(self, rounds: int) -> Self:
        """Return these settings for a run of `rounds`, which no trial exceeds."""
        return self.model_copy(update={"trial_rounds": min(self.trial_rounds, rounds)})

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.up_bytes is None and self.run_s is None:
            yield "up_bytes, run_s: a budget needs one of the two; set it, or remove the table"
        if self.run_s is None and self.downlinks != type(self).model_fields["downlinks"].default:
            yield "downlinks: without effect, because only run_s counts downloads; remove it"

    @property
    def tried_codecs(self) -> tuple[TriedCodec, ...]:
        """Return the candidates of the codec."""
        if self.codecs is not None:
            return self.codecs
        cheap: tuple[TriedCodec, ...] = () if self.run_s is None else ("nf4",)
        return ("int8", "int4", *cheap, "trellis")
