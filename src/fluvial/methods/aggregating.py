"""The global adapter of a method, at equal or unequal ranks, and `method.aggregation`."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from fluvial.errors import ConfigError
from fluvial.exchange import EVERY_REPLY, Exchange, Handout, Rule, Terms, Update, check_unequal
from fluvial.exchange.fitting import OnRefusal
from fluvial.federation.adapters import (
    AggregationSettings,
    SiteChange,
    WholeAdapter,
    combine,
    redistribute,
)
from fluvial.federation.fleet import Fleet
from fluvial.federation.sites import Factors
from fluvial.methods.interface import Context, Given, Metrics
from fluvial.methods.shared import move
from fluvial.models.assignment import Assignment
from fluvial.models.states import initial_state
from fluvial.seeds import derive
from fluvial.wire.payload import Payload, Value, join, split
from fluvial.wire.tensors import Layout, Named, factor


class SharedAdapter:
    """The adapter of all sites, sent and aggregated as the settings say.

    Under "ab-mean" each update is dropped once it is in the mean. The other modes hold the updates
    of a round, because they need the product of each.
    """

    def __init__(
        self,
        settings: AggregationSettings,
        context: Context,
        terms: Terms,
        *,
        on_refusal: OnRefusal = "refuse",
        rule: Rule = EVERY_REPLY,
        run: Assignment | None = None,
        handout: Handout | None = None,
    ) -> None:
        """Begin with the initial adapter, which follows from the seed.

        `run` is the run's own assignment, of a method that gives sites others and brings them
        these by `handout`.
        """
        self.settings = settings
        self.context = context
        self.whole = WholeAdapter(initial_state(context.layout, context.seed))
        self.run = run
        """The run's own assignment, where sites receive others."""
        self.assigned: Assignment | None = None
        """The assignment of every site, where all have the same and it is not the run's."""
        if run is None and settings.sends_side:
            batch = context.train.per_device_train_batch_size
            self.run = context.open_pool().assignment(batch)
            self.assigned = with_side(self.run, settings)

        self.exchange = Exchange(
            context,
            self.whole.adapter,
            terms,
            on_refusal=on_refusal,
            rule=rule,
            run=self.run,
            handout=handout,
        )
        self._changes: dict[str, SiteChange] = {}

    def updates(self, fleet: Fleet, cohort: Sequence[str], *, round: int) -> Iterator[Update]:
        """Send the adapter to the cohort and yield its updates; see `Exchange.updates`."""
        if self.assigned is not None:
            assignments = dict.fromkeys(cohort, self.assigned)
            yield from self.assigned_updates(fleet, assignments, round=round)
            return

        updates = self.exchange.updates(fleet, cohort, self.whole.adapter, round=round)
        yield from self._held(updates)

    def assigned_updates(
        self, fleet: Fleet, assignments: Mapping[str, Assignment], *, round: int
    ) -> Iterator[Update]:
        """Send each site the adapter at its assignment and yield its update; see
        `Exchange.assigned_updates`."""
        adapter_of = partial(redistribute, self.whole)
        updates = self.exchange.assigned_updates(fleet, assignments, adapter_of, round=round)
        yield from self._held(updates)

    def _held(self, updates: Iterator[Update]) -> Iterator[Update]:
        """Yield `updates`, and hold their changes where the mode needs all of them."""
        self._changes = {}
        for update in updates:
            if self.settings.holds_updates:
                self._changes[update.site] = self._change(update)
            yield update

    def _change(self, update: Update) -> SiteChange:
        """Return the training that an update comes from."""
        if update.share < 1:
            return SiteChange.of_components(update.tensors, update.weight)
        return SiteChange.of(self.exchange.received(update.site), update.tensors, update.weight)

    def step(
        self, mean: Named, learning_rate: float, *, round: int, move_by: Named | None = None
    ) -> Metrics:
        """Move by the updates of a round, whose mean is `mean`; return measures of both.

        Mean and `learning_rate` count under "ab-mean"; updates of unequal ranks have no mean.
        `move_by` is the step of an optimizer of the server that takes the place of the mean.
        """
        measures: Metrics = {}
        whole = self.whole
        if self.settings.holds_updates:
            seed = self.context.seed
            fresh = derive(seed, "fresh", round) if self.settings.mode == "stack" else seed
            result = combine(
                self.whole,
                self._changes,
                self.settings,
                fresh=initial_state(self.context.layout, fresh),
            )
            measures = result.metrics()
            whole = result.whole
            self._changes = {}

        if self.settings.mode == "ab-mean":
            step = mean if move_by is None else move_by
            whole = WholeAdapter(move(self.whole.adapter, step, learning_rate))
        self.whole = whole
        closed = (
            self.exchange.close(mean, round) if self.run is None else self.exchange.close_assigned()
        )
        return {**measures, **closed}

    @property
    def exported(self) -> Assignment | None:
        """The assignment of `model`, whose ranks hold adapter and side path; None for the run's."""
        if self.run is None or not self.settings.sends_side:
            return None
        ranks = dict(self.run.ranks)
        more = self.settings.residual_rank
        return self.run.with_ranks(
            {name: min(rank + more, self.run.width(name)) for name, rank in ranks.items()}
        )

    def model(self) -> Named:
        """Return the adapter that a site computes with, side path included."""
        if self.exported is None:
            return self.whole.adapter
        return redistribute(self.whole.merged(dict(self.exported.ranks)), self.exported)

    def state(self) -> Payload:
        """Return the adapter, and what the exchange remembers."""
        return join({"whole": self.whole.state(), "exchange": self.exchange.state()})

    def restore(self, state: Payload) -> None:
        """Become the adapter whose `state` this was."""
        halves = split(state, ("whole", "exchange"))
        self.whole = self.whole.restored(halves["whole"])
        self.exchange.restore(halves["exchange"])


def frozen_factor(settings: AggregationSettings, factors: Factors) -> Iterator[str]:
    """Yield a line for factors that are trained and do not fit the mode."""
    mode = settings.mode
    if mode == "ffa" and factors != "B":
        yield "aggregation.mode='ffa': needs one frozen A; set factors='B'"
    if mode not in ("ab-mean", "ffa") and factors == "B":
        yield f"aggregation.mode={mode!r}: changes A, which factors='B' freezes; remove one"


def equal_ranks(settings: AggregationSettings) -> Iterator[str]:
    """Yield a line for each setting that matters for sites of unequal ranks alone."""
    if settings.absent != type(settings).model_fields["absent"].default:
        yield "aggregation.absent: without effect, because each site trains all modules; remove it"


def with_side(run: Assignment, settings: AggregationSettings) -> Assignment:
    """Return the run's assignment with the side path of `settings` in every module."""
    most = settings.residual_rank
    return run.with_side({name: min(most, run.width(name)) for name, _ in run.ranks}, run)


def check_aggregation(settings: AggregationSettings, given: Given, *, broadcast: bool) -> None:
    """Raise `ConfigError` for an aggregation that the model or the codec does not allow.

    `broadcast` says that the codec is refitted from differences of the adapters that sites receive.
    """
    if settings.mode == "ab-mean":
        return

    place = f"method.aggregation.mode={settings.mode!r}"
    if not given.tunes_factors:
        raise ConfigError(f"{place}: all weights are tuned, and none is a factor; remove it")

    assert given.outline is not None, "a plan has the shapes of the model"
    rows = {name: shape[0] for name, shape in given.layout.shapes if factor(name) == "A"}
    for module, rank in given.outline.assignment.ranks:
        if rows[f"{module}.lora_A.weight"] != rank:
            raise ConfigError(
                f"{place}: module {module!r} has its experts in one tensor, whose product is not "
                "B A; choose 'ab-mean', or lora.target_modules without it"
            )

    if broadcast:
        raise ConfigError(
            f"{place}: the factors that sites receive change their basis, so their differences "
            "fit no codec; set method.tgap.refit='decoded', or remove it"
        )
    if settings.sends_side:
        check_unequal(given.codec)


def side_download(
    settings: AggregationSettings, given: Given
) -> tuple[Layout, Mapping[str, Value]] | None:
    """Return the layout and the further values of what sites receive; None for the adapter."""
    if not settings.sends_side:
        return None

    assert given.outline is not None, "a plan has the shapes of the model"
    run = Assignment(given.layout, given.outline.assignment.ranks, 1, "float32")
    assigned = with_side(run, settings)
    return assigned.layout, assigned.to_values(run)
