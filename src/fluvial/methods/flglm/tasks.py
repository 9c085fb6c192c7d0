"""The tasks of a site: to train its layers in a conversation, and to measure the whole model."""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

from fluvial.codecs.quantise import Identity
from fluvial.data import Example
from fluvial.errors import WireError
from fluvial.federation.replies import MOST_TOKENS, fields
from fluvial.federation.sites import Site, round_of
from fluvial.federation.talk import Ahead, Next, Talk
from fluvial.methods.flglm.coding import Coding
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.draws import draws_of_round
from fluvial.methods.flglm.ends import Ends, MicroBatch
from fluvial.methods.flglm.release import Release
from fluvial.methods.flglm.site_memory import SiteMemory
from fluvial.methods.flglm.state import places_of, state_of
from fluvial.methods.flglm.tuned_part import factor_of
from fluvial.methods.flglm.turns import (
    MOST_SQUARED_NORM,
    MOST_STEPS,
    REJOIN,
    Backward,
    Content,
    Forward,
    Meeting,
    check_answer,
)
from fluvial.seeds import derive, generator
from fluvial.training.config import TrainConfig
from fluvial.training.stepper import stepper_layout
from fluvial.training.train import check_finite, shuffled_batches
from fluvial.wire.payload import FRAME, Payload, Value, frame_payload, payload_frame
from fluvial.wire.tensors import Named, subtract

MOST_AGAIN = 1000
"""Times that a server may let a site begin one step; each time a site has failed or was late."""


Steps = Generator[Ahead | Next, Payload, None]
"""Conversation of one step, or of a piece of it."""


@dataclass(frozen=True)
class _Flying:
    """A micro-batch whose hidden states are on their way."""

    micro: MicroBatch
    forward: Forward


class _RejoinError(Exception):
    """The server does not use a turn, and lets the site go on with another step."""

    def __init__(self, answer: Payload) -> None:
        super().__init__("rejoin")
        self.answer = answer


@dataclass
class _Visit:
    """A site's training in one round."""

    config: FlGlmConfig
    train: TrainConfig
    ends: Ends
    coding: Coding
    release: Release
    shared: Identity | None
    """Code of the tuned layers that all sites share; None where a site's are its own."""
    pad_token_id: int
    steps: int
    dropout_seed: int
    start: Named
    """Values of the tuned tensors at the beginning, fp32."""
    examples: Sequence[Example]
    """All sequences of the site."""
    memory: SiteMemory
    needs_gradient: bool
    """True where the server needs the gradient of its layers' hidden states."""
    factor: float = 1.0
    """Factor that clipped the gradients of the last step."""
    next: int = 0
    """Number of the step that is made next."""
    again: int = 0
    """Times that it was begun again."""
    open: deque[Content] = field(default_factory=deque)
    """Turns without an answer."""
    losses: float = 0.0
    label_tokens: int = 0
    tokens_since: int = 0
    """Label tokens since the last average."""

    def send(self, content: Content) -> Generator[Ahead, Payload, None]:
        """Send a turn, and go on."""
        self.open.append(content)
        yield Ahead(content.payload())

    def receive(self) -> Generator[Next, Payload, Payload]:
        """Return the answer to the oldest turn without one; raises `WireError` for an answer to
        another, and `_RejoinError` where the turn is not used."""
        received = yield Next()
        content = self.open.popleft()
        if self.config.mode == "client-batch" and received.values.get("of") == REJOIN:
            raise _RejoinError(received)

        check_answer(received, content)
        return received

    def turn(self, content: Content) -> Generator[Ahead | Next, Payload, Payload]:
        """Exchange one turn."""
        yield from self.send(content)
        return (yield from self.receive())

    def make(self, number: int, places: Sequence[int]) -> Steps:
        """Make step `number` on its logical batch, the sequences at `places`, again where the
        server says so; do nothing where the others have made it."""
        self.again = 0
        while self.next == number:
            try:
                yield from self._step(number, places)
                self.next += 1
            except _RejoinError as error:
                yield from self._drain()
                self._rejoin(error.answer)

    def _drain(self) -> Steps:
        """Take the answers to turns that were sent before the server let the site rejoin, of which
        it uses none; raises `WireError` for another."""
        while self.open:
            self.open.popleft()
            received = yield Next()
            if received.values.get("of") != REJOIN:
                raise WireError(
                    "the server goes on with a step that it has let this site begin again"
                )

    def _rejoin(self, answer: Payload) -> None:
        """Go on with another step, or the same once more, from the server's state where this is
        older; raises `WireError`."""
        step = answer.whole("step", self.next, MOST_STEPS)
        moved = self.shared is not None and self.next < step < self.steps
        fields(answer, ("of", "step"), (FRAME,) if moved else ())
        self.ends.drop_gradients()

        if self.shared is not None and moved:
            layout = stepper_layout(self.shared.layout, self.train)
            state = Identity.of(layout).decode(payload_frame(answer))
            self.ends.restore(state, step)

        self.again += 1
        self.next = step
        if self.again > MOST_AGAIN:
            raise WireError(f"the server has begun step {step} more than {MOST_AGAIN} times")

    def _step(self, number: int, places: Sequence[int]) -> Steps:
        """Make one step on a logical batch: one forward and one backward turn of each micro-batch
        in turn, once `in_flight` of them are on their way (1F1B)."""
        own_tokens = sum(self.examples[place].label_tokens for place in places)
        size = self.train.per_device_train_batch_size
        pieces = [places[start : start + size] for start in range(0, len(places), size)]
        in_flight = self.config.in_flight
        at_server: deque[_Flying] = deque()
        returning: deque[_Flying] = deque()
        server_norm = 0.0
        total = 0.0

        for micro_number, piece in enumerate(pieces[:in_flight]):
            at_server.append((yield from self._forward(number, micro_number, piece, own_tokens)))

        for micro_number in range(len(pieces)):
            flying = at_server.popleft()
            total += yield from self._backward(flying, own_tokens)
            returning.append(flying)
            if micro_number + 1 >= in_flight:
                server_norm = yield from self._returned(returning.popleft())

            later = micro_number + in_flight
            if later < len(pieces):
                flying = yield from self._forward(number, later, pieces[later], own_tokens)
                at_server.append(flying)

        while returning:
            server_norm = yield from self._returned(returning.popleft())

        yield from self._clip(number, total / own_tokens, server_norm)
        self.losses += total
        self.label_tokens += own_tokens
        yield from self._average(number, own_tokens)

    def _forward(
        self, number: int, micro_number: int, places: Sequence[int], own_tokens: int
    ) -> Generator[Ahead, Payload, _Flying]:
        """Run A on a micro-batch, and send its hidden states."""
        forward = Forward(
            number,
            micro_number,
            self.steps,
            tuple(len(self.examples[place].input_ids) for place in places),
            own_tokens,
            False,
            self.factor,
            b"",
            self.memory.samples(places),
            self.memory.held,
        )
        seed = derive(derive(self.dropout_seed, number), micro_number)
        micro = self._begin(forward, places, seed)
        rows = self.release(micro.rows, f"{number} {micro_number}")
        frame = self.memory.hidden.encode("up", forward.batch, rows)
        yield from self.send(replace(forward, returns=micro.returns, frame=frame))
        return _Flying(micro, forward)

    def _begin(self, forward: Forward, places: Sequence[int], dropout_seed: int) -> MicroBatch:
        """Run A on what the server lacks of a micro-batch, the sequences at `places`."""
        alone = None
        if self.config.runs_front_alone:
            missing = set(self.memory.hidden.missing(forward.batch).samples)
            numbered = zip(forward.batch.samples, places, strict=True)
            alone = [self.examples[place] for number, place in numbered if number in missing]

        return self.ends.begin(
            [self.examples[place] for place in places],
            pad_token_id=self.pad_token_id,
            dropout_seed=dropout_seed,
            clip=self.release.clip,
            alone=alone,
        )

    def _backward(
        self, flying: _Flying, own_tokens: int
    ) -> Generator[Ahead | Next, Payload, float]:
        """Run C on the server's hidden states, send their gradient, and return the summed loss."""
        received = yield from self.receive()
        tokens = own_tokens
        if self.config.mode == "client-batch":
            tokens = received.whole("tokens", own_tokens, MOST_TOKENS)
            self.ends.plan_steps(received.whole("steps", self.steps, MOST_STEPS))

        forward = flying.forward
        hidden = self.memory.hidden.decode("down", forward.batch, payload_frame(received))
        loss, gradient = self.ends.finish(flying.micro, hidden, tokens, returns=self.needs_gradient)
        encoded = self.coding.encode_gradient(gradient)
        yield from self.send(Backward(forward.step, forward.micro, encoded))
        return loss

    def _returned(self, flying: _Flying) -> Generator[Next, Payload, float]:
        """Run A's backward pass where it has one; return the squared norm of the server's
        gradients."""
        received = yield from self.receive()
        if flying.micro.returns:
            frame = payload_frame(received)
            gradient = self.coding.decode_gradient(frame, flying.forward.batch.tokens)
            self.ends.backward(flying.micro, gradient)

        return received.number("norm", 0.0, MOST_SQUARED_NORM)

    def _clip(self, number: int, loss: float, server_norm: float) -> Steps:
        """Clip the gradients by the global norm over the whole model, and make the step."""
        squared = self.ends.squared_norm() + server_norm
        if self.config.mode == "client-batch":
            squared = yield from self._clip_together(number)

        check_finite(loss, squared, number, self.steps, self.train)
        self.factor = factor_of(squared, self.train.max_grad_norm)
        self.ends.step(number, self.factor)

    def _clip_together(self, number: int) -> Generator[Ahead | Next, Payload, float]:
        """Return the squared norm of all sites' gradients; take the sum of those they share."""
        if self.shared is None:
            meeting = Meeting("clip", number, 1, self.ends.squared_norm(), 1.0, None)
        else:
            gradients = self.shared.encode(self.ends.gradients())
            meeting = Meeting("clip", number, 1, 0.0, 1.0, gradients)

        received = yield from self.turn(meeting)
        if self.shared is not None:
            self.ends.replace_gradients(self.shared.decode(payload_frame(received)))
        return received.number("norm", 0.0, MOST_SQUARED_NORM)

    def _average(self, number: int, tokens: int) -> Steps:
        """Average the weights with those of the other sites, every `sync_steps` steps."""
        self.tokens_since += tokens
        every = self.config.sync_steps
        if every is None or (number + 1) % every:
            return

        frame = None
        if self.shared is not None:
            frame = self.shared.encode(subtract(self.ends.weights(), self.start))

        received = yield from self.turn(
            Meeting("average", number, self.tokens_since, 0.0, self.factor, frame)
        )
        if self.shared is not None:
            update = self.shared.decode(payload_frame(received))
            self.ends.replace({name: value + update[name] for name, value in self.start.items()})
        self.tokens_since = 0


def train(site: Site, message: Payload) -> Talk:
    """Train the site's layers for one round, in a conversation with the server's; a task.

    Value in: `round`; with shared layers their state. Out: `n`, `loss`, `factor`, and with shared
    layers their update.
    """
    round = round_of(site, message)
    config: FlGlmConfig = site.method
    places = places_of(site)
    shared = Identity.of(places.shared) if places.shared.shapes else None
    state = state_of(site, message, places)
    examples = site.load().train
    dropout_seed, draw = draws_of_round(site.seed, round, site.name)
    batches = shuffled_batches(range(len(examples)), site.train.logical_batch, draw)
    steps = site.train.steps(len(examples))
    start = site.pool.weights({name: state[name] for name in places.ends.names})
    pool = site.pool.parts(places.cut, server=False)

    with pool.part(state, trainable=True, checkpointing=site.train.gradient_checkpointing) as part:
        tuned = places.ends.names
        front = [name for name in tuned if places.place(name) == "front"]
        train = site.train.in_round(round, site.rounds)
        ends = Ends(part, tuned, train, front=front, steps=steps, start=start)
        coding = Coding.of(config, part, generator(site.seed, "rounding", round, site.name))
        memory = SiteMemory.begin(site, message, coding, examples)
        visit = _Visit(
            config,
            site.train,
            ends,
            coding,
            Release.in_training(site, message, round=round),
            shared,
            site.pool.tokenizer.pad_token_id,
            steps,
            dropout_seed,
            start,
            examples,
            memory,
            places.needs_gradient,
        )
        for number in range(steps):
            yield from visit.make(number, next(batches))

        if not visit.label_tokens:
            raise WireError("the server let this site make no step")

        update = subtract(ends.weights(), start)

    memory.keep(site, round)
    values: dict[str, Value] = {
        "n": len(examples),
        "loss": visit.losses / visit.label_tokens,
        "factor": visit.factor,
    }
    if shared is not None and config.mode != "client-batch":
        return frame_payload(shared.encode(update), **values)

    if shared is None:
        kept = {name: state[name] + change for name, change in update.items()}
        site.keep("ends", Payload(kept))
    return Payload(values=values)
