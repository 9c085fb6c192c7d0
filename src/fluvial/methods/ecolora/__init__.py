"""EcoLoRA: a segment at a time, sparse with feedback, Golomb-coded.

Liu, Wen, Nair, Liu, Lou, Zhang, Yeoh, Vorobeychik, Zhang, "EcoLoRA: Communication-Efficient
Federated Fine-Tuning of Large Language Models", EMNLP 2025, https://arxiv.org/abs/2506.02001.

Every site sends one of N_s segments of the adapter, another one in every round, and the server
averages each segment over the sites that sent it. In both directions only the largest changes are
sent, fewer as the loss falls and fewer of B than of A; what is left out is kept and added the next
time.
A site starts from a mix of the global adapter and its own last one, so that the work on segments
whose turn it was not is not lost.

Each site sends another segment, so of the exchange it uses the gathering of replies: reading,
bounds, failures, quorum, and sites that lost what they kept.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fluvial.codecs.golomb import SparseFrames, rounded
from fluvial.codecs.quantise import Floats, to_numpy
from fluvial.errors import WireError
from fluvial.exchange import STALE, Gathering, Readable
from fluvial.federation.bounds import rms
from fluvial.federation.cohort import sample
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import read_counted
from fluvial.federation.sites import Site, round_of, train_locally
from fluvial.methods.ecolora.config import EcoLoraConfig, check_segments
from fluvial.methods.ecolora.forecast import predict
from fluvial.methods.ecolora.segments import Slice, Sparsifier, mix, segment, share, turn
from fluvial.methods.idle import idle_bounds, idle_fraction
from fluvial.methods.interface import (
    Context,
    Given,
    Method,
    Metrics,
    Plan,
    Traits,
)
from fluvial.methods.planning import OWN_CODE, uncoded
from fluvial.methods.shared import SharedModelServer
from fluvial.methods.traffic import Measured
from fluvial.models.states import initial_state
from fluvial.wire.payload import Payload, Value, frame_payload, payload_frame
from fluvial.wire.tensors import Named, WeightedMean


class EcoLoraServer(SharedModelServer):
    """Server half: the global adapter, the sites' view of it, and when each site last answered.

    `view` is the same for all sites that are up to date. A site gets the present
    values of all places that changed since it last answered, so that one that was away loses
    nothing, and nothing drifts apart.
    """

    def __init__(self, config: EcoLoraConfig, context: Context) -> None:
        self.config = config
        self.context = context
        layout = context.layout
        self.frames = SparseFrames(layout, config.values)
        self.sparsifier = Sparsifier(layout)
        self.spans = [
            segment(number, config.segments, layout.numel) for number in range(config.segments)
        ]
        self.uploads = [
            SparseFrames(layout, config.values, span.start, span.stop) for span in self.spans
        ]
        self.adapter = to_numpy(layout.flatten(initial_state(layout, context.seed)))
        self.view = rounded(self.adapter, config.values)
        self.changed = np.zeros(layout.numel, dtype=np.int32)
        """Round in which a place of `view` last changed; 0 for never."""
        self.answered: dict[str, int] = {}
        """Round whose `view` a site has."""
        self.losses: list[float] = []
        """Mean training losses of the first and of the last round."""

    def setup(self, fleet: Fleet) -> Metrics:  # noqa: ARG002 - nothing to agree on
        """Return no metrics: the initial adapter follows from the seed."""
        return {}

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Run one round: sparse download, local training, a segment from each site, their means."""
        config = self.config
        fallen = self.losses[0] - self.losses[-1] if self.losses else 0.0
        share_a = share(config.least_a, config.most, config.gamma_a, fallen)
        share_b = share(config.least_b, config.most, config.gamma_b, fallen)
        self._broadcast(number, share_a, share_b)
        cohort = sample(fleet.sites, config.fraction, seed=self.context.seed, round=number)
        asked = {site: turn(place, number, config.segments) for place, site in enumerate(cohort)}
        gathering = Gathering(
            fleet,
            "train",
            number,
            messages=partial(self._messages, asked, number, [share_a, share_b]),
            read=partial(self._read, asked, number),
            answered=partial(self._acknowledge, number),
            forget=self._forget,
        )
        means = [WeightedMean() for _ in self.spans]
        loss = WeightedMean()

        for reply in gathering.of(cohort):
            update, site_loss = reply.content
            means[asked[reply.site]].add(update, reply.weight)
            loss.add(site_loss, reply.weight)

        for span, mean in zip(self.spans, means, strict=True):
            if mean.count:
                self.adapter[span.start : span.stop] += to_numpy(mean.mean()["segment"])

        self.losses = [*self.losses[:1], float(loss.mean()["loss"])]
        covered = sum(mean.count > 0 for mean in means)
        metrics = {
            "loss": self.losses[-1],
            "sites": loss.count,
            "segments": covered,
            "share_a": share_a,
            "share_b": share_b,
        }
        return {**metrics, **gathering.metrics()}

    def _acknowledge(self, round: int, site: str) -> None:
        """Note that `site` has the view of `round`."""
        self.answered[site] = round

    def _forget(self, sites: Sequence[str]) -> None:
        """Note that these sites lost what they kept, and begin from the initial adapter."""
        for site in sites:
            self.answered.pop(site, None)

    def _broadcast(self, round: int, share_a: float, share_b: float) -> None:
        """Bring the largest differences into `view`.

        What is left out stays a difference, and so is fed back.
        """
        present = rounded(self.adapter, self.config.values)
        whole = Slice(0, len(present))
        where = self.sparsifier.choose(present - self.view, whole, share_a, share_b)
        self.view[where] = present[where]
        self.changed[where] = round

    def _messages(
        self, asked: Mapping[str, int], round: int, shares: list[float], sites: Sequence[str]
    ) -> dict[str, Payload]:
        """Return what `sites` receive: all places that changed since each of them answered."""
        frames: dict[int, bytes] = {}
        messages = {}

        for site in sites:
            since = self.answered.get(site, 0)
            if since not in frames:
                places = np.flatnonzero(self.changed > since)
                frames[since] = self.frames.encode(self.view, places, round=round)
            messages[site] = frame_payload(
                frames[since], round=round, since=since, segment=asked[site], share=[*shares]
            )

        return messages

    def _read(
        self, asked: Mapping[str, int], round: int, site: str, reply: Payload
    ) -> Readable[tuple[Named, Named]]:
        number = reply.whole("segment", 0, len(self.spans) - 1)
        if number != asked[site]:
            raise WireError(f"it sent segment {number} and was asked for {asked[site]}")

        def decode(frame: bytes) -> Named:
            vector = self.uploads[number].decode_dense(frame, round=round)
            return {"segment": torch.from_numpy(vector)}

        train = self.context.train
        update, weight, site_loss = read_counted(reply, decode, train, extra=("segment",))
        loss = {"loss": torch.tensor([site_loss])}
        WeightedMean.check(loss, weight)

        return Readable((update, loss), rms(update), weight)

    def model(self) -> Named:
        """Return the global adapter, as the server has it."""
        return self.context.layout.unflatten(torch.from_numpy(self.adapter.copy()))

    def state(self) -> Payload:
        """Return vectors of all values in layout order, the sites' rounds, the losses."""
        tensors = {"adapter": self.adapter, "view": self.view, "changed": self.changed}
        values: dict[str, Value] = {"answered": {**self.answered}, "losses": [*self.losses]}

        return Payload(
            {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, values
        )

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        total = len(self.adapter)
        self.adapter = vector(state, "adapter", torch.float32, total)
        self.view = vector(state, "view", torch.float32, total)
        self.changed = vector(state, "changed", torch.int32, total)
        self.answered = state.value("answered", dict)
        self.losses = state.value("losses", list)


def vector(stored: Payload, name: str, dtype: torch.dtype, total: int) -> NDArray[Any]:
    """Return a copy of a vector; raises `WireError` unless it has `total` values of `dtype`."""
    tensor = stored.tensor(name)
    if tensor.dtype != dtype or tensor.shape != (total,):
        raise WireError(
            f"{name}: expected {dtype} ({total},), found {tensor.dtype} {tuple(tensor.shape)}"
        )

    return tensor.numpy().copy()


@dataclass
class SiteState:
    """State of a site after round `round`, 0 for the start; vectors are in layout order."""

    view: Floats
    """Global adapter, as far as it was sent."""
    local: Floats
    """Adapter of the site after its last training."""
    residual: Floats
    """Changes that the site left out of the segments that it sent."""
    round: int

    @classmethod
    def recall(cls, site: Site, since: int) -> "SiteState | None":
        """Return the state after round `since`; None if it is of another round, or is lost."""
        layout = site.layout
        total = site.layout.numel

        if since == 0:
            initial = to_numpy(layout.flatten(initial_state(layout, site.seed)))
            start = rounded(initial, site.method.values)
            return cls(start, start, np.zeros(total, dtype=np.float32), 0)

        stored = site.recall("ecolora")
        if not stored.tensors or stored.value("round", int) != since:
            return None

        view, local, residual = (
            vector(stored, name, torch.float32, total) for name in ("view", "local", "residual")
        )
        return cls(view, local, residual, since)

    def keep(self, site: Site) -> None:
        """Keep this state at `site`."""
        tensors = {"view": self.view, "local": self.local, "residual": self.residual}
        payload = Payload(
            {name: torch.from_numpy(array) for name, array in tensors.items()},
            {"round": self.round},
        )
        site.keep("ecolora", payload)


def train(site: Site, message: Payload) -> Payload:
    """Tune a mix of the global and the own adapter; send the largest changes of one segment."""
    config: EcoLoraConfig = site.method
    layout = site.layout
    round = round_of(site, message)
    since = message.whole("since", 0, site.rounds)
    number, (share_a, share_b) = _asked(message, config)
    old = SiteState.recall(site, since)
    if old is None:
        return STALE

    view = old.view.copy()
    where, values = SparseFrames(layout, config.values).decode(payload_frame(message), round=round)
    view[where] = values
    weight = (
        math.exp(-config.beta * (round - since)) if since and config.mixing == "staleness" else 0.0
    )
    start = mix(old.local, view, weight)
    examples = site.load().train
    update, report = train_locally(
        site, layout.unflatten(torch.from_numpy(start)), round, examples=examples
    )
    change = (start - view) + to_numpy(layout.flatten(update))
    span = segment(number, config.segments, layout.numel)
    due = change[span.start : span.stop] + old.residual[span.start : span.stop]
    chosen = Sparsifier(layout).choose(due, span, share_a, share_b)
    residual = old.residual.copy()
    residual[span.start : span.stop] = due
    residual[span.start + chosen] -= rounded(due[chosen], config.values)
    SiteState(view, view + change, residual, round).keep(site)
    frame = SparseFrames(layout, config.values, span.start, span.stop).encode(
        due, chosen, round=round
    )

    return frame_payload(frame, n=len(examples), loss=report.loss, segment=number)


def _asked(message: Payload, config: EcoLoraConfig) -> tuple[int, list[float]]:
    """Return the segment and the two shares that the server asks for; raises `WireError`."""
    number = message.value("segment", int)
    shares = message.value("share", list)

    if not 0 <= number < config.segments:
        raise WireError(f"segment {number} of {config.segments}")
    if len(shares) != 2 or not all(
        isinstance(fraction, float) and 0 < fraction <= 1 for fraction in shares
    ):
        raise WireError(f"share={shares!r:.40}, expected two numbers above 0 and at most 1")

    return number, shares


def plan(config: EcoLoraConfig, given: Given) -> Plan:
    """Refuse more segments than there are values."""
    check_segments(config, given.layout)
    traffic = partial(predict, config, given)
    measured = Measured.of(given.layout)
    forecast = partial(uncoded, config, given, traffic, given.layout, OWN_CODE, measured)
    cohort = config.cohort(given.sites)
    idle = {
        **config.idle(cohort),
        **idle_bounds(cohort),
        **idle_fraction(config, given.sites),
    }
    return Plan(given.layout, forecast, idle=idle, later=config.later(given.rounds))


METHOD = Method(
    EcoLoraConfig,
    EcoLoraServer,
    {"train": train},
    paper="Liu, Wen, Nair, Liu, Lou, Zhang, Yeoh, Vorobeychik, Zhang, EcoLoRA: "
    "Communication-Efficient Federated Fine-Tuning of Large Language Models, EMNLP 2025, "
    "https://arxiv.org/abs/2506.02001",
    plan=plan,
    traits=Traits("EcoLoRA", sends="own code", receives="own code"),
)
