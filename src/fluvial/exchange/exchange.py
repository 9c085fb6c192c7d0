"""The server's half of the exchange: send an adapter to a cohort, receive its updates."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fluvial.errors import ConfigError, WireError, wrong_return
from fluvial.exchange.downlink import Downlink
from fluvial.exchange.fitting import OnRefusal
from fluvial.exchange.gathering import Gathering, Readable
from fluvial.exchange.representation import innovation
from fluvial.exchange.terms import Terms
from fluvial.exchange.uplink import Decoded, Uplink
from fluvial.federation.bounds import check_update
from fluvial.federation.context import Context, Metrics
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import FRAME, fields, loss_of, weight_of
from fluvial.wire.payload import Payload, join, split
from fluvial.wire.tensors import Named, WeightedMean, norm


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


@dataclass(frozen=True)
class Rule:
    """Checks by which a reply becomes an update, beside its decoding; the defaults suit most
    methods."""

    frame_only: bool = False
    """True where the sites add noise and send a frame and nothing else; each counts with 1."""
    clip: Callable[[Named], Named] | None = None
    """Applied to each decoded update, for a bound that its site cannot exceed."""
    bounded: bool = True
    """True where an update that no training of a site can make is refused; noise is longer."""
    compared: bool = True
    """True where a site fails by an update much longer than the others' of its round. Under
    differential privacy of the aggregate, such a failure would tell of the others."""


class Exchange:
    """Both directions between the server and the sites of one layout.

    `Uplink` knows which codec carries updates; `Downlink` knows which adapter each site holds. A
    site that lacks something says so and is sent everything again, so a run never depends on what a
    site remembers.
    """

    def __init__(
        self,
        context: Context,
        adapter: Named,
        terms: Terms,
        *,
        on_refusal: OnRefusal = "refuse",
        rule: Rule = Rule(),
        task: str = "train",
    ) -> None:
        """Begin with `adapter`, which all sites make from the seed."""
        self.context = context
        self.terms = terms
        self.rule = rule
        self.task = task
        self.uplink = Uplink(context, terms, on_refusal=on_refusal)
        self.downlink = Downlink(context.downlink, context.seed, adapter)
        self._gathered: Metrics = {}

    def setup(self, fleet: Fleet) -> Metrics:
        """Fit or choose a codec that learns, measure it, and install it; return the report.

        The report is empty where the terms have no pre-training, so that nothing is measured.
        Raises `GateError` for a codec that does not carry updates.
        """
        return self.uplink.setup(fleet)

    @property
    def sent(self) -> Named:
        """The adapter as sites hold it in this round; their updates are differences to it."""
        return self.downlink.reference

    def updates(
        self, fleet: Fleet, cohort: Sequence[str], adapter: Named, *, round: int
    ) -> Iterator[Update]:
        """Send `adapter` to the cohort, and yield its updates as soon as they count.

        A site that fails is handled as `[fleet]` says. Raises `ClientError` where the quorum is
        missed, and `ConfigError` for an adapter that cannot be sent. After the last update call
        `close`.
        """
        self._check(adapter)
        self.downlink.advance(adapter, round)
        self.uplink.begin(self.sent, round)
        gathering = Gathering(
            fleet,
            self.task,
            round,
            messages=partial(self._messages, fleet, round),
            read=partial(self.read, round),
            answered=self._acknowledge,
            forget=self._forget,
        )

        for reply in gathering.of(cohort):
            decoded, update, loss = reply.content
            self.uplink.fold(reply.site, decoded)
            yield Update(reply.site, update, reply.weight, loss)

        self._gathered = gathering.metrics()

    def close(self, mean: Named, round: int) -> Metrics:
        """End a round; `mean` is the mean of its updates. Return what was seen of the codec."""
        return {**self._gathered, **self.uplink.close(mean, round)}

    def _check(self, adapter: Named) -> None:
        """Raise `ConfigError` for an adapter that the server half has made wrongly."""
        place = f"task {self.task!r}: the adapter that the server half sends"
        for name, tensor in adapter.items():
            if not isinstance(tensor, Tensor):
                raise ConfigError(wrong_return(f"{place}: {name!r}", tensor, "a Tensor", verb="is"))

        try:
            self.downlink.layout.check(adapter, place)
        except WireError as error:
            raise ConfigError(str(error)) from None

    # -- one ask ----------------------------------------------------------------------------------

    def _messages(self, fleet: Fleet, round: int, sites: Sequence[str]) -> dict[str, Payload]:
        """Return the messages for those of `sites` that hold the codec, once it was sent to all."""
        ready = self.uplink.install(fleet, sites, round)
        values = {"round": round, **self.uplink.values()}
        return {site: self.downlink.message(site, values) for site in ready}

    def read(
        self, round: int, _site: str, reply: Payload
    ) -> Readable[tuple[Decoded, Named, float | None]]:
        """Return what a reply of `round` carries; raise `WireError` for one that breaks a rule."""
        rule = self.rule
        if rule.frame_only and reply.values:
            names = sorted(reply.values)[:5]
            raise WireError(f"{self.task}: values {names} came, which epsilon does not count")

        values = () if rule.frame_only else ("n", "loss")
        fields(reply, values, FRAME, optional=() if rule.frame_only else ("e",))
        weight = 1 if rule.frame_only else weight_of(reply)
        decoded = self.uplink.decode(reply, round)
        update = innovation(self.sent, decoded.update, self.terms.representation)

        if rule.clip is not None:
            update = rule.clip(update)
        if rule.bounded:
            check_update(update, weight, self.context.train)
        else:
            WeightedMean.check(update, weight)

        loss = None if rule.frame_only else loss_of(reply)
        length = norm(update) if rule.compared else 0.0
        return Readable((decoded, update, loss), length, weight)

    def _acknowledge(self, site: str) -> None:
        self.downlink.acknowledge(site)
        self.uplink.acknowledge(site)

    def _forget(self, sites: Sequence[str]) -> None:
        self.downlink.forget(sites)
        self.uplink.forget(sites)

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> Payload:
        """Return all that `restore` needs."""
        return join({"uplink": self.uplink.state(), "downlink": self.downlink.state()})

    def restore(self, state: Payload) -> None:
        """Become the exchange whose `state` this was."""
        halves = split(state, ("uplink", "downlink"))
        self.uplink.restore(halves["uplink"])
        self.downlink.restore(halves["downlink"])
