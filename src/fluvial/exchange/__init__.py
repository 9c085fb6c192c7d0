"""Both directions between server and sites, for every method that tunes one shared adapter.

`Uplink` knows which codec carries updates and how it was learned; `Downlink` knows which adapter
every site holds. `Link` asks a cohort through both. A site that cannot follow, because it lost its
state or missed too much, says so and is sent everything again; so a run never depends on what a
site remembers.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from fluvial.codecs.base import Codec
from fluvial.codecs.weighted import weighted
from fluvial.errors import WireError
from fluvial.exchange.downlink import Downlink, receive
from fluvial.exchange.gate import Representation
from fluvial.exchange.tgap import TgapConfig
from fluvial.exchange.uplink import Decoded, OnRefusal, Uplink, check_codec, coded_reply, follow
from fluvial.federation.context import Context, Metrics
from fluvial.federation.fleet import Fleet, Reply
from fluvial.federation.sites import Site
from fluvial.wire.payload import Payload, join, split
from fluvial.wire.tensors import Layout, Named

T = TypeVar("T")

STALE = Payload(values={"stale": True})
"""A site's answer when it needs the codec and the adapter anew."""


class Link:
    """The server's half."""

    def __init__(
        self,
        context: Context,
        layout: Layout,
        adapter: Named,
        tgap: TgapConfig,
        *,
        representation: Representation = "delta",
        on_refusal: OnRefusal = "refuse",
    ) -> None:
        """`layout` is of what sites send, `adapter` what all sites start from."""
        self.uplink = Uplink(context, layout, tgap, representation, on_refusal)
        self.downlink = Downlink(context.downlink, context.seed, adapter)

    def setup(self, fleet: Fleet, method: Any) -> Metrics:
        """Learn or choose the codec and install it; `method` is the config that simulated sites
        need."""
        return self.uplink.setup(fleet, method)

    @property
    def sent(self) -> Named:
        """The adapter as sites hold it in this round; their updates are differences to it."""
        return self.downlink.reference

    def ask(
        self,
        fleet: Fleet,
        task: str,
        cohort: Sequence[str],
        adapter: Named,
        *,
        round: int,
        read: Callable[[str, Payload], T],
    ) -> Iterator[Reply[T]]:
        """Send the cohort `adapter` with the values `round` and `step`; yields the replies,
        read."""
        self.downlink.advance(adapter, round)
        self.uplink.advance(self.sent, round)
        answered, stale = yield from self._ask(
            fleet, task, cohort, round, partial(_or_stale, read=read)
        )

        if stale:
            self.downlink.forget(stale)
            self.uplink.forget(stale)
            more, _ = yield from self._ask(
                fleet, task, stale, round, partial(_not_stale, read=read)
            )
            answered += more

        fleet.require_quorum(task, round, answered=answered, asked=len(cohort))

    def _ask(
        self,
        fleet: Fleet,
        task: str,
        sites: Sequence[str],
        round: int,
        read: Callable[[str, Payload], T | None],
    ) -> Generator[Reply[T], None, tuple[int, list[str]]]:
        """Ask some sites of a round; returns how many answered, and those that need everything
        anew.

        A site that does not take the codec has failed, and is asked nothing further in this round.
        """
        ready = self.uplink.install(fleet, sites, round)
        values = {"round": round, **self.uplink.values()}
        messages = {site: self.downlink.message(site, values) for site in ready}
        answered = 0
        stale = []

        for reply in fleet.ask(task, messages, round=round, read=read, alone=False):
            if reply.content is None:
                stale.append(reply.site)
                continue

            self.downlink.acknowledge(reply.site)
            self.uplink.acknowledge(reply.site)
            answered += 1
            yield Reply(reply.site, reply.content, reply.bytes_down, reply.bytes_up, reply.seconds)

        return answered, sorted(stale)

    def state(self) -> Payload:
        """All that `restore` needs."""
        return join({"uplink": self.uplink.state(), "downlink": self.downlink.state()})

    def restore(self, state: Payload) -> None:
        """See `state`."""
        parts = split(state, ("uplink", "downlink"))
        self.uplink.restore(parts["uplink"])
        self.downlink.restore(parts["downlink"])


def is_stale(reply: Payload) -> bool:
    """Return whether a reply is `STALE` and nothing else."""
    return reply.values == STALE.values and not reply.tensors


def _or_stale(site: str, reply: Payload, *, read: Callable[[str, Payload], T]) -> T | None:
    return None if is_stale(reply) else read(site, reply)


def _not_stale(site: str, reply: Payload, *, read: Callable[[str, Payload], T]) -> T:
    if is_stale(reply):
        raise WireError("the site cannot follow even after everything was sent again")
    return read(site, reply)


def open_link(site: Site, message: Payload, layout: Layout) -> tuple[Named, Codec] | None:
    """The site's half: the adapter that `message` brings and the codec to answer with; None answers
    `STALE`."""
    received = receive(site, message)
    codec = None if received is None else follow(site, received, message, layout)
    return None if received is None or codec is None else (received, weighted(codec, received))


__all__ = [
    "STALE",
    "Decoded",
    "Link",
    "OnRefusal",
    "TgapConfig",
    "check_codec",
    "coded_reply",
    "is_stale",
    "open_link",
]
