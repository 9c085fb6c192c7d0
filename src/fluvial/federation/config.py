"""Settings of the fleet: how sites are asked, and what happens when one does not answer."""

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from fluvial.data.site_names import fault_of
from fluvial.federation.line import Line
from fluvial.settings import Settings

Bound = Literal["max_update_growth", "max_weight_share"]
"""Bound on the effect of one site on a round, by its setting."""
BOUNDS: frozenset[Bound] = frozenset(get_args(Bound))


OnFailure = Literal["stop", "skip", "retry"]
"""Action when a site fails."""


TURN_S = 600.0
"""Seconds that a site allows for a turn of another one where there is no deadline."""


class FleetConfig(Settings):
    """How sites are asked, and what happens when one does not answer."""

    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Sites that work at the same time; "auto" is one for each core on a CPU and one on a GPU."""
    threads: int = Field(1, ge=1, le=256)
    """Threads for the tensor operations of one site, and of the server; fixed, so that results do
    not depend on `workers`."""
    sites: tuple[str, ...] = ()
    """Names of the sites that a deployed run waits for; where this is empty, those of data that all
    sites can read."""
    join_timeout_s: float = Field(120.0, ge=0.01, le=10**7)
    """Seconds that a deployed run waits for its sites to join."""
    line: Line | None = None
    """Line between a site and the server, from which `fluvial check` predicts the time of a round;
    a run uses it for `budget.run_s`, and for the price of a download under codec "auto"."""
    deadline_s: float | None = Field(None, ge=0.001, le=10**7)
    """Seconds after which a site that was asked and has not answered has failed. A site that
    converses waits for an answer as long as others may let it wait by this deadline (default
    there: 600 s), and then ends its task."""
    on_failure: OnFailure = "stop"
    """Action when a site fails: stop the run, skip the site for this round, or retry it."""
    retries: int = Field(2, ge=1, le=100)
    """Further attempts under on_failure="retry"; a site that fails them all is skipped."""
    quorum: float = Field(0.5, gt=0, le=1)
    """Share of the asked sites that must have answered, or the run stops."""
    max_update_growth: float = Field(10.0, gt=1, le=10**9)
    """Length of an update over the median of its round, of three replies or more, from which on it
    is the site's failure; refused for a method that compares no updates. (Ours: 1.03 among
    the eight sites of configs/stdlib.toml.)"""
    max_weight_share: float = Field(0.9, ge=0.5, le=1)
    """Share of a round's weight that one site counts with at most; the round's record names a site
    that has more. Several sites that claim too many records are not bounded together. Refused for a
    method that weighs no updates by their samples. (Ours: 1 believes every site's own count of its
    records.)"""

    def answer_within_s(self, turns: int) -> float:
        """Return the seconds for which a site waits for the answer to one of its turns.

        An honest server lets it wait for at most `turns` turns of another site, each of which may
        take until its deadline, in every attempt at that site. Two more are those with which an
        attempt begins.
        """
        attempts = 1 + self.retries if self.on_failure == "retry" else 1
        return (turns + 2) * attempts * (self.deadline_s or TURN_S)

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        fields = type(self).model_fields
        yield from (f"sites: {fault}" for fault in map(fault_of, self.sites) if fault is not None)

        if self.on_failure == "stop" and self.quorum != fields["quorum"].default:
            yield "quorum: without effect under on_failure='stop'; set on_failure='skip' or 'retry'"
        if self.on_failure != "retry" and self.retries != fields["retries"].default:
            yield "retries: without effect unless on_failure='retry'"
