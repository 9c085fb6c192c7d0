"""FLASC: dense local tuning, sparse messages in both directions.

Kuo, Raje, Rajesh, Smith, "Federated LoRA with Sparse Communication", 2024,
https://arxiv.org/abs/2406.05233.

A site receives the largest values of the global adapter and tunes all of them. It sends the largest
values of what it changed; what it leaves out is forgotten. The server takes the mean of the changes
for a gradient of FedAdam.
"""

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fluvial.codecs.golomb import SparseFrames, Values, largest
from fluvial.codecs.quantise import to_numpy
from fluvial.errors import WireError
from fluvial.exchange import Gathering, Readable, to_all
from fluvial.federation.cohort import sample
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import read_counted
from fluvial.federation.sites import Site, factor_layout, round_of, train_locally
from fluvial.methods.idle import idle_bounds, idle_fraction
from fluvial.methods.interface import (
    Context,
    Given,
    Method,
    Metrics,
    Plan,
    SampledSettings,
    Traits,
)
from fluvial.methods.planning import OWN_CODE, uncoded
from fluvial.methods.shared import SharedModelServer
from fluvial.methods.traffic import FULL_LOSS, Bytes, Measured, Traffic, answer, envelope
from fluvial.models.states import initial_state
from fluvial.wire.payload import (
    Payload,
    frame_payload,
    join_tensors,
    payload_frame,
    tensors_of,
)
from fluvial.wire.tensors import Layout, Named, WeightedMean, add, norm


class FlascConfig(SampledSettings):
    """FLASC; with both densities 1, download = "weights", fp32 and fedavg it is FedAvg."""

    name: Literal["flasc"] = "flasc"
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort; the paper draws 10 of hundreds."""
    density_down: float = Field(0.25, ge=1e-6, le=1)
    """Share of the global weights that a site receives; 1/4 is among the paper's."""
    density_up: float = Field(0.25, ge=1e-6, le=1)
    """Share of its change that a site sends; 1/4 is among the paper's."""
    download: Literal["change", "weights"] = "change"
    """Vector whose largest values the server sends: the change since the start, which every site
    has (ours), or the weights (the paper's). Among weights the random A hides B, which starts at
    zero, for the first tens of rounds."""
    values: Values = "fp16"
    """Form of a value on the wire; the paper counts values, not bytes."""
    server_optimizer: Literal["fedavg", "fedadam"] = "fedadam"
    """Use of the mean change at the server: add it, or take it for a gradient of Adam."""
    server_learning_rate: float = Field(5e-3, ge=1e-12, le=100)
    """Learning rate of FedAdam; the value in the authors' code."""
    beta_1: float = Field(0.9, ge=0, lt=1)
    """Decay of FedAdam's first moment; the authors use PyTorch's default."""
    beta_2: float = Field(0.999, ge=0, lt=1)
    """Decay of FedAdam's second moment; the authors use PyTorch's default."""
    epsilon: float = Field(1e-8, ge=1e-30, le=1)
    """Constant in the denominator of FedAdam; the authors use PyTorch's default."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        for name in ("server_learning_rate", "beta_1", "beta_2", "epsilon"):
            if self.server_optimizer == "fedavg" and self.differs(name):
                yield f"{name}: without effect under server_optimizer='fedavg'; remove it"


class FlascServer(SharedModelServer):
    """Server half: the global adapter, all of it, and Adam's moments."""

    def __init__(self, config: FlascConfig, context: Context) -> None:
        self.config = config
        self.context = context
        self.frames = SparseFrames(context.layout, config.values)
        self.adapter = initial_state(context.layout, context.seed)
        self.base = base_of(config, context.layout, context.seed)
        self.first = torch.zeros(context.layout.numel)
        self.second = torch.zeros(context.layout.numel)
        self.steps = 0

    def setup(self, fleet: Fleet) -> Metrics:  # noqa: ARG002 - nothing to agree on
        """Return no metrics: every download is complete, so sites need no preparation."""
        return {}

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Run one round: sparse download, local training, mean change, step of the optimizer."""
        cohort = sample(fleet.sites, self.config.fraction, seed=self.context.seed, round=number)
        message = frame_payload(self._download(number), round=number)
        gathering = Gathering(
            fleet,
            "train",
            number,
            messages=partial(to_all, message=message),
            read=partial(self._read, number),
        )
        mean = WeightedMean()
        loss = WeightedMean()

        for reply in gathering.of(cohort):
            update, site_loss = reply.content
            mean.add(update, reply.weight)
            loss.add(site_loss, reply.weight)

        step = self._step(mean.mean())
        self.adapter = add(self.adapter, step)
        metrics = {
            "loss": float(loss.mean()["loss"]),
            "sites": mean.count,
            "update_norm": norm(step),
        }
        return {**metrics, **gathering.metrics()}

    def _download(self, round: int) -> bytes:
        """Return the frame of the largest weights, or changes."""
        change = to_numpy(self.context.layout.flatten(self.adapter) - self.base)
        count = count_of(self.config.density_down, len(change))
        return self.frames.encode(change, largest(abs(change), count), round=round)

    def _read(self, round: int, _site: str, reply: Payload) -> Readable[tuple[Named, Named]]:
        def decode(frame: bytes) -> Named:
            vector = torch.from_numpy(self.frames.decode_dense(frame, round=round))
            return self.context.layout.unflatten(vector)

        update, weight, site_loss = read_counted(reply, decode, self.context.train)
        loss = {"loss": torch.tensor([site_loss])}
        WeightedMean.check(loss, weight)

        return Readable((update, loss), norm(update), weight)

    def _step(self, mean: Named) -> Named:
        """Return what to add to the adapter for the mean change.

        It is the change itself, or Adam's step with it as the negative gradient.
        """
        if self.config.server_optimizer == "fedavg":
            return mean

        beta_1 = self.config.beta_1
        beta_2 = self.config.beta_2
        change = self.context.layout.flatten(mean)
        self.steps += 1
        self.first = beta_1 * self.first + (1 - beta_1) * change
        self.second = beta_2 * self.second + (1 - beta_2) * change**2
        direction = self.first / (1 - beta_1**self.steps)
        size = (self.second / (1 - beta_2**self.steps)).sqrt() + self.config.epsilon

        return self.context.layout.unflatten(self.config.server_learning_rate * direction / size)

    def model(self) -> Named:
        """Return what a site would receive now, as the authors measure it.

        It is not what the server alone holds.
        """
        return self.context.layout.unflatten(received(self.frames, self.base, self._download(0), 0))

    def state(self) -> Payload:
        """Return adapter, moments and the number of steps."""
        moments = {"first": self.first, "second": self.second}
        adapter = join_tensors({"adapter": self.adapter})
        return Payload(moments | adapter, {"steps": self.steps})

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        self.first = _moment(state, "first", like=self.first)
        self.second = _moment(state, "second", like=self.second)
        self.adapter = tensors_of("adapter", state.tensors)
        self.context.layout.check(self.adapter, "checkpoint")
        self.steps = state.value("steps", int)


def count_of(share: float, total: int) -> int:
    """Return the number of values in a share of `total`; at least one."""
    return max(int(share * total), 1)


def base_of(config: FlascConfig, layout: Layout, seed: int) -> Tensor:
    """Return what a download is added to (numel,): nothing, or the initial adapter."""
    if config.download == "weights":
        return torch.zeros(layout.numel)
    return layout.flatten(initial_state(layout, seed))


def received(frames: SparseFrames, base: Tensor, frame: bytes, round: int) -> Tensor:
    """Return the adapter that a site starts from (numel,); raises `WireError`."""
    return base + torch.from_numpy(frames.decode_dense(frame, round=round))


def _moment(state: Payload, name: str, *, like: Tensor) -> Tensor:
    moment = state.tensor(name)
    if moment.dtype != like.dtype or moment.shape != like.shape:
        raise WireError(
            f"checkpoint, {name}: expected {like.dtype} {tuple(like.shape)}, found "
            f"{tuple(moment.shape)}"
        )

    return moment


def train(site: Site, message: Payload) -> Payload:
    """Tune the sparse adapter, all values of it, and send the largest changes."""
    config: FlascConfig = site.method
    round = round_of(site, message)
    layout = site.layout
    frames = SparseFrames(layout, config.values)
    start = received(frames, base_of(config, layout, site.seed), payload_frame(message), round)
    examples = site.load().train
    update, report = train_locally(site, layout.unflatten(start), round, examples=examples)
    change = to_numpy(layout.flatten(update))
    where = largest(abs(change), count_of(config.density_up, len(change)))

    return frame_payload(
        frames.encode(change, where, round=round), n=len(examples), loss=report.loss
    )


def plan(config: FlascConfig, given: Given) -> Plan:
    """Predict bytes; there is nothing to refuse beside what the settings refuse themselves."""
    total = given.layout.numel
    frames = SparseFrames(given.layout, config.values)

    def traffic(round: int) -> Traffic:
        # Values that are 0 are left out. No B differs from 0, and nothing has changed, before the
        # sites send it.
        sent = count_of(config.density_up, total)
        changed = 0 if round == 1 else sent
        filled = (
            changed
            if config.download == "change"
            else total - factor_layout(given.layout, "B").numel
        )
        most = count_of(config.density_down, total)
        if config.download == "change" and round == 1:
            most = 0

        down = Bytes(*frames.sizes(min(most, filled), most))
        up = Bytes(*frames.sizes(sent, sent))
        return Traffic(down + envelope({"round": round}), up + answer(loss=FULL_LOSS))

    measured = Measured.of(given.layout)
    forecast = partial(uncoded, config, given, traffic, given.layout, OWN_CODE, measured)
    cohort = config.cohort(given.sites)
    idle = {**idle_bounds(cohort), **idle_fraction(config, given.sites)}
    return Plan(given.layout, forecast, idle=idle)


METHOD = Method(
    FlascConfig,
    FlascServer,
    {"train": train},
    paper="Kuo, Raje, Rajesh, Smith, Federated LoRA with Sparse Communication (FLASC), 2024, "
    "https://arxiv.org/abs/2406.05233",
    plan=plan,
    traits=Traits("FLASC", sends="own code", receives="own code"),
)
