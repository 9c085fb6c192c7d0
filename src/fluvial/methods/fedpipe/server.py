"""The server half: profiles, scores and plans; rounds with unequal adapters; plans anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from fluvial.errors import ConfigError
from fluvial.exchange import Further, Rule
from fluvial.exchange.feedback import resized
from fluvial.federation.adapters import modules_of
from fluvial.federation.aggregate import WeightedLoss
from fluvial.federation.bounds import lower_heaviest
from fluvial.federation.cohort import sample
from fluvial.federation.failures import Failure
from fluvial.federation.fleet import Fleet
from fluvial.methods.aggregating import SharedAdapter
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.deciding import Deciding
from fluvial.methods.fedpipe.handout import Configurations
from fluvial.methods.fedpipe.planner.comparison import Measured, compared
from fluvial.methods.fedpipe.planner.decision import SIDE_BYTES, Models
from fluvial.methods.fedpipe.planner.plan import SitePlan
from fluvial.methods.fedpipe.planner.profile import Profile
from fluvial.methods.fedpipe.planner.side_paths import with_side_path
from fluvial.methods.fedpipe.profiles import ask_profiles, over_line
from fluvial.methods.fedpipe.scores import Probe, Scores, read_probe
from fluvial.methods.fedpipe.tasks import (
    LEAST_SECONDS,
    SECONDS,
    STEPS,
    read_seconds,
    settings_of,
    terms,
)
from fluvial.methods.interface import Context, Metrics
from fluvial.methods.shared import SharedModelServer
from fluvial.models.assignment import Assignment
from fluvial.training.config import TrainConfig
from fluvial.wire.payload import Payload, Value, join, split
from fluvial.wire.tensors import Named, WeightedMean, norm, subtract


@dataclass(frozen=True)
class Training:
    """The training of one site in a round, without its update."""

    site: str
    loss: float
    """Mean training loss, nats per label token."""
    steps: int
    """Local steps that were made."""
    seconds: float
    """Seconds that they took, as the site says."""
    share: float
    """Share of its update that the site sent, in values."""


class FedPipeServer(SharedModelServer):
    """Server half: the global adapter, what sites measured, and the plan of each site."""

    def __init__(self, config: FedPipeConfig, context: Context) -> None:
        self.config = config
        self.context = context
        self.profiles: dict[str, Profile] = {}
        self.scores = Scores()
        self.plans: dict[str, SitePlan] = {}
        self.slowness: dict[str, float] = {}
        """Measured over predicted time of each site's training, over all plans so far."""
        self.unmeasured: set[str] = set()
        """Sites that have not trained by their present plan yet."""

    @cached_property
    def deciding(self) -> Deciding:
        """Everything that plans share; the base's shapes are read when it is first used."""
        run = self.context
        return Deciding.of(self.config, run.open_pool(), run.codec, run.downlink, run.seed)

    @cached_property
    def configurations(self) -> Configurations:
        """The present configuration of each site."""
        batch = self.context.train.per_device_train_batch_size
        return Configurations(replace(self.deciding.run, batch=batch), self.config.aggregation)

    @cached_property
    def shared(self) -> SharedAdapter:
        """The adapter of all sites, and the exchange that carries it at the ranks of each."""
        return SharedAdapter(
            self.config.aggregation,
            self.context,
            terms(self.config, self.context.codec),
            rule=Rule(
                components=self.config.share_of_upload(self.context.codec) < 1,
                further=Further((STEPS, SECONDS), self._further),
                training=self._training,
            ),
            run=self.configurations.run,
            handout=self.configurations,
        )

    # -- plans -------------------------------------------------------------------------------------

    def setup(self, fleet: Fleet) -> Metrics:
        """Have every site measure itself and probe the weights; give each site a plan."""
        metrics = self._plan(fleet, fleet.sites, 0)
        models = {site: self._models(site).to_json() for site in sorted(self.profiles)}
        return {**metrics, "models": models}

    def _plan(self, fleet: Fleet, sites: Sequence[str], round: int) -> Metrics:
        """Measure and plan `sites`; return the plans of all sites, and the scores.

        Weights are scored where all sites are measured, so that no score is that of a few.
        """
        profiles = self._measure(fleet, sites, round)
        self.profiles |= profiles
        limited = self._beside_side_path(profiles)
        metrics: Metrics = {}
        if self.config.planner.selection == "importance" and len(sites) == len(fleet.sites):
            fitting = self._fitting(limited, self.config.deadline_s)
            able = [site for site in fitting if profiles[site].peaks]
            if able:
                metrics = self._probe(fleet, able, round)

        plans, refused = self.deciding.decide(
            limited,
            self.scores,
            self.plans,
            self.slowness,
            self.config.deadline_s,
        )
        self.plans |= plans
        self.unmeasured |= plans.keys()
        for site, why in refused.items():
            self.plans.pop(site, None)
            self.unmeasured.discard(site)
            if self._side_bytes:
                why += (
                    f"; {self._side_bytes:,} B of its memory stay free for what method.aggregation "
                    "leaves beside the adapter: lower its residual_rank, or choose mode='svd'"
                )
            fleet.reject(Failure(site, round, "profile", why, 0))

        self._check_ranks()
        self._configure()
        shown = {site: self._predicted(site).to_json() for site in sorted(self.plans)}
        scores = {"scores": self.scores.score} if self.scores.score else {}
        formats = self.deciding.other_formats({site: self.profiles[site] for site in shown})
        measured_in = {"measured_in": formats} if formats else {}
        return {"plans": shown, **measured_in, **scores, **metrics}

    def _measure(self, fleet: Fleet, sites: Sequence[str], round: int) -> dict[str, Profile]:
        """Return what sites measure, with the rates of the run's line.

        A site that only the deadline would refuse measures again, and forgets how slow its rounds
        were: one slow step or round may be the reason.
        """
        ask = partial(ask_profiles, fleet, round=round, read=self.deciding.read_profile)
        profiles = over_line(ask(sites, alone=round == 0), self.config, self.context.line)
        late = self._late(self._beside_side_path(profiles))
        for site in late:
            self.slowness.pop(site, None)
            del profiles[site]
        return profiles | over_line(ask(late, alone=False), self.config, self.context.line)

    def _late(self, profiles: Mapping[str, Profile]) -> list[str]:
        """Return the sites that no plan fits, and that one would fit if training took no time, less
        those whose speed is that of their budgets."""
        timed = [site for site in profiles if self.config.budget(site).tokens_s is None]
        deadline_s = self.config.deadline_s
        in_time = self._fitting(profiles, deadline_s)
        able = self._fitting({site: profiles[site].in_no_time() for site in timed}, deadline_s)
        return [site for site in able if site not in in_time]

    def _fitting(self, profiles: Mapping[str, Profile], deadline_s: float | None) -> list[str]:
        """Return the sites that some plan fits, in order of their names.

        The others probe nothing: they have no room for it, and are refused with the limit that
        binds.
        """
        planners = self.deciding.planners(self.scores, profiles)
        models = {site: self._models_of(site, profile) for site, profile in profiles.items()}
        return [site for site in sorted(profiles) if planners[site].fits(models[site], deadline_s)]

    def _beside_side_path(self, profiles: Mapping[str, Profile]) -> dict[str, Profile]:
        """Return profiles without the memory of what `_side_bytes` counts."""
        return {
            site: replace(profile, memory_bytes=max(1, profile.memory_bytes - self._side_bytes))
            for site, profile in profiles.items()
        }

    @cached_property
    def _side_bytes(self) -> int:
        """The memory of the components that `method.aggregation` leaves beside the adapter, which
        every site has as a frozen side path."""
        return SIDE_BYTES * self.deciding.beside_parameters(self.config.aggregation)

    def _predicted(self, site: str) -> SitePlan:
        """Return the plan of a site, with the side path in what is predicted of it."""
        side = self.configurations.by_site[site].assignment.side
        sizes = {module: self.deciding.side_parameters(module, rank) for module, rank in side}
        plan = self.plans[site]
        # Under "stack" and "residual" a module that the site trains has a side path too.
        whole = with_side_path(replace(plan, ranks=()), self._models(site), sizes, sizes)
        return replace(whole, ranks=plan.ranks)

    def _models(self, site: str) -> Models:
        """Return the memory and time models of a site, as they are known."""
        return self._models_of(site, self.profiles[site])

    def _models_of(self, site: str, profile: Profile) -> Models:
        """Return the models of a site by `profile`."""
        return self.deciding.models(profile, self.slowness.get(site, 1.0))

    def _probe(self, fleet: Fleet, sites: Sequence[str], round: int) -> Metrics:
        """Have `sites` score the weights, and fold their scores in; return the site that would
        have had more than its share of them, with its weight."""
        modules = modules_of(self.context.layout.names)
        read = partial(read_probe, modules=modules, rank=self.config.probe_rank)
        messages = dict.fromkeys(sites, Payload(values={"number": round}))
        probes: dict[str, Probe] = {
            reply.site: reply.content
            for reply in fleet.ask("probe", messages, round=round, read=read, alone=round == 0)
        }
        weights = {site: probe.weight for site, probe in probes.items()}
        clipped = lower_heaviest(weights, fleet.config.max_weight_share, round)
        if probes:
            counted = {site: replace(probes[site], weight=weights[site]) for site in probes}
            self.scores.take(counted, self.config.score_decay)
        return {"clipped_probes": clipped} if clipped else {}

    def _check_ranks(self) -> None:
        """Raise `ConfigError` for plans of unequal ranks whose factors have no mean."""
        if self.config.aggregation.mode != "ab-mean":
            return
        if len({plan.ranks for plan in self.plans.values()}) > 1:
            raise ConfigError(
                "method.aggregation.mode='ab-mean': the plans of the sites have unequal ranks, "
                "whose factors have no mean; choose 'svd' or 'pad', or planner.selection='all' "
                "with one rank"
            )

    def _configure(self) -> None:
        """Make the configuration of each planned site, with a side path for the modules that some
        site has trained or trains."""
        changed = {
            module
            for module in modules_of(self.context.layout.names)
            if self.shared.whole.product(module).left.any()
        }
        used = changed.union(*(dict(plan.ranks) for plan in self.plans.values()))
        partial_upload = self.config.share_of_upload(self.context.codec) < 1
        rates = {
            site: self.profiles[site].up_bytes_s if partial_upload else None for site in self.plans
        }
        self.configurations.set(self.plans, used, rates)
        self.shared.exchange.retain(set(self.configurations.assignments(list(self.plans)).values()))

    def _due(self, round: int) -> bool:
        """Return whether all sites are measured and planned anew before `round`."""
        every = self.config.replan_every
        return every > 0 and round > 1 and (round - 1) % every == 0

    # -- rounds ------------------------------------------------------------------------------------

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Run one round: plans where due, unequal adapters down, local training, aggregation."""
        cohort = sample(fleet.sites, self.config.fraction, seed=self.context.seed, round=number)
        new = fleet.sites if self._due(number) else [s for s in cohort if s not in self.plans]
        metrics = self._plan(fleet, new, number) if new else {}
        asked = [site for site in cohort if site in self.plans]

        before = self.shared.whole.adapter
        equal = self.config.aggregation.mode == "ab-mean"
        mean = WeightedMean()
        loss = WeightedLoss()
        trainings = []
        for update in self.shared.assigned_updates(
            fleet, self.configurations.assignments(asked), round=number
        ):
            assert update.loss is not None, "each reply has a loss"
            loss.add(update.loss, update.weight)
            further = {**update.further, "share": update.share}
            trainings.append(Training(update.site, update.loss, **further))
            if equal:
                mean.add(update.tensors, update.weight)

        fleet.require_quorum("train", number, answered=len(trainings), asked=len(cohort))
        # Plans of equal ranks may be below the run's: the components beyond them stay.
        moved = resized(mean.mean(), self.context.layout) if equal else {}
        measures = self.shared.step(moved, 1.0, round=number)
        trainings.sort(key=lambda training: training.site)
        return {
            **metrics,
            "loss": loss.mean(),
            "sites": len(trainings),
            "update_norm": norm(subtract(self.shared.whole.adapter, before)),
            **measures,
            **self._fairness(trainings),
            **self._compare(fleet, trainings, number),
        }

    def _further(self, site: str, reply: Payload) -> dict[str, Any]:
        """Return steps and seconds of a site's training; raises `WireError`."""
        steps = reply.whole(STEPS, 1, self.configurations.by_site[site].steps)
        return {"steps": steps, "seconds": read_seconds(reply)}

    def _training(self, site: str) -> TrainConfig:
        """Return the settings by which a site trains."""
        return settings_of(self.context.train, self.config, self.configurations.by_site[site])

    def _fairness(self, trainings: Sequence[Training]) -> Metrics:
        """Return the worst site and the spread of the losses, the share of the planned steps that
        was not made, and the share of its update that each site sent which did not send all."""
        losses = {training.site: training.loss for training in trainings}
        missed = {
            training.site: 1 - training.steps / self.configurations.by_site[training.site].steps
            for training in trainings
        }
        shares = {training.site: training.share for training in trainings if training.share < 1}
        worst = max(losses, key=lambda site: (losses[site], site))
        return {
            "worst_site": worst,
            "worst_loss": losses[worst],
            "spread_of_losses": max(losses.values()) - min(losses.values()),
            "under_training": sum(missed.values()) / len(missed),
            "worst_under_training": max(missed.values()),
            **({"sent_share": shares} if shares else {}),
        }

    def _compare(self, fleet: Fleet, trainings: Sequence[Training], round: int) -> Metrics:
        """Return the predicted and the measured figures of each site that trained by its plan for
        the first time, and note by how much its training was slower than predicted.

        A plan's prediction has the slowness that was known when it was made, so a second round
        under the same plan would count this slowness twice.
        """
        figures = {}
        for training in trainings:
            if training.site not in self.unmeasured:
                continue

            self.unmeasured.remove(training.site)
            plan = self._predicted(training.site)
            sizes = fleet.meter.current[training.site]
            down = sizes["down", "train"] if round > 1 else None
            measured = Measured(None, sizes["up", "train"], down, training.seconds)
            figures[training.site] = compared(plan, measured)
            if self.config.budget(training.site).tokens_s is None and plan.prediction.compute_s > 0:
                now = self.slowness.get(training.site, 1.0)
                took_s = max(training.seconds, LEAST_SECONDS)
                self.slowness[training.site] = now * took_s / plan.prediction.compute_s

        return {"predicted": figures} if figures else {}

    # -- model and state ---------------------------------------------------------------------------

    def model(self) -> Named:
        """Return the global adapter, with its side path where the mode sends one."""
        return self.shared.model()

    @property
    def assigned(self) -> Assignment | None:
        """See `SharedModelServer`."""
        return self.shared.exported

    def state(self) -> Payload:
        """Return the adapter, what sites measured, the scores, and the plan of each site."""
        plans: dict[str, Value] = {site: plan.to_json() for site, plan in self.plans.items()}
        profiles: dict[str, Value] = {
            site: {**profile.to_values()} for site, profile in self.profiles.items()
        }
        values: dict[str, Value] = {
            "plans": plans,
            "profiles": profiles,
            "scores": self.scores.to_values(),
            **self.configurations.state(),
            "slowness": {**self.slowness},
            "unmeasured": [*sorted(self.unmeasured)],
        }
        return join({"shared": self.shared.state(), "plans": Payload(values=values)})

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        halves = split(state, ("shared", "plans"))
        self.shared.restore(halves["shared"])
        values = halves["plans"]
        self.plans = {
            site: SitePlan.from_json(plan) for site, plan in values.value("plans", dict).items()
        }
        self.profiles = {
            site: Profile.from_values(profile)
            for site, profile in values.value("profiles", dict).items()
        }
        self.scores = Scores.from_values(values.value("scores", dict))
        self.slowness = values.value("slowness", dict)
        self.unmeasured = set(values.value("unmeasured", list))
        self._configure()
        self.configurations.restore(values)
