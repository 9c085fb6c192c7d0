"""FedAdapter's schedule over LoRA, for the contenders of `benchmarks.fedpipe`.

Cai, Wu, Wang, Lin, Xu, "Efficient Federated Learning for Modern NLP", MobiCom 2023 (FedAdapter,
AdaFL), https://arxiv.org/abs/2205.10162. Adapters of few upper layers come first. In a trial the
sites are in groups: one trains the present size, one a layer more, one a larger width. The group
whose loss falls most in a second gives its adapter and its size to all.

Ours, where the paper has something else or its values are not known to us:

- The adapters are LoRA's, on all linear weights of a layer, and their width is the rank. A width
  that grows doubles; the run's rank is the largest one.
- The paper draws trial groups from many idle sites. Here all sites of the run are dealt anew to
  the groups of each trial, and between trials all of them train the size that won.
- The loss of a group's adapter is that of all sites' held-out text, the same by which the benchmark
  measures; the bytes and seconds of that are not counted. Both help this contender.
- The seconds of a size are its training at full speed and its messages on one line, so that the
  choice is about the size, and not about which sites are in its group.
- Activations below the lowest adapter are not kept between rounds. Nothing is computed backwards
  there.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import mean
from typing import Any, Literal

from pydantic import Field

from fluvial.codecs.quantise import Identity
from fluvial.exchange.feedback import resized
from fluvial.federation.adapters import modules_of
from fluvial.federation.aggregate import WeightedLoss
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import read_counted
from fluvial.federation.sites import (
    Site,
    adapter_message,
    read_adapter_message,
    round_of,
    state_message,
    train_locally,
)
from fluvial.methods.fedpipe.tasks import SECONDS, read_seconds
from fluvial.methods.interface import Context, Given, Method, MethodSettings, Metrics, Plan, Traits
from fluvial.methods.measuring import ask_heldout
from fluvial.methods.planning import OWN_CODE, uncoded
from fluvial.methods.shared import SharedModelServer
from fluvial.methods.traffic import Traffic, unknown
from fluvial.models.assignment import Assignment
from fluvial.models.quantised import layers_of_coded
from fluvial.models.states import initial_state
from fluvial.seeds import numpy_generator
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, WeightedMean, add, norm, subtract

MBIT = 10**6 / 8
UP_BYTES_S = 5 * MBIT
"""Rate of the line on which sizes are compared: that of the middle site of the tasks."""
DOWN_BYTES_S = 20 * MBIT


class FedAdapterConfig(MethodSettings):
    """The schedule of sizes."""

    name: Literal["fedadapter"] = "fedadapter"
    depth: int = Field(1, ge=1)
    """Layers from the top that have adapters in the first round."""
    width: int = Field(2, ge=1)
    """Rank of their adapters in the first round; `lora.r` is the largest."""
    interval: int = Field(2, ge=1)
    """Rounds from one trial to the next."""


@dataclass(frozen=True)
class Size:
    """The size of an adapter."""

    depth: int
    """Layers from the top that have adapters."""
    width: int
    """Rank of these adapters."""

    def candidates(self, layers: int, rank: int) -> list["Size"]:
        """Return the sizes of a trial, of a model with so many layers: this one, one layer more,
        and twice the width, up to `rank`."""
        deeper = Size(min(self.depth + 1, layers), self.width)
        wider = Size(self.depth, min(2 * self.width, rank))
        return list(dict.fromkeys([self, deeper, wider]))


@dataclass(frozen=True)
class Trained:
    """One site's part in a round."""

    update: Named
    weight: int
    loss: float
    seconds: float
    """Processor time of its training."""


class FedAdapterServer(SharedModelServer):
    """Server half: the adapter at the run's rank in all layers, and the present size."""

    def __init__(self, config: FedAdapterConfig, context: Context) -> None:
        self.config = config
        self.context = context
        self.adapter = initial_state(context.layout, context.seed)
        self.size = Size(config.depth, config.width)

    @cached_property
    def run(self) -> Assignment:
        """The run's own assignment."""
        batch = self.context.train.per_device_train_batch_size
        return self.context.open_pool().assignment(batch)

    @cached_property
    def layers(self) -> dict[str, int]:
        """The layer of each module, counted from 0."""
        return layers_of_coded(self.context.open_pool().outline.base)

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return max(self.layers.values()) + 1

    def setup(self, fleet: Fleet) -> Metrics:  # noqa: ARG002 - nothing to agree on
        """Return no metrics: each message has its own assignment."""
        return {}

    def assignment(self, size: Size) -> Assignment:
        """Return the assignment of the sites that train a size."""
        first = self.num_layers - size.depth
        return self.run.with_ranks(
            {
                module: size.width if self.layers[module] >= first else 0
                for module in modules_of(self.context.layout.names)
            }
        )

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Run one round: a trial where it is due, else all sites train the present size."""
        sizes = [self.size]
        if (number - 1) % self.config.interval == 0:
            sizes = self.size.candidates(self.num_layers, max(dict(self.run.ranks).values()))
        groups = dealt(fleet.sites, sizes, seed=self.context.seed, round=number)
        trained = self._train(fleet, groups, number)
        adapters = {
            size: self._moved([trained[site] for site in sites]) for size, sites in groups.items()
        }

        before = self.adapter
        if len(groups) > 1:
            seconds = {
                size: mean(_seconds(fleet, site, trained[site].seconds) for site in sites)
                for size, sites in groups.items()
            }
            losses = {size: self._loss(fleet, adapters[size], number) for size in groups}
            self.size = fastest(self._loss(fleet, before, number), losses, seconds)
        self.adapter = adapters[self.size]

        loss = WeightedLoss()
        for each in trained.values():
            loss.add(each.loss, each.weight)
        return {
            "loss": loss.mean(),
            "sites": len(trained),
            "update_norm": norm(subtract(self.adapter, before)),
            "depth": self.size.depth,
            "width": self.size.width,
        }

    def _train(self, fleet: Fleet, groups: dict[Size, list[str]], round: int) -> dict[str, Trained]:
        """Have each site train the size of its group; return what came, by site."""
        messages: dict[str, Payload] = {}
        layouts: dict[str, Layout] = {}
        for size, sites in groups.items():
            assignment = self.assignment(size)
            adapter = resized(self.adapter, assignment.layout)
            message = adapter_message(adapter, round=round, **assignment.to_values(self.run))
            messages |= dict.fromkeys(sites, message)
            layouts |= dict.fromkeys(sites, assignment.layout)

        read = partial(self._read, layouts)
        replies = fleet.ask("train", messages, round=round, read=read)
        return {reply.site: reply.content for reply in replies}

    def _read(self, layouts: dict[str, Layout], site: str, reply: Payload) -> Trained:
        decode = Identity.of(layouts[site]).decode
        update, weight, loss = read_counted(reply, decode, self.context.train, extra=(SECONDS,))
        return Trained(update, weight, loss, read_seconds(reply))

    def _moved(self, group: Sequence[Trained]) -> Named:
        """Return the adapter after the mean of a group's updates; what it does not train stays."""
        update = WeightedMean()
        for each in group:
            update.add(each.update, each.weight)
        return add(self.adapter, resized(update.mean(), self.context.layout))

    def _loss(self, fleet: Fleet, adapter: Named, round: int) -> float:
        """Return the loss of an adapter on all sites' held-out text."""
        message = state_message(adapter, self.context.layout, which="sent", generate=0)
        measures = ask_heldout(fleet, message, round=round).mean()
        assert measures is not None, "the tasks have held-out text"
        return measures["loss"]

    def model(self) -> Named:
        """Return the adapter at the run's rank."""
        return self.adapter

    def state(self) -> Payload:
        """Return the adapter and its size."""
        return Payload(self.adapter, {"depth": self.size.depth, "width": self.size.width})

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        self.context.layout.check(state.tensors, "checkpoint")
        self.adapter = state.tensors
        self.size = Size(state.value("depth", int), state.value("width", int))


def dealt(
    sites: Sequence[str], sizes: Sequence[Size], *, seed: int, round: int
) -> dict[Size, list[str]]:
    """Return the group of sites of each size, drawn anew in each round; sizes without a site are
    left out."""
    order = numpy_generator(seed, "trial groups", round).permutation(len(sites))
    groups = {
        size: sorted(sites[place] for place in order[first :: len(sizes)])
        for first, size in enumerate(sizes)
    }
    return {size: group for size, group in groups.items() if group}


def fastest(before: float, losses: dict[Size, float], seconds: dict[Size, float]) -> Size:
    """Return the size whose loss fell most in a second; where none fell, that of the least loss."""
    falls = {size: before - loss for size, loss in losses.items()}
    if max(falls.values()) <= 0:
        return min(losses, key=losses.__getitem__)
    return max(falls, key=lambda size: falls[size] / seconds[size])


def _seconds(fleet: Fleet, site: str, training_s: float) -> float:
    """Return the seconds of a site's training, and of its messages on the common line."""
    sizes = fleet.meter.current[site]
    up_s = sizes["up", "train"] / UP_BYTES_S
    return training_s + up_s + sizes["down", "train"] / DOWN_BYTES_S


def train(site: Site, message: Payload) -> Payload:
    """Tune the received adapter, of the size that the message says, and send the change."""
    round = round_of(site, message)
    site.accept_assignment(message)
    received = read_adapter_message(message, site.layout)
    examples = site.load().train

    began = time.thread_time()
    update, report = train_locally(site, received, round, examples=examples)
    values: dict[str, Any] = {SECONDS: f"{time.thread_time() - began:010.3f}"}
    return adapter_message(update, n=len(examples), loss=float(f"{report.loss:.6g}"), **values)


def plan(config: FedAdapterConfig, given: Given) -> Plan:
    """Predict no bytes: the sizes follow from trials."""
    sizes = unknown("the size of the adapter follows from trials")
    traffic = Traffic(sizes, sizes)
    forecast = partial(uncoded, config, given, lambda _: traffic, given.layout, OWN_CODE)
    return Plan(given.layout, forecast)


METHOD = Method(
    FedAdapterConfig,
    FedAdapterServer,
    {"train": train},
    paper="Cai, Wu, Wang, Lin, Xu, Efficient Federated Learning for Modern NLP, MobiCom 2023, "
    "https://arxiv.org/abs/2205.10162",
    plan=plan,
    traits=Traits("FedAdapter's schedule over LoRA", sends="own code"),
)
