"""A site: its data and settings, its state between rounds, and the tasks of every method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fluvial.codecs import CodecSettings, must_learn
from fluvial.codecs.quantise import Identity
from fluvial.data import Example, SiteData
from fluvial.errors import ConfigError, WireError
from fluvial.federation.store import StateStore
from fluvial.federation.talk import Talk
from fluvial.federation.times import Stopwatch
from fluvial.federation.transfers import Transfers
from fluvial.models.assignment import KEY, Assignment
from fluvial.models.generation import count_too_long
from fluvial.models.pool import ModelPool
from fluvial.models.square import square_name
from fluvial.models.states import base_state, initial_state
from fluvial.training.answer_scores import AnswerSums, right_answers
from fluvial.training.config import TrainConfig
from fluvial.training.evaluate import Heldout, heldout
from fluvial.training.processes import Job, train_job
from fluvial.training.train import TrainReport
from fluvial.wire.payload import FRAME, OWN_FILES, Payload, frame_payload, payload_frame
from fluvial.wire.tensors import Layout, Named, factor, subtract

Factors = Literal["A and B", "B"]
"""Factors that a site trains."""
Sent = Literal["A and B", "B", "A", "R"]
"""Factors that a site sends; R (rank, rank) lies between a fixed B and a fixed A."""


@dataclass
class Site:
    """One site during one exchange; nothing survives in it but what `keep` puts into the store."""

    name: str
    seed: int
    pool: ModelPool
    load: Callable[[], SiteData]
    train: TrainConfig
    codec: CodecSettings
    method: Any
    """Config of the method; None at the simulated sites of TGAP, which work for any."""
    downlink: CodecSettings | None
    """Codec of the adapter in the downlink; None if the adapter is sent exactly."""
    store: StateStore
    rounds: int
    """Rounds of the whole run, over which a privacy budget is spread."""
    kept: dict[str, Payload | Path] = field(default_factory=dict)
    """State by slot that is stored when the answer counts: a payload, or the file of a draft."""
    memory_mb: float | None = None
    """Most memory of the site's training, in 10^6 bytes, as its operator says; None without."""
    transfers: Transfers = field(default_factory=Transfers)
    """Rates of the site's link, as its messages showed them."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    """Seconds of the parts of the site's work on this message."""
    assigned: Assignment | None = None
    """Assignment that a message brought; None for the run's own."""
    round: int = 0
    """Round of the message that the site works on, for lines about progress; 0 where unknown."""

    @property
    def assignment(self) -> Assignment:
        """Return the assignment that a message brought, or else the run's own."""
        return self.assigned or self.pool.assignment(self.train.per_device_train_batch_size)

    @property
    def layout(self) -> Layout:
        """Return the layout of the adapter, or of all weights, that this site trains."""
        return self.pool.layout if self.assigned is None else self.assigned.layout

    @property
    def trained(self) -> Layout:
        """Return the layout of what this site trains, without a side path."""
        return self.pool.layout if self.assigned is None else self.assigned.trained

    def of_method(self, function: str) -> str:
        """Return a function of the method with the method's name, for errors."""
        return function if self.method is None else f"{function} of method {self.method.name!r}"

    def accept_assignment(self, message: Payload) -> None:
        """Work with the assignment that `message` carries, or else with the run's own.

        Raises `WireError` for an assignment that does not fit the model.
        """
        if KEY in message.values:
            run = self.pool.assignment(self.train.per_device_train_batch_size)
            self.assigned = Assignment.from_values(message.values, run)

    def recall(self, slot: str) -> Payload:
        """Return the state that the site kept under `slot`, or an empty payload."""
        draft = self.kept.get(slot)
        if isinstance(draft, Path):
            return Payload.from_bytes(draft.read_bytes(), OWN_FILES)
        return self.store.read(self.name, slot) if draft is None else draft

    def keep(self, slot: str, payload: Payload, *, draft: bool = False) -> None:
        """Keep `payload` under `slot` once this answer counts; until then a `draft` is a file."""
        self.kept[slot] = (
            self.store.draft(self.name, slot, payload) if draft and self.store.folder else payload
        )

    def file(self, slot: str) -> Path | None:
        """Return the file of the state under `slot`, None where there is none."""
        draft = self.kept.get(slot)
        return draft if isinstance(draft, Path) else self.store.file(self.name, slot)


def round_of(site: Site, message: Payload) -> int:
    """Return the round that a message is of, one of the run; raises `WireError`."""
    return message.whole("round", 1, site.rounds)


Task = Callable[[Site, Payload], Payload | Talk]
"""Work of a site: a message in, its answer out; a generator function if it converses with the
server (see `talk`)."""


def state_message(state: Named, layout: Layout, **values: Any) -> Payload:
    """Return a message with an exact state, which may lack unchanged weights of `layout`."""
    return (
        adapter_message(state, **values)
        if state.keys() == set(layout.names)
        else Payload(state, values)
    )


def read_state_message(message: Payload, layout: Layout) -> Named:
    """Return the state of a `state_message`; raise `WireError` for another layout."""
    if message.tensors.keys() == {FRAME}:
        return read_adapter_message(message, layout)
    wanted = Layout(tuple(entry for entry in layout.shapes if entry[0] in message.tensors))
    wanted.check(message.tensors, "state")
    return message.tensors


def adapter_message(adapter: Named, **values: Any) -> Payload:
    """Return a message with an exact adapter as one frame, because each named tensor costs a
    header."""
    return frame_payload(Identity.of(Layout.of(adapter)).encode(adapter), **values)


def read_adapter_message(message: Payload, layout: Layout) -> Named:
    """Return the adapter of an `adapter_message`; raise `WireError` for another layout."""
    return Identity.of(layout).decode(payload_frame(message))


def factor_layout(layout: Layout, factors: Sent) -> Layout:
    """Return the layout of what is sent, for an adapter of `layout`."""
    if factors == "A and B":
        return layout
    if factors == "R":
        return Layout(
            tuple(
                (square_name(name), (shape[0], shape[0]))
                for name, shape in layout.shapes
                if factor(name) == "A"
            )
        )
    return Layout(tuple(s for s in layout.shapes if factor(s[0]) == factors))


def train_locally(
    site: Site,
    received: Named,
    round: int,
    *,
    examples: Sequence[Example],
    factors: Factors = "A and B",
    purpose: str = "train",
    settings: TrainConfig | None = None,
    watch: Callable[[Mapping[str, nn.Parameter]], bool] | None = None,
) -> tuple[Named, TrainReport]:
    """Tune from the state `received` on `examples`, with the site's assignment.

    `settings` take the place of the run's; `watch` is that of `train`. Return the update (trained -
    received) of `factors`, and the report.
    """
    pool = site.pool
    assignment = site.assignment
    settings = (settings or site.train).model_copy(
        update={"per_device_train_batch_size": assignment.batch}
    )
    if purpose == "train":
        settings = settings.in_round(round, site.rounds)
    stream = (site.seed, purpose, round, site.name)
    job = Job(received, factors, examples, settings, assignment, stream)
    start = pool.weights(received, assignment)
    with site.stopwatch.time("training"):
        report = train_job(pool, job, start, watch)

    return subtract(report.weights, start), report


def evaluate(site: Site, message: Payload) -> Payload:
    """Measure the adapter that was sent, the site's own or the base on held-out text; a task.

    Values in: `which` is "sent", "own" or "base"; `generate` is the number of tokens for exact
    match, or 0. Values out: those of `measures`, with scores for `generate` on data with answers.
    """
    which = message.value("which", str)
    new_tokens = message.whole("generate", 0, MOST_NEW_TOKENS)

    if which == "sent":
        adapter = read_state_message(message, site.layout)
    elif which == "own":
        adapter = site.recall("adapter").tensors or initial_state(site.layout, site.seed)
    elif which == "base":
        return _measure_base(site, new_tokens)
    else:
        raise WireError(f"evaluate: which={which!r:.40}, expected 'sent', 'own' or 'base'")

    return measure_heldout(site, adapter, new_tokens)


def measure_heldout(site: Site, adapter: Named, new_tokens: int, of: str = "") -> Payload:
    """Return the reply of a task `evaluate` with the measures of `adapter` on held-out text.

    Lines about progress name the model as `of`, by default as that after the present round.
    """
    of = of or after_round(site.round)
    pool = site.pool
    data = site.load()
    with pool.model(adapter, assignment=site.assignment) as model:
        sums = heldout(model, data.heldout, pad_token_id=pool.tokenizer.pad_token_id)
    site.pool.right_answers[site.name] = None
    if not new_tokens or not data.questions:
        return measures(sums)

    prompts = [question.asked for question in data.questions]
    answers = pool.generate(
        adapter, prompts, max_new_tokens=new_tokens, assignment=site.assignment, of=of
    )
    scores = AnswerSums.over(answers, data.questions, of)
    site.pool.right_answers[site.name] = right_answers(answers, data.questions)
    too_long = count_too_long(pool.tokenizer, prompts, new_tokens, pool.outline.context)
    return measures(sums, replace(scores, too_long=too_long))


def after_round(round: int) -> str:
    """Return the name of the model that is measured after a round, for lines about progress."""
    return f"the model after round {round}" if round else "the present model"


def _measure_base(site: Site, new_tokens: int) -> Payload:
    """Return the reply of a task `evaluate` with the measures of the base, which runs that share
    its pool compute once for the same records: a method and its baselines."""
    data = site.load()
    records = sha256(repr((new_tokens, site.assignment, data.questions)).encode())
    for example in data.heldout:
        records.update(repr((*example.input_ids, *example.labels, example.lengths)).encode())

    known = site.pool.measures_of_base
    key = records.digest()
    if key not in known:
        base = base_state(site.layout)
        values = measure_heldout(site, base, new_tokens, "the base model").values
        known[key] = values, site.pool.right_answers[site.name]
    found, site.pool.right_answers[site.name] = known[key]
    return Payload(values=dict(found))


def measures(sums: Heldout, scores: AnswerSums | None = None) -> Payload:
    """Return the reply of a task `evaluate`, which `replies.measured` reads: sums, no text."""
    values = {"loss_sum": sums.loss_sum, "hits": sums.hits, "tokens": sums.label_tokens}
    return Payload(values=values | ({} if scores is None else asdict(scores)))


def refuse_learned(settings: CodecSettings, method: str) -> None:
    """Raise `ConfigError` if the codec needs a fit that `method` does not do."""
    name: str = settings.name
    if must_learn(settings):
        raise ConfigError(
            f"codec.name={name!r} learns from updates, which method {method!r} does not collect; "
            "use 'fedavg' or 'cgfedllm'"
        )


MOST_NEW_TOKENS = 10**6
"""Tokens of one answer that a site generates at most, whatever is asked."""
COMMON_TASKS: dict[str, Task] = {"evaluate": evaluate}
