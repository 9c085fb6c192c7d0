"""Tasks of a site at TGAP: train on D1, sum up its moments, measure a codec."""

from collections.abc import Sequence

from fluvial.codecs import must_learn
from fluvial.codecs.auto import AutoSettings
from fluvial.codecs.base import Snapshot
from fluvial.codecs.klt.moments import Moments
from fluvial.codecs.quantise import Identity
from fluvial.errors import WireError
from fluvial.exchange.probe import Probe
from fluvial.exchange.representation import coded_object
from fluvial.exchange.start import adapter_or_start
from fluvial.exchange.terms import Terms
from fluvial.exchange.tgap import d1_of
from fluvial.exchange.versions import install_codec, site_codec
from fluvial.federation.sites import Site, train_locally
from fluvial.wire.payload import Payload, frame_payload, join, split
from fluvial.wire.tensors import Layout, moved


def snapshot(site: Site, message: Payload, terms: Terms) -> Payload:
    """Train on D1 and send the raw update, or keep what is asked for later.

    With source "sites-covariance" the site continues from its own adapter, which the server
    does not have.
    """
    tgap = terms.tgap
    round = message.whole("round", 1, tgap.rounds)
    received = adapter_or_start(site, message, site.layout)
    if isinstance(received, Payload):
        return received

    if tgap.source == "sites-covariance":
        received = site.recall("tgap").tensors or received

    data = site.load().train
    examples = data if tgap.source == "public" else d1_of(data, tgap.share)
    update, report = train_locally(
        site, received, round, examples=examples, factors=terms.trained, purpose="tgap"
    )

    if tgap.source == "sites-covariance":
        site.keep("tgap", Payload(moved(received, update)))
        _remember(site, Snapshot(site.name, round, received, update), terms)
        return Payload()

    raw = Identity.of(Layout.of(update)).encode(update, round=round)
    return frame_payload(raw, n=len(examples), loss=report.loss)


def _remember(site: Site, new: Snapshot, terms: Terms) -> None:
    """Keep the moments of a snapshot that the fit sees, or a held-out one as it is."""
    training_rounds = terms.tgap.training_rounds
    if new.round > training_rounds:
        earlier = split_snapshots(site.recall("heldout"), site.name)
        site.keep("heldout", join_snapshots([*earlier, new]))
        return

    layout = Layout.of(new.update)
    moments = Moments.of(layout, coded_object(new.received, new.update, terms.representation))
    before = site.recall("moments")

    if before.values:
        moments = Moments.read(layout, before, most=training_rounds) + moments

    site.keep("moments", moments.payload())


def send_moments(site: Site, message: Payload) -> Payload:  # noqa: ARG001 - it is empty
    """Send the moments summed up over the rounds, and drop them."""
    moments = site.recall("moments")
    if not moments.values:
        raise WireError(f"site {site.name!r} has seen no update that it could sum up")
    site.keep("moments", Payload())
    return moments


def probe(site: Site, message: Payload, terms: Terms) -> Payload:
    """Install a codec, and measure it on the held-out snapshots, which stay here."""
    if must_learn(site.codec):
        install_codec(site, message)

    heldout = split_snapshots(site.recall("heldout"), site.name)
    if not heldout:
        raise WireError(f"site {site.name!r} holds no snapshots to measure a codec on")

    codec = site_codec(site, Layout.of(heldout[0].update))
    fed_back = isinstance(site.codec, AutoSettings) and codec.settings.error_feedback
    return Probe.of(codec, heldout, terms.representation, fed_back=fed_back).payload()


def join_snapshots(snapshots: Sequence[Snapshot]) -> Payload:
    """Return the snapshots of one site, as it stores them."""
    rounds = {
        str(taken.round): join({"from": Payload(taken.received), "by": Payload(taken.update)})
        for taken in snapshots
    }
    return join(rounds)


def split_snapshots(stored: Payload, site: str) -> list[Snapshot]:
    """Return what `join_snapshots` joined, by round.

    Tensors are sorted by name, because sums depend on the order.
    """
    snapshots = []
    for number in sorted(map(int, stored.values)):
        halves = split(split(stored, (str(number),))[str(number)], ("from", "by"))
        received, update = (dict(sorted(halves[half].tensors.items())) for half in ("from", "by"))
        snapshots.append(Snapshot(site, number, received, update))

    return snapshots
