"""The server half of FL-GLM: its layers, and those of the sites where all share them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from fluvial.errors import PrivacyError
from fluvial.federation.aggregate import Aggregate, WeightedLoss
from fluvial.federation.bounds import BoundedReplies
from fluvial.federation.cohort import sample
from fluvial.federation.fleet import Fleet
from fluvial.federation.meter import AUDIT, MEASURING, SAMPLING
from fluvial.federation.replies import fields, measured
from fluvial.federation.sites import state_message
from fluvial.methods.exporting import Export, PromptFrom, Reporting, export_adapter
from fluvial.methods.flglm.accounting import account, passes_of_round
from fluvial.methods.flglm.client_batch import ClientBatch
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.conversations import Conversations
from fluvial.methods.flglm.leakage import replies
from fluvial.methods.flglm.leakage.meter import Leakage, beyond_bound
from fluvial.methods.flglm.memories import Memories
from fluvial.methods.flglm.replica import SiteUpdate
from fluvial.methods.flglm.serving import Serving
from fluvial.methods.flglm.setting import Setting
from fluvial.methods.interface import Context, Metrics
from fluvial.methods.measuring import Measures, measures_of
from fluvial.methods.shared import SharedModelServer
from fluvial.models.part_tuning import PartTuning
from fluvial.models.states import base_state, changed, initial_state
from fluvial.wire.payload import Payload, Value, join, split
from fluvial.wire.tensors import Named, moved, norm, subtract

Which = Literal["base", "final"]
PROMPT = "Once upon a time"
"""Prompt of a sample where the configuration has none."""


class FlGlmServer(SharedModelServer):
    """Server half."""

    def __init__(self, config: FlGlmConfig, context: Context) -> None:
        self.config = config
        self.context = context
        self.setting = Setting(config, context)
        self._model = initial_state(context.layout, context.seed)
        self._fewest: int | None = None
        """Sequences of the smallest site that has trained."""
        self._memories = Memories(config)

    def setup(self, fleet: Fleet) -> Metrics:
        """Load the server's layers, and where leakage is bounded, measure that of the base.

        Raises `ConfigError` where the model cannot be cut, and `PrivacyError` where the base leaks
        more than the bound, as the sites' first training messages would.
        """
        self.setting.parts.load()
        most = self.config.leakage.most
        leakage = None if most is None else self._leakage(fleet, 0, which="base")
        if leakage is None:
            return {}
        if reason := beyond_bound(leakage, most):
            raise PrivacyError(f"before round 1: {reason}")
        return {"leakage": leakage.worst.accuracy}

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Train for one round in the configured mode, and measure what leaks where it is due."""
        metrics = self._train(number, fleet)
        every = self.config.leakage.every
        if every and number % every == 0 and number < self.context.rounds:
            leakage = self._leakage(fleet, number)
            if leakage is not None:
                metrics["leakage"] = leakage.worst.accuracy
                if reason := beyond_bound(leakage, self.config.leakage.most):
                    metrics["stopped"] = f"round {number}: {reason}"

        return metrics

    def _train(self, number: int, fleet: Fleet) -> Metrics:
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
                self._note(update.weight)
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
            self._note(update.weight)
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
        message = self._message(round=number)
        batch = ClientBatch(self.setting, fleet, number, self._model, message, self._memories)
        loss = WeightedLoss()
        count = 0

        for reply in batch.replies(cohort):
            loss.add(reply.loss, reply.weight)
            self._note(reply.weight)
            count += 1

        fleet.require_quorum("train", number, answered=count, asked=len(cohort))
        self._model = moved(self._model, batch.update)
        missed = {"missed_steps": batch.missed} if batch.missed else {}
        return {"loss": loss.mean(), "sites": count, "update_norm": norm(batch.update), **missed}

    def _note(self, sequences: int) -> None:
        """Note the number of sequences of a site that has trained."""
        self._fewest = min(self._fewest or sequences, sequences)

    def _conversations(self, fleet: Fleet, number: int) -> Conversations:
        message = self._message(round=number)
        return Conversations(self.setting, fleet, number, self._middle(), message, self._memories)

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

        generate = reporting.evaluate.max_new_tokens
        read = partial(measured, answers=generate > 0)
        with self._serving(which) as serving:
            message = self._use(which, round, generate=generate)
            replies = serving.replies(
                fleet, MEASURING, fleet.sites, message, round=round, read=read
            )
            return measures_of(replies)

    def export(self, fleet: Fleet, reporting: Reporting, final: Measures) -> Export:
        """Write the model where the server has all of it; see `SharedModelServer.export`.

        An adapter is written without the base's weights, of which the server has only its own.
        """
        leakage = self._leakage(fleet, reporting.rounds)
        tuning = reporting.pool.tuning
        return replace(
            self._written(fleet, reporting, final),
            leakage=None if leakage is None else leakage.to_values(self.config.leakage.most),
            parts=tuning.words if isinstance(tuning, PartTuning) else None,
            noise=self._account(reporting),
        )

    def _written(self, fleet: Fleet, reporting: Reporting, final: Measures) -> Export:
        if self.config.ends == "own":
            return Export()
        if reporting.pool.full:
            return super().export(fleet, reporting, final)

        texts = self._samples(fleet, reporting)
        sha256 = export_adapter(reporting, changed(self._checked_model()))
        return Export(adapter_sha256=sha256, samples=texts)

    def _leakage(self, fleet: Fleet, round: int, which: Which = "final") -> Leakage | None:
        """Return the success of the sites' attacks on the base or the present model after `round`,
        0 before the first; None without any."""
        chosen = self.config.leakage.sites
        if chosen == "none":
            return None

        sites = fleet.sites if chosen == "all" else fleet.sites[:1]
        message = self._use(which, max(1, round))  # sites expect a round of the run
        with self._serving(which) as serving:
            answers = serving.replies(fleet, AUDIT, sites, message, round=round, read=replies.read)
            return replies.together([reply.content for reply in answers])

    def _account(self, reporting: Reporting) -> dict[str, Any] | None:
        """Return epsilon of the run's hidden states; None without noise."""
        if self.config.noise is None:
            return None

        rounds = reporting.rounds
        evaluate = reporting.evaluate
        measures = 2 + (rounds // evaluate.every if evaluate.every else 0)
        audits = self.config.leakage.audits(rounds)
        passes = rounds * passes_of_round(self.context.train, self._fewest)
        return account(
            self.config.noise,
            passes,
            measures * (2 if evaluate.max_new_tokens else 1) + audits,
            gradients=self.config.sends_gradient,
        )

    def _samples(self, fleet: Fleet, reporting: Reporting) -> list[dict[str, str]]:
        """Return continuations of a prompt by the base and by the tuned model, made with one site.

        No text of a site is a prompt here, because the server would receive it.
        """
        prompt = reporting.evaluate.sample_prompt or PROMPT
        texts = []
        for which in ("base", "final"):
            with self._serving(which) as serving:
                message = self._use(
                    which,
                    reporting.rounds,
                    prompt=prompt,
                    generate=reporting.evaluate.sample_length(),
                )
                texts += [
                    reply.content
                    for reply in serving.replies(
                        fleet,
                        SAMPLING,
                        fleet.sites[:1],
                        message,
                        round=reporting.rounds,
                        read=_text,
                    )
                ]

        if len(texts) < 2:  # the site has failed
            return []
        origin: PromptFrom = "setting" if reporting.evaluate.sample_prompt else "public"
        return [{"prompt": prompt, "prompt_from": origin, "base": texts[0], "final": texts[1]}]

    @contextmanager
    def _serving(self, which: Which) -> Iterator[Serving]:
        """Borrow the server's layers, of the base or of the present model."""
        base = which == "base"
        middle = base_state(self.setting.places.middle) if base else self._middle()
        with self.setting.parts.part(middle, trainable=False) as part:
            yield Serving(self.setting, part)

    def _use(self, which: Which, round: int, **values: Value) -> Payload:
        """Return the message with which a site uses the base or the present model."""
        if which == "base":
            return Payload(values={"which": which, "round": round, **values})
        return self._message(which=which, round=round, **values)

    def model(self) -> Named:
        """Return the adapter, or the change of all weights."""
        return self._model

    def state(self) -> Payload:
        """Return the model, the sequences of the smallest site, and the sites' hidden states."""
        values: dict[str, Value] = {} if self._fewest is None else {"fewest": self._fewest}
        model = Payload(changed(self._model), values)
        return join({"model": model, "memories": self._memories.state()})

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        saved = split(state, ("model", "memories"))
        model = saved["model"]
        self._model = base_state(self.context.layout) | model.tensors
        self.context.layout.check(self._model, "checkpoint")
        if "fewest" in model.values:
            self._fewest = model.value("fewest", int)

        self._memories.restore(saved["memories"])


def _text(_site: str, reply: Payload) -> str:
    """Return the text of a reply; raises `WireError`."""
    fields(reply, ("text",))
    text: str = reply.value("text", str)
    return text
