"""The site's half of the exchange: receive an adapter, train, send the update."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fluvial.codecs import CodecSettings, build
from fluvial.codecs.base import Codec, RatedCodec
from fluvial.data import Example
from fluvial.errors import ConfigError, RefusalError, WireError, check_call, wrong_return
from fluvial.exchange import tgap_tasks
from fluvial.exchange.checks import can_code
from fluvial.exchange.coding import Coder, Plain
from fluvial.exchange.downlink import receive
from fluvial.exchange.feedback import RESIDUAL, share_lost
from fluvial.exchange.gathering import STALE
from fluvial.exchange.refit import follow
from fluvial.exchange.representation import coded_object
from fluvial.exchange.rule import COMPONENTS
from fluvial.exchange.terms import Terms
from fluvial.exchange.tgap import after_tgap
from fluvial.exchange.uplink import coder_of, reports_error
from fluvial.exchange.versions import INSTALL, install_codec, site_codec
from fluvial.federation.adapters import leading, modules_of
from fluvial.federation.sites import Site, Task, round_of
from fluvial.models.adapters import module_of
from fluvial.seeds import derive
from fluvial.wire.payload import Payload, Value, frame_payload
from fluvial.wire.tensors import Layout, Named, factor, subtract


@dataclass(frozen=True)
class LocalUpdate:
    """Result of the training at a site."""

    tensors: Named
    """Difference to the adapter that it received, fp32."""
    samples: int
    """Sequences that it was trained on; the weight of the update."""
    loss: float
    """Mean training loss, nats per label token."""
    further: Mapping[str, Value] = field(default_factory=dict)
    """Further values of the reply, which the server's `Rule.further` reads."""
    share: float = 1.0
    """Share of the update's values that are sent; below 1, the largest components of the change of
    the products, for a rule with `components`."""


LocalTraining = Callable[[Site, Named, int, Sequence[Example]], LocalUpdate]
"""Trains at a site: from an adapter, in a round, on examples."""
MakeTerms = Callable[[Any, CodecSettings], Terms]
"""Makes the terms of a method from its config and the run's codec; both ends call it."""


def encode(
    site: Site, coder: Coder, update: Named, round: int, *, suffix: str = ""
) -> tuple[bytes, dict[str, Payload]]:
    """Return the frame for `update`, and the coder's state, which the site keeps with its answer.

    Slots are those of the coder with `suffix`, for a site with several layouts.
    """
    with site.stopwatch.time("coding"):
        before = {slot: site.recall(slot + suffix) for slot in coder.slots}
        seed = derive(site.seed, "codec", round, site.name)
        frame, after = coder.encode(update, before, seed=seed, round=round)

    for slot, payload in after.items():
        site.keep(slot + suffix, payload)

    return frame, after


@dataclass(frozen=True)
class Received:
    """Content of a message of the exchange, at a site."""

    adapter: Named
    """The adapter to train, as the server knows that the site holds it."""
    codec: Codec
    """The codec to answer with, of what is sent, at the rate of the round."""
    terms: Terms
    round: int

    def examples(self, site: Site) -> Sequence[Example]:
        """Return the sequences that a round trains on: all that TGAP does not take."""
        return after_tgap(site.load().train, self.terms.tgap)

    def reply(self, site: Site, update: LocalUpdate) -> Payload:
        """Return the site's answer: the frame, sample count, loss, the further values of `update`,
        and the codec's relative squared error where the server needs it."""
        if update.share < 1:
            components = self._leading(update)
            if components is not None:
                return self._partial(site, update, components)

        coder = coder_of(self.codec, self.adapter, basis=self.terms.basis)
        coded = coded_object(self.adapter, update.tensors, self.terms.representation)
        frame, after = encode(site, coder, coded, self.round)
        values = _values_of(update)
        if RESIDUAL in after:
            values["e"] = _rounded(after[RESIDUAL].value("error", float))
        elif reports_error(self.codec.settings):
            lost = subtract(coded, coder.decode(frame))
            values["e"] = _rounded(share_lost(lost, coded))

        return frame_payload(frame, **values)

    def _leading(self, update: LocalUpdate) -> Named | None:
        """Return the largest components of the change, as many as `update.share` has room for, or
        more where the codec's rate leaves these no bytes; None where only the whole is left."""
        share = update.share
        while share < 1:
            components = leading(self.adapter, update.tensors, share)
            layout = Layout.of(components)
            if layout.numel >= Layout.of(update.tensors).numel:
                return None
            if can_code(self.codec.settings, layout):
                return components
            share *= 2

        return None

    def _partial(self, site: Site, update: LocalUpdate, components: Named) -> Payload:
        """Return the answer with `components` of the change, and their number in each module."""
        ranks = dict.fromkeys(modules_of(update.tensors), 0)
        ranks |= {
            module_of(name): tensor.shape[0]
            for name, tensor in components.items()
            if factor(name) == "A"
        }
        codec = build(self.codec.settings, Layout.of(components))
        frame, _ = encode(site, Plain(codec), components, self.round)
        values = _values_of(update)
        values[COMPONENTS] = [*ranks.values()]
        return frame_payload(frame, **values)


def _values_of(update: LocalUpdate) -> dict[str, Value]:
    """Return the values that every answer has."""
    return {"n": update.samples, "loss": _rounded(update.loss), **update.further}


def _rounded(value: float) -> float:
    """Return a number with six significant digits, all that a reply has of a loss or an error."""
    return float(f"{value:.6g}")


def receive_exchange(site: Site, message: Payload, terms: Terms) -> Received | Payload:
    """Return what `message` brings, or the site's answer where it lacks what that builds on.

    Raises `WireError` for a message that the server's half did not make.
    """
    with site.stopwatch.time("coding"):
        adapter = receive(site, message, terms.factors)
    if isinstance(adapter, Payload):
        return adapter

    codec = site_codec(site, terms.sent(site.trained))
    followed = follow(site, codec, adapter, message, terms.pretraining(site.codec))
    if followed is None:
        return STALE

    rated = _at_rate(followed, message) if "rate" in message.values else followed
    return Received(adapter, rated, terms, round_of(site, message))


def _at_rate(codec: Codec, message: Payload) -> Codec:
    """Return the codec at the rate in a message; raise `WireError` for one that it cannot have."""
    rate = message.number("rate", 1.0, 1e6)
    if not isinstance(codec, RatedCodec) or not codec.settings.snr_driven:
        raise WireError("message value 'rate': the codec of this run has a fixed rate")
    try:
        return codec.at_rate(rate)
    except ConfigError as error:
        raise WireError(f"message value 'rate': {error}") from None


def check_update(update: LocalUpdate, layout: Layout, train: str) -> None:
    """Raise `RefusalError` or `WireError` unless an update has tensors of `layout` and a number as
    its loss; `train` names the function."""
    tensors: object = update.tensors
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise RefusalError(
            f"{train}: LocalUpdate.tensors is not a dict from names to torch tensors"
        )

    layout.check(tensors, f"LocalUpdate.tensors of {train}")
    if not _is_finite_number(update.loss):
        raise RefusalError(f"{train}: LocalUpdate.loss is not a finite number")


def _is_finite_number(value: float) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:  # no number at all
        return False


def shared(train: LocalTraining, make_terms: MakeTerms) -> Task:
    """Return the task that receives an adapter, calls `train`, and sends the update."""
    check_call("train of a method", train, "site", "received", "round", "examples")

    def task(site: Site, message: Payload) -> Payload:
        """Receive the adapter, train, and send the update."""
        received = receive_exchange(site, message, make_terms(site.method, site.codec))
        if isinstance(received, Payload):
            return received

        update: object = train(site, received.adapter, received.round, received.examples(site))
        if not isinstance(update, LocalUpdate):
            raise RefusalError(wrong_return(site.of_method("train"), update, "a LocalUpdate"))

        check_update(update, received.terms.sent(site.trained), site.of_method("train"))
        return received.reply(site, update)

    return task


def shared_tasks(train: Task, make_terms: MakeTerms) -> dict[str, Task]:
    """Return all tasks of a method whose sites share one adapter.

    Beside `train`, usually made by `shared`, they install a codec, and take part in TGAP.
    """

    def snapshot(site: Site, message: Payload) -> Payload:
        """Train on D1, and send or keep the raw update."""
        return tgap_tasks.snapshot(site, message, make_terms(site.method, site.codec))

    def probe(site: Site, message: Payload) -> Payload:
        """Measure a codec on the held-out updates."""
        return tgap_tasks.probe(site, message, make_terms(site.method, site.codec))

    return {
        "train": train,
        INSTALL: install_codec,
        "snapshot": snapshot,
        "moments": tgap_tasks.send_moments,
        "probe": probe,
    }
