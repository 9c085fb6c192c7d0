"""A link: both directions between the server and the sites of one assignment."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Self

from fluvial.exchange.downlink import Downlink
from fluvial.exchange.fitting import OnRefusal
from fluvial.exchange.terms import Terms
from fluvial.exchange.uplink import Uplink
from fluvial.federation.context import Context
from fluvial.federation.fleet import Fleet
from fluvial.models.assignment import Assignment
from fluvial.models.states import initial_state
from fluvial.wire.payload import Payload, Value, join, split
from fluvial.wire.tensors import Named


class Link:
    """The codec of updates, and the adapter as sites hold it, for sites of equal layouts."""

    def __init__(
        self,
        context: Context,
        adapter: Named,
        terms: Terms,
        *,
        on_refusal: OnRefusal = "refuse",
        values: Mapping[str, Value] | None = None,
    ) -> None:
        """Begin with `adapter`, which the sites make from the seed.

        `context` has the layout that they train; `values` go with every message.
        """
        self.uplink = Uplink(context, terms, on_refusal=on_refusal)
        self.downlink = Downlink(context.downlink, context.seed, adapter, terms.factors)
        self.values = dict(values or {})

    @classmethod
    def of(
        cls,
        assignment: Assignment,
        context: Context,
        terms: Terms,
        *,
        values: Mapping[str, Value],
    ) -> Self:
        """Return the link to sites that have `assignment`; `values` go with every message."""
        return cls(
            replace(context, layout=assignment.trained),
            initial_state(assignment.layout, context.seed),
            terms,
            values=values,
        )

    @property
    def sent(self) -> Named:
        """The adapter as sites hold it in this round; their updates are differences to it."""
        return self.downlink.reference

    def begin(self, adapter: Named, round: int) -> None:
        """Begin a round in which sites receive `adapter`, or its coded image."""
        self.downlink.advance(adapter, round)
        self.uplink.begin(self.sent, round)

    def messages(self, fleet: Fleet, round: int, sites: Sequence[str]) -> dict[str, Payload]:
        """Return the messages for those of `sites` that hold the codec, once it was sent to all."""
        ready = self.uplink.install(fleet, sites, round)
        values = {"round": round, **self.values, **self.uplink.values()}
        return {site: self.downlink.message(site, values) for site in ready}

    def acknowledge(self, site: str) -> None:
        """Note that `site` has answered the last message."""
        self.downlink.acknowledge(site)
        self.uplink.acknowledge(site)

    def forget(self, sites: Iterable[str]) -> None:
        """Note that these sites must be sent everything again."""
        self.downlink.forget(sites)
        self.uplink.forget(sites)

    def state(self) -> Payload:
        """Return all that `restore` needs."""
        return join({"uplink": self.uplink.state(), "downlink": self.downlink.state()})

    def restore(self, state: Payload) -> None:
        """Become the link whose `state` this was."""
        halves = split(state, ("uplink", "downlink"))
        self.uplink.restore(halves["uplink"])
        self.downlink.restore(halves["downlink"])
