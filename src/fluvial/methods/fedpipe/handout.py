"""The configurations of the sites at the server: who has which, and who must be sent it."""

from collections.abc import Collection, Mapping, Sequence

from fluvial.federation.adapters import AggregationSettings
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import nothing
from fluvial.methods.fedpipe.planner.plan import SitePlan
from fluvial.methods.fedpipe.site_configuration import VERSION, SiteConfiguration
from fluvial.models.assignment import Assignment
from fluvial.wire.payload import Payload, Value


class Configurations:
    """The present configuration of each site; a site that lacks it gets it ahead of a message.

    It is a `Handout` of the exchange: a configuration travels once, by the task `configure`, and
    the messages of a round have its number alone.
    """

    def __init__(self, run: Assignment, aggregation: AggregationSettings) -> None:
        self.aggregation = aggregation
        self.run = run
        """The assignment of the run, at whose ranks the server has the adapter."""
        self.by_site: dict[str, SiteConfiguration] = {}
        self.versions: dict[str, int] = {}
        """Number of the present configuration of each site, from 1."""
        self.held: dict[str, int] = {}
        """Number of the configuration that each site has acknowledged."""

    def set(
        self,
        plans: Mapping[str, SitePlan],
        used: Collection[str],
        up_bytes_s: Mapping[str, float | None],
    ) -> None:
        """Make the configuration of each planned site; those that differ get a new number.

        `used` are the modules that some site has trained or trains; `up_bytes_s` are the rates by
        which sites decide how much they send.
        """
        before = self.by_site
        self.by_site = {
            site: SiteConfiguration.of(plan, self.run, used, self.aggregation, up_bytes_s[site])
            for site, plan in plans.items()
        }
        for site, configuration in self.by_site.items():
            if configuration != before.get(site):
                self.versions[site] = self.versions.get(site, 0) + 1

    def assignments(self, sites: Sequence[str]) -> dict[str, Assignment]:
        """Return the assignments of these sites."""
        return {site: self.by_site[site].assignment for site in sites}

    # -- handout -----------------------------------------------------------------------------------

    def ready(self, fleet: Fleet, round: int, sites: Sequence[str]) -> list[str]:
        """See `Handout`."""
        lacking = {
            site: Payload(values={**self.by_site[site].to_values(self.run), **self.values(site)})
            for site in sites
            if self.held.get(site) != self.versions[site]
        }
        if lacking:
            for reply in fleet.ask("configure", lacking, round=round, read=nothing, alone=False):
                self.held[reply.site] = self.versions[reply.site]

        return [site for site in sites if self.held.get(site) == self.versions[site]]

    def values(self, site: str) -> dict[str, Value]:
        """See `Handout`."""
        return {VERSION: self.versions[site]}

    def forget(self, sites: Sequence[str]) -> None:
        """See `Handout`."""
        for site in sites:
            self.held.pop(site, None)

    # -- state -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Value]:
        """Return all that `restore` needs beside the plans."""
        return {"versions": {**self.versions}, "held": {**self.held}}

    def restore(self, values: Payload) -> None:
        """Take the numbers that `state` had, once the configurations are made anew."""
        self.versions = values.value("versions", dict)
        self.held = values.value("held", dict)
