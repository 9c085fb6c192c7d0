"""A site: who takes part, with its data, what it keeps, and what every method lets it do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fluvial.codecs import CODECS, CodecSettings, build, must_learn, read_settings
from fluvial.codecs.base import Codec, LearnedCodec, SteppedCodec
from fluvial.codecs.quantise import Identity
from fluvial.data import Example, SiteData
from fluvial.errors import ConfigError, WireError
from fluvial.federation.store import StateStore
from fluvial.federation.talk import Talk
from fluvial.models.assignment import KEY, Assignment
from fluvial.models.pool import ModelPool
from fluvial.models.states import base_state, initial_state
from fluvial.seeds import derive, generator
from fluvial.training.evaluate import exact_match, heldout
from fluvial.training.train import TrainConfig, TrainReport, train
from fluvial.wire.payload import FRAME, OWN_FILES, Payload, frame_payload, payload_frame
from fluvial.wire.tensors import Layout, Named, add, energy, factor, scale, subtract

Factors = Literal["A and B", "B"]


@dataclass
class Site:
    """One site while it answers one message; nothing survives in it but what `keep` puts into the
    store."""

    name: str
    seed: int
    pool: ModelPool
    load: Callable[[], SiteData]
    train: TrainConfig
    codec: CodecSettings
    method: Any
    """The method's config."""
    downlink: CodecSettings | None
    """How the adapter comes down; None where it comes as it is."""
    store: StateStore
    rounds: int
    """Of the whole run; what a privacy budget is spread over."""
    kept: dict[str, Payload | Path] = field(default_factory=dict)
    """What this answer wants to keep, or the draft of it; stored when the answer is accepted."""
    assigned: Assignment | None = None
    """The assignment that a message brought; None for the run's own."""

    @property
    def assignment(self) -> Assignment:
        """What this site trains: the run's own assignment, unless a message brought another."""
        return self.assigned or self.pool.assignment(self.train.per_device_train_batch_size)

    @property
    def layout(self) -> Layout:
        """The layout of the adapter, or of all weights, that this site trains."""
        return self.pool.layout if self.assigned is None else self.assigned.layout

    def accept_assignment(self, message: Payload) -> None:
        """Work with the assignment that `message` carries, or else with the run's own.

        Raises `WireError` for an assignment that does not fit the model.
        """
        if KEY in message.values:
            run = self.pool.assignment(self.train.per_device_train_batch_size)
            self.assigned = Assignment.from_values(message.values, run)

    def recall(self, slot: str) -> Payload:
        """What the site kept under `slot`, or an empty payload."""
        kept = self.kept.get(slot)
        if isinstance(kept, Path):
            return Payload.from_bytes(kept.read_bytes(), OWN_FILES)
        return self.store.read(self.name, slot) if kept is None else kept

    def keep(self, slot: str, payload: Payload, *, draft: bool = False) -> None:
        """Keep `payload` under `slot` once this answer is accepted; a `draft` lies in a file until
        then."""
        self.kept[slot] = (
            self.store.draft(self.name, slot, payload) if draft and self.store.folder else payload
        )

    def file(self, slot: str) -> Path | None:
        """The file with what the site kept under `slot`, where there is one."""
        kept = self.kept.get(slot)
        return kept if isinstance(kept, Path) else self.store.file(self.name, slot)


def round_of(site: Site, message: Payload) -> int:
    """Return the round that a message is of, one of the run; raises `WireError`."""
    return message.whole("round", 1, site.rounds)


Task = Callable[[Site, Payload], Payload | Talk]
"""Work of a site: a message in, its answer out; a generator function where it talks with the server
(see `talk`)."""


def state_message(state: Named, layout: Layout, **values: Any) -> Payload:
    """An exact state on the wire, which may have only the weights of `layout` that changed."""
    return (
        adapter_message(state, **values)
        if state.keys() == set(layout.names)
        else Payload(state, values)
    )


def read_state_message(message: Payload, layout: Layout) -> Named:
    """Inverse of `state_message`; raises `WireError` for another layout."""
    if message.tensors.keys() == {FRAME}:
        return read_adapter_message(message, layout)
    wanted = Layout(tuple(entry for entry in layout.shapes if entry[0] in message.tensors))
    wanted.check(message.tensors, "state")
    return message.tensors


def adapter_message(adapter: Named, **values: Any) -> Payload:
    """An exact adapter on the wire: one packed frame, because every named tensor would cost a
    header."""
    return frame_payload(Identity.of(Layout.of(adapter)).encode(adapter), **values)


def read_adapter_message(message: Payload, layout: Layout) -> Named:
    """Inverse of `adapter_message`; raises `WireError` for another layout."""
    return Identity.of(layout).decode(payload_frame(message))


def part(layout: Layout, factors: Factors) -> Layout:
    """The layout of what is trained and sent."""
    return (
        layout
        if factors == "A and B"
        else Layout(tuple(s for s in layout.shapes if factor(s[0]) == "B"))
    )


def train_locally(
    site: Site,
    received: Named,
    round: int,
    *,
    examples: Sequence[Example],
    factors: Factors = "A and B",
    purpose: str = "train",
) -> tuple[Named, TrainReport]:
    """Tune from the state `received` on `examples`, with the site's assignment.

    Return the update (trained - received) of `factors`, and the report.
    """
    pool = site.pool
    assignment = site.assignment
    settings = site.train.model_copy(update={"per_device_train_batch_size": assignment.batch})
    start = pool.weights(received, assignment)

    with pool.model(
        received,
        trainable=factors,
        checkpointing=settings.gradient_checkpointing,
        assignment=assignment,
    ) as model:
        report = train(
            model,
            examples,
            settings,
            pad_token_id=pool.tokenizer.pad_token_id,
            generator=generator(site.seed, purpose, round, site.name),
            start=start,
        )

    return subtract(report.weights, start), report


def site_codec(site: Site, layout: Layout) -> Codec:
    """The codec of this run: built from its settings, or as it was installed."""
    if not must_learn(site.codec):
        return build(site.codec, layout)

    installed = site.recall("codec")
    if not installed.values:
        raise WireError(f"site {site.name!r} was asked to train before its codec was installed")

    settings = read_settings(installed.value("settings", dict))
    kind = CODECS[settings.name]
    if not issubclass(kind, LearnedCodec):
        return build(settings, layout)

    return kind.from_published(
        settings, layout, Payload(installed.tensors, installed.value("learned", dict))
    )


def install_codec(site: Site, message: Payload) -> Payload:
    """Task: keep the codec that the server learned or chose."""
    site.keep("codec", message)
    return Payload()


def code(
    site: Site,
    codec: Codec,
    update: Named,
    round: int,
    *,
    step: float | None = None,
    slot: str = "residual",
) -> bytes:
    """The frame for `update`. With error feedback the residual is added first, and what the codec
    lost is kept.

    u = update + decay^missed * residual; sent Q(u); residual = u - Q(u), after Seide et al. (2014)
    and Karimireddy et al. (2019). `missed` counts the rounds since the residual was made in which
    the site did not take part. With `step`, the codec quantises by that instead of by its rate. The
    residual is kept under `slot`.
    """
    encode: Callable[..., bytes] = codec.encode
    if step is not None:
        assert isinstance(codec, SteppedCodec), "the server sets a step for codecs that have one"
        encode = partial(codec.encode_at, step=step)

    encode = partial(encode, seed=derive(site.seed, "codec", round, site.name), round=round)
    if not codec.settings.error_feedback:
        return encode(update)

    kept = site.recall(slot)
    if kept.tensors:
        codec.layout.check(kept.tensors, "residual")
        missed = max(0, round - kept.value("round", int) - 1)
        update = add(update, scale(kept.tensors, codec.settings.feedback_decay**missed))

    frame = encode(update)
    residual = subtract(update, codec.decode(frame))
    error = energy(residual) / max(energy(update), 1e-30)
    site.keep(slot, Payload(residual, {"round": round, "error": error}))

    return frame


def evaluate(site: Site, message: Payload) -> Payload:
    """Task: held-out sums of the adapter that was sent, of the site's own, or of the base.

    Values in: `which` is "sent", "own" or "base"; `generate` is the number of tokens for exact
    match, or 0. Values out: `loss_sum`, `hits`, `tokens`, and with `generate` on data with answers
    `right` and `questions`.
    """
    which = message.value("which", str)
    new_tokens = message.whole("generate", 0, MOST_NEW_TOKENS)
    pool = site.pool
    data = site.load()

    if which == "sent":
        adapter = read_state_message(message, site.layout)
    elif which == "own":
        adapter = site.recall("adapter").tensors or initial_state(site.layout, site.seed)
    elif which == "base":
        adapter = base_state(site.layout)
    else:
        raise WireError(f"evaluate: which={which!r:.40}, expected 'sent', 'own' or 'base'")

    with pool.model(adapter, assignment=site.assignment) as model:
        sums = heldout(model, data.heldout, pad_token_id=pool.tokenizer.pad_token_id)
    values: dict[str, Any] = {
        "loss_sum": sums.loss_sum,
        "hits": sums.hits,
        "tokens": sums.label_tokens,
    }
    if new_tokens and data.questions:
        prompts = [question.prompt for question in data.questions]
        answers = pool.generate(
            adapter, prompts, max_new_tokens=new_tokens, assignment=site.assignment
        )
        values["right"] = exact_match(answers, [question.answer for question in data.questions])
        values["questions"] = len(answers)

    return Payload(values=values)


def refuse_learned(settings: CodecSettings, method: str) -> None:
    """Raise `ConfigError` if the codec needs a fit that `method` does not do."""
    name: str = settings.name
    if must_learn(settings):
        raise ConfigError(
            f"codec.name={name!r} learns from updates, which method {method!r} does not collect; use 'fedavg' or "
            "'cgfedllm'"
        )


MOST_NEW_TOKENS = 10**6
"""Tokens of one answer that a site generates at most, whatever is asked."""
COMMON_TASKS: dict[str, Task] = {"evaluate": evaluate, "install": install_codec}
