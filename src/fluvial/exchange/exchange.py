"""The server's half of the exchange: send an adapter to a cohort, receive its updates."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from torch import Tensor

from fluvial.codecs.compiled import all_cores
from fluvial.errors import ConfigError, WireError, wrong_return
from fluvial.exchange.checks import check_unequal
from fluvial.exchange.fitting import OnRefusal
from fluvial.exchange.gathering import Gathering, Readable
from fluvial.exchange.link import Link
from fluvial.exchange.representation import innovation
from fluvial.exchange.rule import COMPONENTS, EVERY_REPLY, Handout, Rule
from fluvial.exchange.terms import Terms
from fluvial.exchange.uplink import Decoded, error_metrics
from fluvial.federation.adapters import completed, factor_length, layout_of_ranks, modules_of
from fluvial.federation.bounds import check_length, rms
from fluvial.federation.context import Context, Metrics
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import FRAME, fields, loss_of, weight_of
from fluvial.models.assignment import Assignment
from fluvial.wire.payload import Payload, Value, join, split
from fluvial.wire.tensors import Named, WeightedMean


@dataclass(frozen=True)
class Update:
    """Change of the adapter by one site in a round."""

    site: str
    tensors: Named
    """Difference to the adapter that the site received, fp32."""
    weight: int
    """Samples that it counts with."""
    loss: float | None
    """Mean training loss, nats per label token; None where the site sends none."""
    further: Mapping[str, Any] = field(default_factory=dict)
    """Further values of the reply, as `Rule.further` has read them."""
    share: float = 1.0
    """Values of `tensors` over those of the whole update. Below 1, they are factors of the largest
    components of the change of the products, not differences of the factors."""


class Exchange:
    """Both directions between the server and the sites.

    A `Link` knows which codec carries updates, and which adapter each site holds. Sites that have
    the run's own assignment share one link, and so do the sites of each other assignment. A site
    that lacks something says so and is sent everything again, so a run never depends on what a site
    remembers.
    """

    def __init__(
        self,
        context: Context,
        adapter: Named,
        terms: Terms,
        *,
        on_refusal: OnRefusal = "refuse",
        rule: Rule = EVERY_REPLY,
        task: str = "train",
        run: Assignment | None = None,
        handout: Handout | None = None,
    ) -> None:
        """Begin with `adapter`, which all sites make from the seed.

        `run` is the run's own assignment, where sites get others (see `assigned_updates`): with
        each message, or ahead of it by a `handout`, which brings it once.
        """
        self.context = context
        self.terms = terms
        self.rule = rule
        self.task = task
        self.link = Link(context, adapter, terms, on_refusal=on_refusal)
        self._run = run
        self._handout = handout
        self._others: dict[Assignment, Link] = {}
        """Links to the sites of each assignment that is not the run's."""
        self._by_site: dict[str, Link] = {}
        """Link to each site of this round."""
        self._gathered: Metrics = {}

    def setup(self, fleet: Fleet) -> Metrics:
        """Fit or choose a codec that learns, measure it, and install it; return the report.

        The report is empty where the terms have no pre-training, so that nothing is measured.
        Raises `GateError` for a codec that does not carry updates.
        """
        return self.link.uplink.setup(fleet)

    @property
    def sent(self) -> Named:
        """The adapter as sites hold it in this round; their updates are differences to it."""
        return self.link.sent

    def received(self, site: str) -> Named:
        """Return the adapter, with its side path, as a site of this round's cohort received it."""
        return self._by_site[site].sent

    def updates(
        self, fleet: Fleet, cohort: Sequence[str], adapter: Named, *, round: int
    ) -> Iterator[Update]:
        """Send `adapter` to the cohort, and yield its updates as soon as they count.

        A site that fails is handled as `[fleet]` says. Raises `ClientError` where the quorum is
        missed, and `ConfigError` for an adapter that cannot be sent. After the last update call
        `close`.
        """
        self._check(self.link, adapter)
        with fleet.times.server.time("coding"), all_cores():
            self.link.begin(adapter, round)
        yield from self._gather(fleet, dict.fromkeys(cohort, self.link), round)

    def assigned_updates(
        self,
        fleet: Fleet,
        assignments: Mapping[str, Assignment],
        adapter_of: Callable[[Assignment], Named],
        *,
        round: int,
    ) -> Iterator[Update]:
        """Send each site of `assignments` its assignment and its adapter; yield as `updates` does.

        `adapter_of` gives the adapter, with its side path, of all sites that have an assignment
        (such as `redistribute`). An update has the factors that its site trains. Raises
        `ConfigError` for a codec that learns.
        """
        check_unequal(self.context.codec)
        links = {each: self._link(each) for each in dict.fromkeys(assignments.values())}
        for assignment, link in links.items():
            adapter = adapter_of(assignment)
            self._check(link, adapter)
            with fleet.times.server.time("coding"), all_cores():
                link.begin(adapter, round)

        by_site = {site: links[assignment] for site, assignment in assignments.items()}
        yield from self._gather(fleet, by_site, round)

    def close(self, mean: Named, round: int) -> Metrics:
        """End a round of `updates`; `mean` is their mean. Return what was seen of the codec."""
        return {**self._gathered, **self.link.uplink.close(mean, round)}

    def close_assigned(self) -> Metrics:
        """End a round of `assigned_updates`. Return what was seen of the codec."""
        links = list(dict.fromkeys(self._by_site.values()))
        errors = [error for link in links for error in link.uplink.errors]
        return {**self._gathered, **error_metrics(errors)}

    def _link(self, assignment: Assignment) -> Link:
        """Return the link to sites that have `assignment`, made when it is first asked for."""
        assert self._run is not None, "an exchange with assignments has the run's own"
        if assignment == self._run:
            return self.link

        if assignment not in self._others:
            values = {} if self._handout else assignment.to_values(self._run)
            self._others[assignment] = Link.of(assignment, self.context, self.terms, values=values)
        return self._others[assignment]

    def retain(self, assignments: Collection[Assignment]) -> None:
        """Forget the links to sites of other assignments than these, which no site has any more."""
        self._others = {each: link for each, link in self._others.items() if each in assignments}

    def _check(self, link: Link, adapter: Named) -> None:
        """Raise `ConfigError` for an adapter that the server half has made wrongly."""
        place = f"task {self.task!r}: the adapter that the server half sends"
        for name, tensor in adapter.items():
            if not isinstance(tensor, Tensor):
                raise ConfigError(wrong_return(f"{place}: {name!r}", tensor, "a Tensor", verb="is"))

        try:
            link.downlink.layout.check(adapter, place)
        except WireError as error:
            raise ConfigError(str(error)) from None

    # -- one ask ----------------------------------------------------------------------------------

    def _gather(self, fleet: Fleet, by_site: Mapping[str, Link], round: int) -> Iterator[Update]:
        """Ask the sites over their links, and yield the updates that count."""
        self._by_site = dict(by_site)
        gathering = Gathering(
            fleet,
            self.task,
            round,
            messages=partial(self._messages, fleet, round),
            read=partial(self.read, round),
            answered=self._acknowledge,
            forget=self._forget,
        )

        for reply in gathering.of(list(by_site)):
            decoded, update = reply.content
            by_site[reply.site].uplink.fold(reply.site, decoded)
            yield replace(update, weight=reply.weight)

        self._gathered = gathering.metrics()

    def _messages(self, fleet: Fleet, round: int, sites: Sequence[str]) -> dict[str, Payload]:
        """Return the messages for those of `sites` that hold the codec, in order of `sites`."""
        ready = list(sites) if self._handout is None else self._handout.ready(fleet, round, sites)
        by_link: dict[Link, list[str]] = {}
        for site in ready:
            by_link.setdefault(self._by_site[site], []).append(site)

        messages: dict[str, Payload] = {}
        for link, group in by_link.items():
            messages |= link.messages(fleet, round, group)
        return {site: self._with_own(site, messages[site]) for site in ready if site in messages}

    def _with_own(self, site: str, message: Payload) -> Payload:
        """Return the message with the values that are the site's own."""
        if self._handout is None:
            return message
        return Payload(message.tensors, {**message.values, **self._handout.values(site)})

    def read(self, round: int, site: str, reply: Payload) -> Readable[tuple[Decoded, Update]]:
        """Return what a reply of `round` carries; raise `WireError` for one that breaks a rule."""
        rule = self.rule
        if rule.frame_only and reply.values:
            names = sorted(reply.values)[:5]
            raise WireError(f"{self.task}: values {names} came, which epsilon does not count")

        values = () if rule.frame_only else ("n", "loss", *rule.further.names)
        optional = () if rule.frame_only else ("e", *((COMPONENTS,) if rule.components else ()))
        fields(reply, values, FRAME, optional=optional)
        weight = 1 if rule.frame_only else weight_of(reply)
        loss = None if rule.frame_only else loss_of(reply)
        further = rule.further.read(site, reply)
        link = self._by_site.get(site, self.link)
        if COMPONENTS in reply.values:
            decoded, share, length = self._components(link, reply, round)
            update = completed(decoded.update, link.uplink.layout)
        else:
            decoded = link.uplink.decode(reply, round)
            share = 1.0
            update = innovation(link.sent, decoded.update, self.terms.representation)
            update = update if rule.clip is None else rule.clip(update)
            length = rms(update)  # layouts of unequal ranks are compared too

        WeightedMean.check(update, weight)
        if rule.bounded:
            train = self.context.train if rule.training is None else rule.training(site)
            check_length(length, weight, train)

        content = Update(site, update, weight, loss, further, share)
        return Readable((decoded, content), length if rule.compared else 0.0, weight)

    def _components(self, link: Link, reply: Payload, round: int) -> tuple[Decoded, float, float]:
        """Return the components in a reply, their share of the values of a whole update, and the
        root mean square that the site's own update has at least; raises `WireError`."""
        layout = link.uplink.layout
        modules = modules_of(layout.names)
        counts = reply.value(COMPONENTS, list)
        if len(counts) != len(modules) or not all(
            type(count) is int and 0 <= count <= layout.numel for count in counts
        ):
            raise WireError(f"{COMPONENTS}: expected the number of components of each module")

        ranks = dict(zip(modules, cast(list[int], counts), strict=True))
        own = layout_of_ranks(layout, ranks)
        if not 0 < own.numel < layout.numel:
            raise WireError(
                f"{COMPONENTS}: components of {own.numel} values, where an update has "
                f"{layout.numel}"
            )

        decoded = link.uplink.decode_components(reply, own, round)
        length = factor_length(decoded.update, link.sent) / math.sqrt(layout.numel)
        return decoded, own.numel / layout.numel, length

    def _acknowledge(self, site: str) -> None:
        self._by_site[site].acknowledge(site)

    def _forget(self, sites: Sequence[str]) -> None:
        for site in sites:
            self._by_site[site].forget([site])
        if self._handout is not None:
            self._handout.forget(sites)

    # -- state ------------------------------------------------------------------------------------

    def _assigned(self, assignment: Assignment) -> dict[str, Value]:
        """Return the values from which `restore` makes an assignment."""
        assert self._run is not None, "an exchange with assignments has the run's own"
        return assignment.to_values(self._run)

    def state(self) -> Payload:
        """Return all that `restore` needs."""
        others = {
            str(place): join(
                {"assigned": Payload(values=self._assigned(each)), "link": link.state()}
            )
            for place, (each, link) in enumerate(self._others.items())
        }
        return join({"run": self.link.state(), "others": join(others)})

    def restore(self, state: Payload) -> None:
        """Become the exchange whose `state` this was."""
        halves = split(state, ("run", "others"))
        self.link.restore(halves["run"])
        others = halves["others"]
        self._others = {}

        for place in range(len(others.values)):
            stored = split(others, (str(place),))[str(place)]
            entry = split(stored, ("assigned", "link"))
            assert self._run is not None, "an exchange with assignments has the run's own"
            assignment = Assignment.from_values(entry["assigned"].values, self._run)
            self._link(assignment).restore(entry["link"])
