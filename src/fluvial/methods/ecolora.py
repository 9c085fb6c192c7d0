"""EcoLoRA: a segment at a time, sparse with feedback, Golomb-coded.

Liu, Wen, Nair, Liu, Lou, Zhang, Yeoh, Vorobeychik, Zhang, "EcoLoRA: Communication-Efficient
Federated Fine-Tuning of Large Language Models", EMNLP 2025, https://arxiv.org/abs/2506.02001.

Every site sends one of N_s segments of the adapter, another one in every round, and the server
averages each segment over the sites that sent it. Both ways only the largest changes are sent,
fewer as the loss falls and fewer of B than of A; what is left out is kept and added the next time.
A site starts from a mix of the global adapter and its own last one, so that the work on segments
whose turn it was not is not lost.

Each site sends another segment, so of the exchange it uses the gathering of replies: reading,
bounds, failures, quorum, and sites that lost what they kept.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fluvial.codecs.golomb import Indices, SparseFrames, Values, largest, rounded
from fluvial.codecs.quantise import Floats, to_numpy
from fluvial.errors import ConfigError, WireError
from fluvial.exchange import STALE, Gathering, Readable
from fluvial.federation.bounds import rms
from fluvial.federation.fleet import Fleet, sample
from fluvial.federation.replies import FRAME, fields, loss_of, weight_of
from fluvial.federation.sites import Site, round_of, train_locally
from fluvial.methods.interface import (
    Context,
    Given,
    Method,
    Metrics,
    Plan,
    SampledSettings,
    Traits,
)
from fluvial.methods.planning import uncoded
from fluvial.methods.shared import SharedModelServer
from fluvial.methods.traffic import FULL_LOSS, Bytes, Traffic, answer, envelope
from fluvial.models.states import initial_state
from fluvial.wire.payload import Payload, Value, frame_payload, payload_frame
from fluvial.wire.tensors import Layout, Named, WeightedMean, factor


class EcoLoraConfig(SampledSettings):
    """EcoLoRA; with one segment, nothing left out, fp32 and no mixing it is FedAvg."""

    name: Literal["ecolora"] = "ecolora"
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort; 0.1 of 100 in the paper."""
    segments: int = Field(5, ge=1, le=10**6)
    """Number N_s of segments; the cohort should have at least as many sites, or a segment is missing
    in some rounds."""
    most: float = Field(0.95, ge=1e-4, le=1)
    """Share k_max of the values that is sent in round 1."""
    least_a: float = Field(0.6, ge=1e-4, le=1)
    """Share k_min of A, which is approached as the loss falls."""
    least_b: float = Field(0.5, ge=1e-4, le=1)
    """Share k_min of B, whose changes are concentrated in fewer values."""
    gamma_a: float = Field(1.0, ge=0, le=1e6)
    """Rate at which the share of A falls, per nat of training loss (ours; see the method's
    page)."""
    gamma_b: float = Field(2.0, ge=0, le=1e6)
    """The same for B (ours)."""
    mixing: Literal["staleness", "none"] = "staleness"
    """Start of a site: the global adapter mixed with its own last one, or the global one alone."""
    beta: float = Field(1.0, ge=1e-6, le=1e6)
    """Rate at which the weight of the site's own adapter, of s rounds ago, falls: exp(-beta * s)
    (ours)."""
    values: Values = "fp16"
    """Form of a value on the wire."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.most < max(self.least_a, self.least_b):
            yield (
                f"most={self.most} is below least_a={self.least_a} or least_b={self.least_b}; "
                "raise it"
            )
        if self.mixing == "none" and self.beta != type(self).model_fields["beta"].default:
            yield "beta: without effect under mixing='none'; remove it"


@dataclass(frozen=True)
class Slice:
    """Range `start` to `stop` of the values of the flattened adapter."""

    start: int
    stop: int


def segment(number: int, segments: int, total: int) -> Slice:
    """Return segment `number` of `segments` of nearly equal size."""
    return Slice(number * total // segments, (number + 1) * total // segments)


def turn(place: int, round: int, segments: int) -> int:
    """Return the segment that the site at `place` in the cohort sends in `round`.

    It is (place + round) mod N_s.
    """
    return (place + round) % segments


def share(least: float, most: float, gamma: float, fallen: float) -> float:
    """Return k = k_min + (k_max - k_min) exp(-gamma * fallen), at most k_max.

    The loss has fallen by `fallen` nats. k is rounded to four places, as it is sent.
    """
    return round(least + (most - least) * math.exp(-gamma * max(fallen, 0.0)), 4)


def mix(ours: Floats, others: Floats, weight: float) -> Floats:
    """Return (1 - weight) * others + weight * ours; exactly `others` at weight 0."""
    return others + np.float32(weight) * (ours - others)


class Sparsifier:
    """Choice of the values that are sent: the largest of A and of B, a share of each."""

    def __init__(self, layout: Layout) -> None:
        kinds = [
            np.full(size, factor(name) == "B")
            for name, size in zip(layout.names, layout.sizes, strict=True)
        ]
        self._is_b: NDArray[np.bool_] = np.concatenate(kinds)

    def choose(self, change: Floats, span: Slice, share_a: float, share_b: float) -> Indices:
        """Return positions within `span`, rising; change (span.stop - span.start,)."""
        chosen = []
        for is_b, fraction in ((False, share_a), (True, share_b)):
            places = np.flatnonzero(self._is_b[span.start : span.stop] == is_b)
            count = math.ceil(fraction * len(places))
            chosen.append(places[largest(abs(change[places]), count)])

        return np.sort(np.concatenate(chosen))

    def count(self, span: Slice, share_a: float, share_b: float) -> int:
        """Return the number of values that `choose` returns where none of them is 0."""
        is_b = self._is_b[span.start : span.stop]
        return math.ceil(share_b * int(is_b.sum())) + math.ceil(share_a * int((~is_b).sum()))


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
        """Return nothing: the initial adapter follows from the seed."""
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
        return metrics | ({"clipped": gathering.clipped} if gathering.clipped else {})

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
        fields(reply, ("n", "loss", "segment"), FRAME)
        number = reply.whole("segment", 0, len(self.spans) - 1)
        if number != asked[site]:
            raise WireError(f"it sent segment {number} and was asked for {asked[site]}")

        vector = self.uploads[number].decode_dense(payload_frame(reply), round=round)
        update = {"segment": torch.from_numpy(vector)}
        loss = {"loss": torch.tensor([loss_of(reply)])}
        weight = weight_of(reply)
        WeightedMean.check(update, weight)
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
    absent = "the method's own code: see the bytes of a site in a round"
    traffic = partial(predict, config, given)
    return Plan(given.layout, partial(uncoded, given, traffic, given.layout, absent))


def predict(config: EcoLoraConfig, given: Given, round: int) -> Traffic:
    """Bound the bytes of a round by the least and the largest shares.

    Values that did not change are left out, so a download may have fewer. A site that was away gets
    all that changed, which may be everything.
    """
    layout = given.layout
    sparsifier = Sparsifier(layout)
    whole = Slice(0, layout.numel)
    frames = SparseFrames(layout, config.values)
    all_sites = config.cohort(given.sites) == given.sites
    changed = (
        0
        if round == 1
        else sparsifier.count(whole, config.most, config.most)
        if all_sites
        else layout.numel
    )
    long: list[Value] = [0.1234, 0.1234]
    values: dict[str, Value] = {"round": round, "segment": 0, "share": [0.1, 0.1], "since": 0}
    largest_values: dict[str, Value] = {
        **values,
        "segment": config.segments - 1,
        "share": long,
        "since": round,
    }
    uploads = []

    for number in range(config.segments):
        span = segment(number, config.segments, layout.numel)
        coded = SparseFrames(layout, config.values, span.start, span.stop)
        fewest = sparsifier.count(span, config.least_a, config.least_b)
        most = sparsifier.count(span, config.most, config.most)
        uploads.append(Bytes(*coded.sizes(fewest, most)) + answer(loss=FULL_LOSS, segment=number))

    up = Bytes(min(size.least for size in uploads), max(size.most for size in uploads))
    return Traffic(Bytes(*frames.sizes(0, changed)) + envelope(values, largest_values), up)


def check_segments(config: EcoLoraConfig, layout: Layout) -> None:
    """Raise `ConfigError` if a segment would be empty."""
    if config.segments > layout.numel:
        raise ConfigError(
            f"ecolora: method.segments={config.segments} exceeds the {layout.numel} values; "
            "choose fewer"
        )


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
