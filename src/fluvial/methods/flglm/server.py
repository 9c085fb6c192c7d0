"""The server half of FL-GLM: its layers, and those of the sites where all share them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from fluvial.codecs.activations.rows import pack, unpack
from fluvial.federation.aggregate import Aggregate, WeightedLoss
from fluvial.federation.bounds import BoundedReplies
from fluvial.federation.cohort import sample
from fluvial.federation.fleet import Fleet
from fluvial.federation.meter import MEASURING
from fluvial.federation.replies import measured
from fluvial.federation.sites import state_message
from fluvial.federation.turns import Idle, Reply, Turn
from fluvial.methods.exporting import Export, Reporting
from fluvial.methods.flglm.client_batch import ClientBatch
from fluvial.methods.flglm.coding import Coding
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.conversations import Conversations
from fluvial.methods.flglm.replica import SiteUpdate
from fluvial.methods.flglm.setting import Setting
from fluvial.methods.flglm.turns import Look
from fluvial.methods.interface import Context, Metrics
from fluvial.methods.measuring import Measures, measures_of
from fluvial.methods.shared import SharedModelServer
from fluvial.models.split import Part
from fluvial.models.states import base_state, changed, initial_state
from fluvial.seeds import generator
from fluvial.training.evaluate import Heldout
from fluvial.wire.payload import Payload, Value, frame_payload
from fluvial.wire.tensors import Named, moved, norm, subtract


class FlGlmServer(SharedModelServer):
    """Server half."""

    def __init__(self, config: FlGlmConfig, context: Context) -> None:
        self.config = config
        self.context = context
        self.setting = Setting(config, context)
        self._model = initial_state(context.layout, context.seed)

    def setup(self, fleet: Fleet) -> Metrics:  # noqa: ARG002
        """Load the server's layers; raises `ConfigError` where the model cannot be cut."""
        self.setting.parts.load()
        return {}

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Train for one round in the configured mode."""
        cohort = sample(fleet.sites, self.config.fraction, seed=self.context.seed, round=number)
        if self.config.mode == "sequential":
            return self._sequential(number, fleet, cohort)
        if self.config.mode == "hierarchical":
            return self._hierarchical(number, fleet, cohort)
        return self._client_batch(number, fleet, cohort)

    def _sequential(self, number: int, fleet: Fleet, cohort: list[str]) -> Metrics:
        """Let one site after another train what the one before it has left."""
        loss = WeightedLoss()
        before = self._model
        count = 0

        for site in cohort:
            for update in self._conversations(fleet, number).updates([site]):
                self._model = moved(self._model, update.tensors)
                loss.add(update.loss, update.weight)
                count += 1

        fleet.require_quorum("train", number, answered=count, asked=len(cohort))
        change = subtract(self._model, before)
        return {"loss": loss.mean(), "sites": count, "update_norm": norm(change)}

    def _hierarchical(self, number: int, fleet: Fleet, cohort: list[str]) -> Metrics:
        """Let all sites train from one model, and average what they have made of it."""
        aggregate = Aggregate()
        replies: BoundedReplies[SiteUpdate] = BoundedReplies(
            fleet, "train", number, asked=len(cohort)
        )
        for update in self._conversations(fleet, number).updates(cohort):
            for counted in replies.add(update.site, norm(update.tensors), update.weight, update):
                aggregate.add(replace(counted.content, weight=counted.weight))

        for counted in replies.close():
            aggregate.add(replace(counted.content, weight=counted.weight))

        mean = aggregate.mean()
        self._model = moved(self._model, mean)
        clipped = {"clipped": replies.clipped} if replies.clipped else {}
        return {**aggregate.metrics(mean), **clipped}

    def _client_batch(self, number: int, fleet: Fleet, cohort: list[str]) -> Metrics:
        """Let all sites make each step together."""
        batch = ClientBatch(self.setting, fleet, number, self._model, self._message(round=number))
        loss = WeightedLoss()
        count = 0

        for reply in batch.replies(cohort):
            loss.add(reply.loss, reply.weight)
            count += 1

        fleet.require_quorum("train", number, answered=count, asked=len(cohort))
        self._model = moved(self._model, batch.update)
        return {"loss": loss.mean(), "sites": count, "update_norm": norm(batch.update)}

    def _conversations(self, fleet: Fleet, number: int) -> Conversations:
        message = self._message(round=number)
        return Conversations(self.setting, fleet, number, self._middle(), message)

    def _middle(self) -> Named:
        """Return the state of the server's layers."""
        return {name: self._model[name] for name in self.setting.places.middle.names}

    def _message(self, **values: Value) -> Payload:
        """Return the first message of a conversation, with the layers that all sites share."""
        shared = self.setting.shared
        if not shared.shapes:
            return Payload(values=values)
        ends = changed({name: self._model[name] for name in shared.names})
        return state_message(ends, shared, **values)

    # -- measuring and writing ---------------------------------------------------------------------

    def measure(
        self, fleet: Fleet, reporting: Reporting, *, round: int, which: Literal["base", "final"]
    ) -> Measures:
        """Measure the base or the present model on the sites' held-out text, in conversations."""
        if not reporting.heldout:
            return Measures()

        places = self.setting.places
        middle = base_state(places.middle) if which == "base" else self._middle()
        message = (
            Payload(values={"which": which})
            if which == "base"
            else self._message(which=which, round=round)
        )

        with self.setting.parts.part(middle, trainable=False) as part:
            looking = _Looking(self.setting, part)
            return measures_of(looking.replies(fleet, message, round))

    def export(self, reporting: Reporting, final: Measures) -> Export:
        """Write the model where the server has all of it; see `SharedModelServer.export`."""
        if self.config.ends == "own":
            return Export()
        return super().export(reporting, final)

    def model(self) -> Named:
        """Return the adapter, or the change of all weights."""
        return self._model

    def state(self) -> Payload:
        """Return the model."""
        return Payload(changed(self._model))

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        self._model = base_state(self.context.layout) | state.tensors
        self.context.layout.check(self._model, "checkpoint")


class _Looking:
    """The server's layers in conversations with sites that measure the model."""

    def __init__(self, setting: Setting, part: Part) -> None:
        self._part = part
        self._longest = setting.longest
        rounding = generator(setting.context.seed, "rounding")
        self._coding = Coding.of(setting.config, part, rounding)

    def replies(
        self, fleet: Fleet, message: Payload, round: int
    ) -> Iterator[Reply[tuple[Heldout, int, int]]]:
        """Yield the sites' replies."""
        for event in fleet.converse(
            MEASURING,
            dict.fromkeys(fleet.sites, message),
            round=round,
            hear=self._hear,
            read=partial(measured, answers=False),
        ):
            assert not isinstance(event, Idle), "every turn is answered at once"
            if isinstance(event, Turn):
                event.answer(event.content)
            else:
                yield event

    @torch.no_grad()
    def _hear(self, _site: str, payload: Payload) -> Payload:
        """Return the answer to a turn."""
        look = Look.read(payload, longest=self._longest)
        rows = self._coding.decode_hidden(look.frame, sum(look.lengths))
        lengths = torch.tensor(look.lengths, device=self._part.device)
        hidden, mask = unpack(rows, lengths, max(look.lengths), "right")
        rows = pack(self._part.middle(hidden, mask), mask)
        return frame_payload(self._coding.encode_hidden(rows))
