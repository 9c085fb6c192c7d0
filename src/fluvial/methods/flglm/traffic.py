"""Bytes and time of a site's conversation in a round, from the lengths of its sequences.

The permutations of a round follow from the run's seed, so the lengths of every micro-batch do too;
an activation codec's size follows from the tokens. Only digits of numbers in the messages vary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fluvial.codecs.activations import build_activation
from fluvial.codecs.activations.samples import SampleBatch
from fluvial.codecs.forecast import frame_size
from fluvial.codecs.quantise import IdentitySettings
from fluvial.data import Example
from fluvial.federation.cohort import sample
from fluvial.federation.line import WIRE, Line, round_s
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.draws import draws_of_round
from fluvial.methods.flglm.held_forecast import HeldForecast
from fluvial.methods.flglm.places import Places
from fluvial.methods.flglm.turns import Backward, Content, Forward, Meeting, answer
from fluvial.methods.interface import Given
from fluvial.methods.traffic import FULL_LOSS, SHORT_LOSS, Bytes, envelope, exactly
from fluvial.training.train import shuffled_batches
from fluvial.wire.payload import Value

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
    """Turns in their order, each of which costs a round trip."""
    tokens: int
    """Tokens of all sequences of all steps."""

    @property
    def turns(self) -> int:
        """Number of turns."""
        return len(self.sizes)


@dataclass(frozen=True)
class TurnSize:
    """Bytes of one turn, at most."""

    step: int
    up: int
    down: int

    def seconds(self, line: Line, sharing: int) -> float:
        """Return the seconds of the turn over `line`, which `sharing` sites share."""
        bits = 8 * WIRE / 1e6 * sharing
        moving_s = self.up * bits / line.up_mbit_s + self.down * bits / line.down_mbit_s
        return line.rtt_ms / 1e3 + moving_s


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
        self._shared = places.shared
        self._returns = places.front_is_tuned
        self._kind = _KINDS[given.width_bytes]
        self._gradient = build_activation(config.gradient, self._kind)
        model: Any = given.base
        self._width: int = model.config.get_text_config().hidden_size
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
                for sent, received in self._micro_batch(forward, held):
                    up += sent
                    down += received
                    sizes.append(TurnSize(step, sent.most, received.most))

            for meeting in self._meetings(step):
                sent = self._either(meeting, replace(meeting, weight=self._all_tokens))
                received = self._answer(meeting, self._ends, long={"norm": _LONG})
                up += sent
                down += received
                sizes.append(TurnSize(step, sent.most, received.most))

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
            norm = 0.0 if self._ends else _LONG
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
        whole = self._ends > 0 and (self._given.tunes_factors or round > 1)
        values: dict[str, Value] = {"round": round}
        if self._config.remembers:
            values["held"] = held
        around = envelope(values, frame=whole)
        return around + exactly(self._ends if whole else 0)

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


def round_over_line_s(
    config: FlGlmConfig, given: Given, found: Mapping[str, Conversation], line: Line
) -> float:
    """Return the seconds of a round over `line`, without training: turns, and Flower's messages.

    Where sites meet, each part of the round between two meetings is that of its slowest site; where
    they work one after another, theirs add up. Of a sampled cohort nobody knows the sites, so the
    slowest are assumed.
    """
    together = config.cohort(given.sites)
    alone = config.mode == "sequential"
    sharing = together if line.shared and not alone else 1
    messages_s = [
        round_s(each.first_down.most, each.last_up.most, sites=sharing, line=line)
        for each in found.values()
    ]
    turns_s = [_between_meetings_s(config, each, line, sharing) for each in found.values()]

    if alone:
        whole_s = sorted(
            message_s + sum(parts_s.values())
            for message_s, parts_s in zip(messages_s, turns_s, strict=True)
        )
        return sum(whole_s[-together:])

    parts = {part for parts_s in turns_s for part in parts_s}
    slowest_s = sum(max(parts_s.get(part, 0.0) for parts_s in turns_s) for part in parts)
    return max(messages_s) + slowest_s


def _between_meetings_s(
    config: FlGlmConfig, conversation: Conversation, line: Line, sharing: int
) -> dict[int, float]:
    """Return the seconds of a site's turns by the part of the round that they belong to.

    In a client batch sites meet in every turn; else at an average, or not before the end.
    """
    seconds: dict[int, float] = {}
    for number, size in enumerate(conversation.sizes):
        part = 0
        if config.mode == "client-batch":
            part = number
        elif config.sync_steps is not None:
            part = size.step // config.sync_steps

        seconds[part] = seconds.get(part, 0.0) + size.seconds(line, sharing)

    return seconds
