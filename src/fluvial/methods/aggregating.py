"""The global adapter of a method, at equal or unequal ranks, and `method.aggregation`."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from pydantic import Field

from fluvial.errors import ConfigError
from fluvial.exchange import EVERY_REPLY, Exchange, Handout, Rule, Terms, Update, check_unequal
from fluvial.exchange.fitting import OnRefusal
from fluvial.federation.adapters import (
    AB_MEAN,
    AggregationSettings,
    SiteChange,
    WholeAdapter,
    combine,
    redistribute,
)
from fluvial.federation.fleet import Fleet
from fluvial.federation.sites import Factors
from fluvial.methods.interface import Context, Given, Metrics, SampledSettings
from fluvial.methods.shared import move
from fluvial.models.assignment import Assignment
from fluvial.models.states import initial_state
from fluvial.seeds import derive
from fluvial.wire.payload import Payload, Value, join, split
from fluvial.wire.tensors import Layout, Named, add, factor, scale


class AveragingSettings(SampledSettings):
    """Settings of a server that moves the adapter of all sites by the mean of their updates."""

    server_learning_rate: float = Field(1.0, gt=0, le=4)
    """Mean updates that the server moves by; 1 is FedAvg. Error feedback delays what it repairs,
    and a little more than 1 makes up for that (ours; measured in docs/methods/cgfedllm.md)."""
    server_momentum: float = Field(0.0, ge=0, lt=1)
    """Nesterov momentum of the server over the mean updates; 0 is FedAvg. The outer optimizer of
    DiLoCo (Douillard et al., 2023, https://arxiv.org/abs/2311.08105) has 0.9 and a
    `server_learning_rate` of 0.7."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of a moving average of the adapter over the rounds, which is measured and exported
    while training goes on from the last adapter; 0 is the last adapter. It costs no bytes, and
    smooths what coarse codecs of both ways disturb (Polyak and Juditsky, SIAM J. Control Optim.
    1992; over rounds of FedAvg as in Caldarola et al., ECCV 2022,
    https://arxiv.org/abs/2203.11834; measured in docs/codecs.md)."""
    aggregation: AggregationSettings = AB_MEAN
    """Aggregation of the sites' adapters. By default the means of A and of B, as in FedIT and
    CG-FedLLM."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        yield from equal_ranks(self.aggregation)
        mode = self.aggregation.mode
        for name in self.server_optimizer if mode != "ab-mean" else ():
            if self.differs(name):
                yield f"{name}: without effect under aggregation.mode={mode!r}; remove it"

    @property
    def server_optimizer(self) -> dict[str, float]:
        """Return the settings by which the server moves, for a baseline that moves alike."""
        return {
            "server_learning_rate": self.server_learning_rate,
            "server_momentum": self.server_momentum,
            "ema_decay": self.ema_decay,
        }


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
        momentum: float = 0.0,
        ema_decay: float = 0.0,
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
        self.momentum = momentum
        """Share of the velocity that a round keeps."""
        self._velocity: Named = {}
        self.ema_decay = ema_decay
        """Share of the average that a round keeps."""
        self._average: Named = {}

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

    def step(self, mean: Named, learning_rate: float, *, round: int) -> Metrics:
        """Move by the updates of a round, whose mean is `mean`; return measures of both.

        Mean, `learning_rate` and momentum count under "ab-mean"; updates of unequal ranks have no
        mean.
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
            whole = WholeAdapter(move(self.whole.adapter, self._ahead(mean), learning_rate))
        self.whole = whole
        if self.ema_decay:
            self._average = self._averaged(whole.adapter)
        closed = (
            self.exchange.close(mean, round) if self.run is None else self.exchange.close_assigned()
        )
        return {**measures, **closed}

    def _ahead(self, mean: Named) -> Named:
        """Return the Nesterov step of a mean update, `mean + m v`, with `v` its velocity after it.

        The formula is that of `torch.optim.SGD(nesterov=True)` for a gradient of `-mean`.
        """
        if not self.momentum:
            return mean
        kept = scale(self._velocity, self.momentum)
        self._velocity = add(kept, mean) if kept else mean
        return add(mean, scale(self._velocity, self.momentum))

    def _averaged(self, adapter: Named) -> Named:
        """Return the moving average over the rounds, which begins with the adapter of the first."""
        if not self._average:
            return adapter
        kept = scale(self._average, self.ema_decay)
        return add(kept, scale(adapter, 1 - self.ema_decay))

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
        """Return the adapter to compute with, side path included, or its moving average."""
        if self.exported is None:
            return self._average or self.whole.adapter
        return redistribute(self.whole.merged(dict(self.exported.ranks)), self.exported)

    def state(self) -> Payload:
        """Return the adapter, its velocity and average if there are any, and what the exchange
        remembers."""
        parts = {"whole": self.whole.state(), "exchange": self.exchange.state()}
        if self.momentum:
            parts["velocity"] = Payload(self._velocity)
        if self.ema_decay:
            parts["average"] = Payload(self._average)
        return join(parts)

    def restore(self, state: Payload) -> None:
        """Become the adapter whose `state` this was."""
        velocity = ("velocity",) if self.momentum else ()
        average = ("average",) if self.ema_decay else ()
        parts = split(state, ("whole", "exchange", *velocity, *average))
        self.whole = self.whole.restored(parts["whole"])
        self.exchange.restore(parts["exchange"])
        if velocity:
            self._velocity = dict(parts["velocity"].tensors)
        if average:
            self._average = dict(parts["average"].tensors)


def frozen_factor(settings: AggregationSettings, factors: Factors) -> Iterator[str]:
    """Yield a line for factors that are trained and do not fit the mode."""
    mode = settings.mode
    if mode == "ffa" and factors != "B":
        yield "aggregation.mode='ffa': needs one frozen A; set factors='B'"
    if mode not in ("ab-mean", "ffa") and factors == "B":
        yield f"aggregation.mode={mode!r}: changes A, which factors='B' freezes; remove one"


def equal_ranks(settings: AggregationSettings) -> Iterator[str]:
    """Yield a line for each setting that matters for sites of unequal ranks alone."""
    if settings.differs("absent"):
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
    check_products(given, place, otherwise="'ab-mean', or ")
    if broadcast:
        raise ConfigError(
            f"{place}: the factors that sites receive change their basis, so their differences "
            "fit no codec; set method.tgap.refit='decoded', or remove it"
        )
    if settings.sends_side:
        check_unequal(given.codec)


def check_products(given: Given, place: str, *, otherwise: str = "") -> None:
    """Raise `ConfigError` for a module whose change is not one product of its factors; the message
    names what to choose `otherwise`."""
    assert given.outline is not None, "a plan has the shapes of the model"
    rows = {name: shape[0] for name, shape in given.layout.shapes if factor(name) == "A"}
    for module, rank in given.outline.assignment.ranks:
        if rows[f"{module}.lora_A.weight"] != rank:
            raise ConfigError(
                f"{place}: module {module!r} has its experts in one tensor, whose product is not "
                f"B A; choose {otherwise}lora.target_modules without it"
            )


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
