"""The configuration of one site, made from its plan: ranks, side path, batch, local steps.

The server makes it and sends it by the task `configure`; the site keeps it. A module of rank 0 is
not tuned. Where other sites tune it, the site receives it as a frozen side path at the run's rank,
so that all sites train against the same model. Under "stack" and "residual" every module has one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import cast, get_args

from fluvial.errors import WireError
from fluvial.federation.adapters import AggregationSettings
from fluvial.methods.fedpipe.planner.plan import SitePlan
from fluvial.methods.fedpipe.planner.profile import LEAST_RATE, MOST_RATE
from fluvial.methods.fedpipe.planner.settings import PlannerSettings
from fluvial.models.assignment import KEY, Assignment, Precision
from fluvial.models.quantisation import Format, Quantisation
from fluvial.wire.payload import Payload, Value

SVD = AggregationSettings()
"""The default rule, after which nothing is left beside the adapter."""
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
    up_bytes_s: float | None = None
    """Rate from the site to the server, in bytes a second, by which the site decides how much of
    its update it sends before the deadline; None where it sends the whole."""

    @classmethod
    def of(
        cls,
        plan: SitePlan,
        run: Assignment,
        used: Collection[str],
        aggregation: AggregationSettings = SVD,
        up_bytes_s: float | None = None,
    ) -> "SiteConfiguration":
        """Return what `plan` says, with the side path that `aggregation` needs for the modules in
        `used`, which some site trains or has trained.

        `run` is the assignment of the whole run, at whose ranks the server has the adapter.
        """
        ranks = dict(plan.ranks)
        full = dict(run.ranks)
        assignment = with_format(
            run.with_ranks({name: ranks.get(name, 0) for name in full}),
            plan.setting.format,
            plan.setting.layer_formats,
        )
        assignment = replace(assignment, batch=plan.setting.batch)
        side = side_ranks(ranks, run, used, aggregation)
        return cls(
            assignment.with_side(side, run),
            plan.setting.steps,
            plan.setting.length,
            plan.setting.checkpointing,
            up_bytes_s,
        )

    def to_values(self, run: Assignment) -> dict[str, Value]:
        """Return the message values that `from_payload` reads."""
        values = self.assignment.to_values(run)
        return {
            **values,
            "steps": self.steps,
            "length": self.length,
            "checkpointing": self.checkpointing,
            **({} if self.up_bytes_s is None else {"up_bytes_s": self.up_bytes_s}),
        }

    @classmethod
    def from_payload(cls, message: Payload, run: Assignment) -> "SiteConfiguration":
        """Return the plan in a message; raises `WireError` that names the wrong value."""
        given = {KEY: message.value(KEY, dict)} if KEY in message.values else {}
        assignment = Assignment.from_values(given, run)
        rate = None
        if "up_bytes_s" in message.values:
            rate = message.number("up_bytes_s", LEAST_RATE, MOST_RATE)
        return cls(
            assignment,
            message.whole("steps", 1, MOST_STEPS),
            message.whole("length", 2, MOST_LENGTH),
            message.value("checkpointing", bool),
            rate,
        )

    def check_allowed(
        self,
        settings: PlannerSettings,
        aggregation: AggregationSettings,
        run: Assignment,
        sequences: int,
    ) -> None:
        """Raise `WireError` for what no plan under the run's settings has.

        A site checks it, so that the run that it has joined bounds the memory and the time that a
        server can take. `sequences` are those of a round at this site.
        """
        assignment = self.assignment
        _check_format(settings, run, assignment)

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
        for name, rank in assignment.ranks:
            if rank > full[name]:
                raise WireError(f"plan: rank {rank} of {name!r:.100}, above the run's {full[name]}")

        trained = {name: rank for name, rank in assignment.ranks if rank}
        most_side = side_ranks(trained, run, full, aggregation)
        for name, rank in assignment.side:
            if rank > most_side.get(name, 0):
                raise WireError(
                    f"plan: a side path of rank {rank} of {name!r:.100}, above the "
                    f"{most_side.get(name, 0)} that method.aggregation gives"
                )


def _check_format(settings: PlannerSettings, run: Assignment, assignment: Assignment) -> None:
    """Raise `WireError` for a base that is neither the run's own, where the settings name no
    format, nor in one of these, nor in two of them by layer where the settings mix them."""
    if not settings.formats:
        own = (run.precision, run.quantisation)
        if (assignment.precision, assignment.quantisation) != own:
            raise WireError(f"plan: the base is in none of the formats {format_of(run)}")
        return

    usual = replace(assignment, quantisation=replace(assignment.quantisation, layers=()))
    bases = [with_format(run, name) for name in settings.formats]
    if (usual.precision, usual.quantisation) not in {(b.precision, b.quantisation) for b in bases}:
        raise WireError(f"plan: the base is in none of the formats {', '.join(settings.formats)}")

    others = {kind for _, kind in assignment.quantisation.layers}
    if len(others) > 1 or not others <= set(settings.measured_formats):
        raise WireError(
            "plan: layers of the base have another format than one of the smaller formats in "
            f"method.planner.formats, {', '.join(settings.measured_formats) or 'none'}"
        )


def side_ranks(
    ranks: Mapping[str, int],
    run: Assignment,
    used: Collection[str],
    aggregation: AggregationSettings,
) -> dict[str, int]:
    """Return the rank of the side path of each module in `used`, for a site that trains `ranks`.

    Most modes leave nothing beside the global adapter, so that a module which the site does not
    train has the adapter itself there. Otherwise each module has the components that the mode
    leaves beside it, and those of the adapter that the site's own rank leaves out; under "stack"
    the adapter is fresh, and its product is zero.
    """
    full = dict(run.ranks)
    if not aggregation.sends_side:
        return {name: full[name] for name in used if name not in ranks}

    fresh = aggregation.mode == "stack"
    left_out = {name: 0 if fresh else full[name] - ranks.get(name, 0) for name in used}
    return {name: min(aggregation.residual_rank + left_out[name], run.width(name)) for name in used}


def format_of(assignment: Assignment) -> str:
    """Return the planner's name of the format of an assignment's base."""
    return assignment.quantisation.usual or assignment.precision


def layers_of(assignment: Assignment) -> tuple[tuple[int, str], ...]:
    """Return the planner's names of the formats of layers that have another than `format_of`."""
    layers = assignment.quantisation.layers
    return tuple((layer, kind or assignment.precision) for layer, kind in layers)


def with_format(
    assignment: Assignment, name: str, layers: tuple[tuple[int, str], ...] = ()
) -> Assignment:
    """Return the assignment over a base in a format of the planner's list, with other formats of
    some layers.

    A quantised base computes in the run's own float type.
    """
    usual = _quantised(name)
    kinds = tuple((layer, _quantised(kind)) for layer, kind in layers if kind != name)
    precision = assignment.precision if usual else cast(Precision, name)
    return replace(assignment, precision=precision, quantisation=Quantisation(usual, kinds))


def _quantised(name: str) -> Format | None:
    """Return the quantised format of a name, None for that of a float type."""
    return cast(Format, name) if name in get_args(Format) else None
