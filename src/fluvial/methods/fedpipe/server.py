"""The server half: profiles, scores and plans; rounds with unequal adapters; plans anew."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

from fluvial.errors import ConfigError
from fluvial.exchange import Gathering, Readable
from fluvial.federation.adapters import (
    SiteChange,
    WholeAdapter,
    combine,
    factor_names,
    modules_of,
    redistribute,
)
from fluvial.federation.aggregate import WeightedLoss
from fluvial.federation.bounds import lower_heaviest, rms
from fluvial.federation.cohort import sample
from fluvial.federation.failures import Failure
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import nothing
from fluvial.federation.sites import adapter_message
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.deciding import Deciding
from fluvial.methods.fedpipe.planner.comparison import Measured, compared
from fluvial.methods.fedpipe.planner.decision import Models
from fluvial.methods.fedpipe.planner.plan import SitePlan
from fluvial.methods.fedpipe.planner.profile import Profile
from fluvial.methods.fedpipe.planner.side_paths import with_side_path
from fluvial.methods.fedpipe.profiles import over_line, read_profile
from fluvial.methods.fedpipe.scores import Probe, Scores, read_probe
from fluvial.methods.fedpipe.site_configuration import SiteConfiguration
from fluvial.methods.fedpipe.tasks import VERSION
from fluvial.methods.fedpipe.updates import SiteUpdate, read_update
from fluvial.methods.interface import Context, Metrics
from fluvial.methods.shared import SharedModelServer
from fluvial.models.assignment import Assignment
from fluvial.models.states import initial_state
from fluvial.wire.payload import Payload, Value, join, split
from fluvial.wire.tensors import Named, WeightedMean, moved, norm, subtract


class FedPipeServer(SharedModelServer):
    """Server half: the global adapter, what sites measured, and the plan of each site."""

    def __init__(self, config: FedPipeConfig, context: Context) -> None:
        self.config = config
        self.context = context
        self.fresh = initial_state(context.layout, context.seed)
        self.whole = WholeAdapter(self.fresh)
        self.profiles: dict[str, Profile] = {}
        self.scores = Scores()
        self.plans: dict[str, SitePlan] = {}
        self.configurations: dict[str, SiteConfiguration] = {}
        self.versions: dict[str, int] = {}
        """Number of the present configuration of each site, from 1."""
        self.slowness: dict[str, float] = {}
        """Measured over predicted time of each site's training, over all plans so far."""
        self.held: dict[str, int] = {}
        """Number of the configuration that each site has acknowledged."""
        self.unmeasured: set[str] = set()
        """Sites that have not trained by their present plan yet."""

    @cached_property
    def deciding(self) -> Deciding:
        """Everything that plans share; the base's shapes are read when it is first used."""
        return Deciding.of(self.config, self.context)

    @property
    def run(self) -> Assignment:
        """The assignment of the run, at whose ranks the server has the adapter."""
        return replace(self.deciding.run, batch=self.context.train.per_device_train_batch_size)

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
        profiles = {
            reply.site: reply.content
            for reply in fleet.ask(
                "profile",
                dict.fromkeys(sites, Payload()),
                round=round,
                read=read_profile,
                alone=round == 0,
            )
        }
        profiles = {
            site: over_line(profiles[site], self.config.budget(site), self.context.line)
            for site in sorted(profiles)
        }
        self.profiles |= profiles
        metrics: Metrics = {}
        if self.config.planner.selection == "importance" and len(sites) == len(fleet.sites):
            metrics = self._probe(fleet, sorted(profiles), round)

        plans, refused = self.deciding.decide(
            profiles, self.scores, self.plans, self.slowness, self.config.deadline_s
        )
        self.plans |= plans
        self.unmeasured |= plans.keys()
        for site, why in refused.items():
            self.plans.pop(site, None)
            self.unmeasured.discard(site)
            fleet.reject(Failure(site, round, "profile", why, 0))

        self._check_ranks()
        self._configure_all()
        shown = {site: self._predicted(site).to_json() for site in sorted(self.plans)}
        scores = {"scores": self.scores.score} if self.scores.score else {}
        return {"plans": shown, **scores, **metrics}

    def _predicted(self, site: str) -> SitePlan:
        """Return the plan of a site, with the side path in what is predicted of it."""
        side = self.configurations[site].assignment.side
        sizes = {module: self.deciding.parameters(module) for module, _ in side}
        return with_side_path(self.plans[site], self._models(site), sizes, sizes)

    def _models(self, site: str) -> Models:
        """Return the memory and time models of a site, as they are known."""
        return self.deciding.models(self.profiles[site], self.slowness.get(site, 1.0))

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

    def _configure_all(self) -> None:
        """Make the configuration of each planned site; those that differ get a new number."""
        changed = {
            module
            for module in modules_of(self.context.layout.names)
            if bool(self.whole.adapter[factor_names(module)[0]].any())
        }
        used = changed.union(*(dict(plan.ranks) for plan in self.plans.values()))
        before = self.configurations
        self.configurations = {
            site: SiteConfiguration.of(plan, self.run, used) for site, plan in self.plans.items()
        }
        for site, configuration in self.configurations.items():
            if configuration != before.get(site):
                self.versions[site] = self.versions.get(site, 0) + 1

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

        received = {
            site: redistribute(self.whole, self.configurations[site].assignment) for site in asked
        }
        gathering = Gathering(
            fleet,
            "train",
            number,
            messages=partial(self._messages, fleet, number, received),
            read=partial(self._read, number, received),
            forget=self._forget,
        )
        replies = [replace(reply.content, weight=reply.weight) for reply in gathering.of(asked)]
        updates = sorted(replies, key=lambda update: update.site)
        fleet.require_quorum("train", number, answered=len(updates), asked=len(cohort))
        return {
            **metrics,
            **self._aggregate(received, updates),
            **self._fairness(updates),
            **self._compare(fleet, updates),
            **gathering.metrics(),
        }

    def _messages(
        self, fleet: Fleet, round: int, received: Mapping[str, Named], sites: Sequence[str]
    ) -> dict[str, Payload]:
        """Return the adapters for `sites`, once those that lack their configuration have it."""
        lacking = {
            site: Payload(
                values={
                    **self.configurations[site].to_values(self.run),
                    VERSION: self.versions[site],
                }
            )
            for site in sites
            if self.held.get(site) != self.versions[site]
        }
        if lacking:
            for reply in fleet.ask("configure", lacking, round=round, read=nothing, alone=False):
                self.held[reply.site] = self.versions[reply.site]

        return {
            site: adapter_message(received[site], **{"round": round, VERSION: self.versions[site]})
            for site in sites
            if self.held.get(site) == self.versions[site]
        }

    def _forget(self, sites: Sequence[str]) -> None:
        """Note that these sites must be sent their configuration again."""
        for site in sites:
            self.held.pop(site, None)

    def _read(
        self, round: int, received: Mapping[str, Named], site: str, reply: Payload
    ) -> Readable[SiteUpdate]:
        """Return the update in a reply; raises `WireError` for one that breaks a rule."""
        update = read_update(
            reply,
            self.configurations[site],
            received[site],
            site=site,
            round=round,
            config=self.config,
            context=self.context,
        )
        return Readable(update, rms(update.tensors), update.weight)

    def _aggregate(self, received: Mapping[str, Named], updates: Sequence[SiteUpdate]) -> Metrics:
        """Fold the updates into the adapter; return the measures of the aggregate."""
        changes = {
            update.site: SiteChange.of(received[update.site], update.tensors, update.weight)
            for update in updates
        }
        combined = combine(self.whole, changes, self.config.aggregation, fresh=self.fresh)
        before = self.whole.adapter
        self.whole = combined.whole
        if self.config.aggregation.mode == "ab-mean":  # FedAvg's exact sum, to the bit
            mean = WeightedMean()
            for update in updates:
                mean.add(update.tensors, update.weight)
            self.whole = WholeAdapter(moved(before, mean.mean()))

        loss = WeightedLoss()
        for update in updates:
            loss.add(update.loss, update.weight)

        return {
            "loss": loss.mean(),
            "sites": len(updates),
            "update_norm": norm(subtract(self.whole.adapter, before)),
            **combined.metrics(),
        }

    def _fairness(self, updates: Sequence[SiteUpdate]) -> Metrics:
        """Return the worst site and the spread of the losses, and the share of the planned steps
        that was not made."""
        losses = {update.site: update.loss for update in updates}
        missed = {
            update.site: 1 - update.steps / self.configurations[update.site].steps
            for update in updates
        }
        worst = max(losses, key=lambda site: (losses[site], site))
        return {
            "worst_site": worst,
            "worst_loss": losses[worst],
            "spread_of_losses": max(losses.values()) - min(losses.values()),
            "under_training": sum(missed.values()) / len(missed),
            "worst_under_training": max(missed.values()),
        }

    def _compare(self, fleet: Fleet, updates: Sequence[SiteUpdate]) -> Metrics:
        """Return the predicted and the measured figures of each site that trained by its plan for
        the first time, and note by how much its training was slower than predicted.

        A plan's prediction has the slowness that was known when it was made, so a second round
        under the same plan would count this slowness twice.
        """
        figures = {}
        for update in updates:
            if update.site not in self.unmeasured:
                continue

            self.unmeasured.remove(update.site)
            plan = self._predicted(update.site)
            sizes = fleet.meter.current[update.site]
            measured = Measured(None, sizes["up", "train"], sizes["down", "train"], update.seconds)
            figures[update.site] = compared(plan, measured)
            if self.config.budget(update.site).tokens_s is None and plan.prediction.compute_s > 0:
                now = self.slowness.get(update.site, 1.0)
                self.slowness[update.site] = now * update.seconds / plan.prediction.compute_s

        return {"predicted": figures} if figures else {}

    # -- model and state ---------------------------------------------------------------------------

    def model(self) -> Named:
        """Return the global adapter, at the run's ranks."""
        return self.whole.adapter

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
            "versions": {**self.versions},
            "held": {**self.held},
            "slowness": {**self.slowness},
            "unmeasured": [*sorted(self.unmeasured)],
        }
        return join({"whole": self.whole.state(), "plans": Payload(values=values)})

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        halves = split(state, ("whole", "plans"))
        self.whole = self.whole.restored(halves["whole"])
        values = halves["plans"]
        self.plans = {
            site: SitePlan.from_json(plan) for site, plan in values.value("plans", dict).items()
        }
        self.profiles = {
            site: Profile.from_values(profile)
            for site, profile in values.value("profiles", dict).items()
        }
        self.scores = Scores.from_values(values.value("scores", dict))
        self.held = values.value("held", dict)
        self.slowness = values.value("slowness", dict)
        self.unmeasured = set(values.value("unmeasured", list))
        self._configure_all()
        self.versions = values.value("versions", dict)
