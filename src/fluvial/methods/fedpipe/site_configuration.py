"""The configuration of one site, made from its plan: ranks, side path, batch, local steps.

The server makes it and sends it by the task `configure`; the site keeps it. A module of rank 0 is
not tuned. Where other sites tune it, the site receives it as a frozen side path at the run's rank,
so that all sites train against the same model.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import cast, get_args

from fluvial.errors import WireError
from fluvial.methods.fedpipe.planner.plan import SitePlan
from fluvial.methods.fedpipe.planner.settings import PlannerSettings
from fluvial.models.assignment import KEY, Assignment, Precision
from fluvial.models.quantisation import FLOAT, Format, Quantisation
from fluvial.wire.payload import Payload, Value

VERSION = "plan"
"""Name of the message value that counts the configurations of a site."""
MOST_VERSIONS = 10**9
"""Upper bound on the configurations of one site."""
MOST_STEPS = 10**9
"""Upper bound on the local steps that a plan may ask for."""
MOST_LENGTH = 2**31
"""Upper bound on the tokens of a sequence that a plan may ask for."""


@dataclass(frozen=True)
class SiteConfiguration:
    """The training of one site in each round, until its next plan."""

    assignment: Assignment
    """Ranks of all modules, side path, batch and precision."""
    steps: int
    """Optimizer steps of a round."""
    length: int
    """Tokens of a sequence at most."""
    checkpointing: bool
    """True for gradient checkpointing."""

    @classmethod
    def of(cls, plan: SitePlan, run: Assignment, used: Collection[str]) -> "SiteConfiguration":
        """Return what `plan` says, with a side path for the modules in `used`, which some site
        has trained, that this site does not train.

        `run` is the assignment of the whole run, at whose ranks the server has the adapter.
        """
        ranks = dict(plan.ranks)
        full = dict(run.ranks)
        assignment = with_format(
            run.with_ranks({name: ranks.get(name, 0) for name in full}), plan.setting.format
        )
        assignment = replace(assignment, batch=plan.setting.batch)
        side = {name: full[name] for name in used if name not in ranks}
        return cls(
            assignment.with_side(side, run),
            plan.setting.steps,
            plan.setting.length,
            plan.setting.checkpointing,
        )

    def to_values(self, run: Assignment) -> dict[str, Value]:
        """Return the message values that `from_payload` reads."""
        values = self.assignment.to_values(run)
        return {
            **values,
            "steps": self.steps,
            "length": self.length,
            "checkpointing": self.checkpointing,
        }

    @classmethod
    def from_payload(cls, message: Payload, run: Assignment) -> "SiteConfiguration":
        """Return the plan in a message; raises `WireError` that names the wrong value."""
        given = {KEY: message.value(KEY, dict)} if KEY in message.values else {}
        assignment = Assignment.from_values(given, run)
        return cls(
            assignment,
            message.whole("steps", 1, MOST_STEPS),
            message.whole("length", 2, MOST_LENGTH),
            message.value("checkpointing", bool),
        )

    def check_allowed(self, settings: PlannerSettings, run: Assignment, sequences: int) -> None:
        """Raise `WireError` for what no plan under the run's settings has.

        A site checks it, so that the run that it has joined bounds the memory and the time that a
        server can take. `sequences` are those of a round at this site.
        """
        assignment = self.assignment
        formats = settings.formats or (format_of(run),)
        bases = [with_format(run, name) for name in formats]
        allowed = {(base.precision, base.quantisation) for base in bases}
        if (assignment.precision, assignment.quantisation) not in allowed:
            raise WireError(f"plan: the base is in none of the formats {', '.join(formats)}")

        if assignment.batch not in settings.batches:
            raise WireError(f"plan: batch {assignment.batch} is not in method.planner.batches")

        most = -(-sequences // assignment.batch)
        if self.steps > most:
            raise WireError(
                f"plan: {self.steps} steps of {assignment.batch} sequences, where the round of "
                f"this site has at most {most}"
            )

        choices = {"never": (False,), "always": (True,), "choose": (False, True)}
        if self.checkpointing not in choices[settings.checkpointing]:
            raise WireError(
                f"plan: checkpointing is {self.checkpointing}, and method.planner.checkpointing is "
                f"{settings.checkpointing!r}"
            )

        full = dict(run.ranks)
        for name, rank in (*assignment.ranks, *assignment.side):
            if rank > full[name]:
                raise WireError(f"plan: rank {rank} of {name!r:.100}, above the run's {full[name]}")


def format_of(assignment: Assignment) -> str:
    """Return the planner's name of the format of an assignment's base."""
    return assignment.quantisation.usual or assignment.precision


def with_format(assignment: Assignment, name: str) -> Assignment:
    """Return the assignment over a base in a format of the planner's list.

    A quantised base computes in the run's own float type.
    """
    if name == format_of(assignment):
        return assignment
    if name in get_args(Format):
        return replace(assignment, quantisation=Quantisation(cast(Format, name)))
    return replace(assignment, precision=cast(Precision, name), quantisation=FLOAT)
