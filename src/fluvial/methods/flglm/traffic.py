"""Bytes and time of a site's conversation in a round, from the lengths of its sequences.

The permutations of a round follow from the run's seed, so the lengths of every micro-batch do too;
an activation codec's size follows from the tokens. Only digits of numbers in the messages vary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fluvial.codecs.activations import build_activation
from fluvial.codecs.activations.samples import SampleBatch
from fluvial.codecs.forecast import frame_size
from fluvial.codecs.quantise import IdentitySettings
from fluvial.data import Example
from fluvial.federation.cohort import sample
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.draws import draws_of_round
from fluvial.methods.flglm.held_forecast import HeldForecast
from fluvial.methods.flglm.order import order_of_step
from fluvial.methods.flglm.places import Places
from fluvial.methods.flglm.turns import Backward, Content, Forward, Meeting, answer
from fluvial.methods.interface import Given
from fluvial.methods.traffic import FULL_LOSS, SHORT_LOSS, Bytes, envelope, exactly
from fluvial.models.pretrained import hidden_width
from fluvial.models.states import changed, initial_state
from fluvial.training.train import shuffled_batches
from fluvial.wire.payload import Payload, Value
from fluvial.wire.tensors import Layout

_KINDS = {4: torch.float32, 2: torch.bfloat16}
"""Float types by bytes of a value; codecs have the same size for both types of two bytes."""
_LONG = 1.2345678901234567e-05
"""A float of as many digits as one can have."""


@dataclass(frozen=True)
class Conversation:
    """The messages between one site and the server in one round."""

    down: Bytes
    up: Bytes
    first_down: Bytes
    """The first message among those down, which travels by Flower."""
    last_up: Bytes
    """The reply among those up, which does too."""
    sizes: tuple["TurnSize", ...]
    """Turns in their order."""
    tokens: int
    """Tokens of all sequences of all steps."""

    @property
    def turns(self) -> int:
        """Number of turns."""
        return len(self.sizes)


@dataclass(frozen=True, order=True)
class TurnSize:
    """Bytes of one turn, at most."""

    step: int
    rank: tuple[int, int]
    """Place in the step among the turns of all sites; `MEETING` for one between two steps."""
    answers: int
    """Answers to earlier turns of the step that a site has when it sends this one."""
    up: int
    down: int


MEETING = (2**62, 0)
"""Rank of a turn in which sites meet, behind all others of its step."""


def conversations(
    config: FlGlmConfig, given: Given, places: Places, round: int
) -> dict[str, Conversation]:
    """Return the conversations of a round by site, for all sites as if each took part."""
    assert given.examples is not None, "the sites' data is here"
    by_site = given.examples()
    all_tokens = sum(example.label_tokens for examples in by_site.values() for example in examples)
    prediction = _Prediction(config, given, places, all_tokens, tuple(by_site))
    return {
        site: prediction.conversation(site, examples, round) for site, examples in by_site.items()
    }


def batches_of(
    given: Given, site: str, examples: Sequence[Example], round: int
) -> Iterator[list[int]]:
    """Yield the logical batches of a site's round, as its task draws them, by the places of their
    sequences."""
    _, draw = draws_of_round(given.seed, round, site)
    batches = shuffled_batches(range(len(examples)), given.train.logical_batch, draw)
    for _ in range(given.train.steps(len(examples))):
        yield next(batches)


class _Prediction:
    """The bytes of messages of one run."""

    def __init__(
        self,
        config: FlGlmConfig,
        given: Given,
        places: Places,
        all_tokens: int,
        sites: Sequence[str],
    ) -> None:
        self._config = config
        self._given = given
        self._all_tokens = all_tokens
        self._sites = sites
        self._needs_gradient = places.needs_gradient
        self._tunes_own_ends = bool(places.ends.shapes) and not places.shared.shapes
        self._shared = places.shared
        start = changed(initial_state(places.shared, given.seed))
        self._begun = Layout.of(start)
        """Tensors of the shared layers that the first message of round 1 has."""
        self._returns = places.front_is_tuned
        self._kind = _KINDS[given.width_bytes]
        self._gradient = build_activation(config.gradient, self._kind)
        self._width = hidden_width(given.base)
        self._ends = frame_size(IdentitySettings(), self._shared) if self._shared.shapes else 0

    def conversation(self, site: str, examples: Sequence[Example], round: int) -> Conversation:
        """Return the conversation of one site."""
        steps = self._given.train.steps(len(examples))
        size = self._given.train.per_device_train_batch_size
        up = Bytes()
        down = Bytes()
        sizes: list[TurnSize] = []
        tokens = 0
        held = self._before(site, examples, round)

        for step, logical in enumerate(batches_of(self._given, site, examples, round)):
            label_tokens = sum(examples[place].label_tokens for place in logical)
            turns: list[list[tuple[Bytes, Bytes]]] = []
            for micro, start in enumerate(range(0, len(logical), size)):
                batch = self._batch(held, examples, logical[start : start + size])
                tokens += batch.tokens
                forward = Forward(
                    step,
                    micro,
                    steps,
                    batch.lengths,
                    label_tokens,
                    self._returns,
                    1.0,
                    b"",
                    batch.samples if self._config.remembers else None,
                    held.held,
                )
                turns.append(self._micro_batch(forward, held))

            for place in order_of_step(len(turns), self._config.in_flight):
                sent, received = turns[place.micro][0 if place.forward else 1]
                up += sent
                down += received
                sizes.append(TurnSize(step, place.rank, place.answers, sent.most, received.most))

            for meeting in self._meetings(step):
                sent = self._either(meeting, replace(meeting, weight=self._all_tokens))
                received = self._answer(meeting, self._ends, long={"norm": _LONG})
                up += sent
                down += received
                sizes.append(TurnSize(step, MEETING, 2 * len(turns), sent.most, received.most))

        first = self._message(round, held.held)
        last = self._reply(examples)
        return Conversation(down + first, up + last, first, last, tuple(sizes), tokens)

    def _before(self, site: str, examples: Sequence[Example], round: int) -> HeldForecast:
        """Return the samples that are held of a site when a round begins."""
        held = HeldForecast(self._config, self._width, self._kind)
        if not self._config.remembers:
            return held

        size = self._given.train.per_device_train_batch_size
        for number in range(1, round):
            fraction = self._config.fraction
            if site not in sample(self._sites, fraction, seed=self._given.seed, round=number):
                continue

            held.held = number
            if held.complete(len(examples)):
                continue

            for logical in batches_of(self._given, site, examples, number):
                for start in range(0, len(logical), size):
                    batch = self._batch(held, examples, logical[start : start + size])
                    held.size("up", batch)
                    held.size("down", batch)

        return held

    def _batch(
        self, held: HeldForecast, examples: Sequence[Example], places: Sequence[int]
    ) -> SampleBatch:
        """Return the micro-batch of the sequences at `places`."""
        return held.batch(places, [len(examples[place].input_ids) for place in places])

    def _micro_batch(self, forward: Forward, held: HeldForecast) -> list[tuple[Bytes, Bytes]]:
        """Return the bytes up and down of a forward turn, and of a backward turn."""
        hidden_up = held.size("up", forward.batch)
        hidden_down = held.size("down", forward.batch)
        gradient = self._gradient.size(forward.batch.tokens, self._width)
        forward = replace(forward, frame=b"0" if hidden_up else b"")
        forth = self._either(forward, replace(forward, factor=_LONG)) + exactly(hidden_up)

        gradient_up = gradient if self._needs_gradient else 0
        backward = Backward(forward.step, forward.micro, b"0" if gradient_up else b"")
        back = self._either(backward, backward) + exactly(gradient_up)

        together: dict[str, Value] = {}
        longer: dict[str, Value] = {}
        if self._config.mode == "client-batch":
            together = {"tokens": forward.tokens, "steps": forward.steps}
            longer = {"tokens": self._all_tokens, "steps": 10**9}

        answer_forth = self._answer(forward, hidden_down, short=together, long=longer)
        returned = gradient if self._returns else 0
        norms: tuple[dict[str, Value], dict[str, Value]] = ({"norm": 0.5}, {"norm": _LONG})
        answer_back = self._answer(backward, returned, short=norms[0], long=norms[1])
        return [(forth, answer_forth), (back, answer_back)]

    def _meetings(self, step: int) -> list[Meeting]:
        """Return the meetings behind a step."""
        frame = b"0" if self._ends else None
        if self._config.mode == "client-batch":
            norm = _LONG if self._tunes_own_ends else 0.0
            return [Meeting("clip", step, 1, norm, 1.0, frame)]

        every = self._config.sync_steps
        if every is None or (step + 1) % every:
            return []
        return [Meeting("average", step, 1, 0.0, 1.0, frame)]

    def _either(self, short: Content, long: Content) -> Bytes:
        """Return the bytes of one of two turns, with the frame of a meeting."""
        sizes = [len(turn.payload().to_bytes()) for turn in (short, long)]
        carries = bool(short.frame)
        frame = self._ends if isinstance(short, Meeting) and carries else 0
        return Bytes(min(sizes) - carries + frame, max(sizes) - carries + frame)

    def _answer(
        self,
        turn: Content,
        frame: int,
        *,
        short: Mapping[str, Value] | None = None,
        long: Mapping[str, Value] | None = None,
    ) -> Bytes:
        """Return the bytes of the server's answer with a frame of `frame` bytes, 0 without any."""
        content = b"0" if frame else None
        sizes = [
            len(answer(turn, content, **(values or {})).to_bytes()) - bool(frame)
            for values in (short, long)
        ]
        return Bytes(min(sizes) + frame, max(sizes) + frame)

    def _message(self, round: int, held: int) -> Bytes:
        """Return the bytes of the first message, which names the round of what is `held`."""
        values: dict[str, Value] = {"round": round}
        if self._config.remembers:
            values["held"] = held

        if round == 1 and self._begun != self._shared:  # weights without a change are left out
            nothing = {name: torch.zeros(shape) for name, shape in self._begun.shapes}
            return exactly(len(Payload(nothing, values).to_bytes()))

        whole = self._ends > 0
        return envelope(values, frame=whole) + exactly(self._ends if whole else 0)

    def _reply(self, examples: Sequence[Example]) -> Bytes:
        """Return the bytes of the reply."""
        carries = self._ends > 0 and self._config.mode != "client-batch"
        values: dict[str, Value] = {"n": len(examples)}
        around = envelope(
            values | {"loss": SHORT_LOSS, "factor": 1.0},
            values | {"loss": FULL_LOSS, "factor": _LONG},
            frame=carries,
        )
        return around + exactly(self._ends if carries else 0)
