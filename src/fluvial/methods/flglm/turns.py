"""Turns of a conversation: what a site and the server tell each other in a step.

A step goes, for each micro-batch of a site: forward (hidden states of A up, those of B down), then
backward (gradient of B's hidden states up, that of A's down). Both carry real tokens only, coded by
an activation codec; lengths of sequences take the place of a mask. Between two steps sites may
meet: to clip their gradients together, or to average their weights.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from fluvial.codecs.activations.samples import SampleBatch
from fluvial.errors import WireError
from fluvial.federation.replies import MOST_SAMPLES, MOST_TOKENS, fields
from fluvial.models.assignment import MOST_SEQUENCES
from fluvial.training.config import TrainConfig
from fluvial.wire.payload import FRAME, Payload, Value, frame_payload, payload_frame

MOST_STEPS = 10**9
"""Steps of one round, as `train.max_steps` bounds them."""
MOST_SQUARED_NORM = 1e30
"""Upper bound on the sum of squares of the gradients of all sites and the server."""
MOST_OWN_SQUARED_NORM = 1e24
"""The same of one site: a million sites stay within the bound of all."""
LOOKED_AT = 16
"""Sequences of one forward pass in which the model is measured."""


@dataclass(frozen=True)
class TurnLimits:
    """Bounds on the numbers in a site's turns, from what the run's settings let an honest site
    send."""

    longest: int | None
    """Tokens that the model reads at most; None without a limit."""
    sequences: int
    """Sequences of a micro-batch."""
    micro_batches: int
    """Micro-batches of a step."""
    steps: int
    """Steps of a round."""
    names_samples: bool = False
    """True where the site names the samples of a micro-batch."""

    @classmethod
    def of(
        cls, train: TrainConfig, longest: int | None, *, names_samples: bool = False
    ) -> "TurnLimits":
        """Return the limits for training with these settings."""
        size = train.per_device_train_batch_size
        steps = train.max_steps or MOST_STEPS
        return cls(longest, size, train.gradient_accumulation_steps, steps, names_samples)

    def tokens(self, lengths: Sequence[int]) -> int:
        """Return the most label tokens of a step whose first micro-batch has these lengths."""
        more = (self.micro_batches - 1) * self.sequences
        return sum(lengths) + more * (self.longest or MOST_SEQUENCES)


@dataclass(frozen=True)
class Forward:
    """Hidden states of A for one micro-batch."""

    step: int
    micro: int
    steps: int
    """Steps of this site in the round."""
    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    tokens: int
    """Label tokens of the logical batch."""
    returns: bool
    """True where the site needs the gradient of its hidden states."""
    factor: float
    """Factor that clipped the gradients of the step before; 1 in the first step."""
    frame: bytes
    """Hidden states, without those that the server holds."""
    samples: tuple[int, ...] | None = None
    """Number of each sequence, the same in each pass; None where no end holds hidden states."""
    held: int = 0
    """Round of the memory with which the site began; 0 for an empty one."""

    @property
    def batch(self) -> SampleBatch:
        """The sequences by number, or by their place where they have none; raises `WireError`."""
        places = tuple(range(len(self.lengths)))
        return SampleBatch(places if self.samples is None else self.samples, self.lengths)

    def payload(self) -> Payload:
        """Return the message."""
        values: dict[str, Value] = {
            "of": "forward",
            "step": self.step,
            "micro": self.micro,
            "steps": self.steps,
            "lengths": list(self.lengths),
            "tokens": self.tokens,
            "returns": self.returns,
            "factor": self.factor,
        }
        if self.samples is not None:
            values |= {"samples": list(self.samples), "held": self.held}
        return _carrying(self.frame, values)


@dataclass(frozen=True)
class Backward:
    """Gradient of B's hidden states for one micro-batch."""

    step: int
    micro: int
    frame: bytes
    """The gradient; empty where neither the middle nor the front are tuned."""

    def payload(self) -> Payload:
        """Return the message."""
        return _carrying(self.frame, {"of": "backward", "step": self.step, "micro": self.micro})


@dataclass(frozen=True)
class Meeting:
    """A turn in which a site waits for the others of its round, behind a step."""

    of: Literal["clip", "average"]
    """Gradients to be clipped together, or weights to be averaged."""
    step: int
    weight: int
    """Weight of the site in an average; 1 in a sum of gradients."""
    squared_norm: float
    """Sum of squares of gradients that are the site's own."""
    factor: float
    """Factor that clipped the gradients of the step, where weights are averaged; else 1."""
    frame: bytes | None
    """Gradients, or updates since the last average, of the layers that all sites share."""

    def payload(self) -> Payload:
        """Return the message."""
        values: dict[str, Value] = {
            "of": self.of,
            "step": self.step,
            "n": self.weight,
            "norm": self.squared_norm,
            "factor": self.factor,
        }
        return Payload(values=values) if self.frame is None else frame_payload(self.frame, **values)


@dataclass(frozen=True)
class Look:
    """Hidden states of A for sequences on which the model is measured."""

    lengths: tuple[int, ...]
    frame: bytes

    def payload(self) -> Payload:
        """Return the message."""
        return frame_payload(self.frame, of="look", lengths=list(self.lengths))


@dataclass(frozen=True)
class Continue:
    """Hidden states of A for the next tokens of a text that is being generated."""

    begins: bool
    """True for the prompt, with which a text begins."""
    tokens: int
    frame: bytes

    def payload(self) -> Payload:
        """Return the message."""
        return frame_payload(self.frame, of="continue", begins=self.begins, tokens=self.tokens)


def read_use(payload: Payload, *, longest: int | None) -> Look | Continue:
    """Return a turn in which the model is used, and not trained; raises `WireError`."""
    of = payload.value("of", str)
    if of == "look":
        fields(payload, ("of", "lengths"), (FRAME,))
        lengths = read_lengths(payload, LOOKED_AT, longest)
        return Look(lengths, payload_frame(payload))

    if of == "continue":
        fields(payload, ("of", "begins", "tokens"), (FRAME,))
        tokens = payload.whole("tokens", 1, longest or MOST_SEQUENCES)
        return Continue(payload.value("begins", bool), tokens, payload_frame(payload))

    raise WireError(f"message value 'of': {of!r:.40} is no use of the model")


Content = Forward | Backward | Meeting
REJOIN = "rejoin"
"""Kind of the answer to a turn that is not used."""


def read_turn(payload: Payload, limits: TurnLimits) -> Content:
    """Return a site's turn; raises `WireError` for one beyond `limits`."""
    of = payload.value("of", str)
    step = payload.whole("step", 0, MOST_STEPS)

    if of == "forward":
        names = (*FORWARD, *SAMPLES) if limits.names_samples else FORWARD
        fields(payload, names, tuple(payload.tensors.keys() & {FRAME}))
        lengths = read_lengths(payload, limits.sequences, limits.longest)
        micro = payload.whole("micro", 0, limits.micro_batches - 1)
        return Forward(
            step,
            micro,
            payload.whole("steps", step + 1, limits.steps),
            lengths,
            payload.whole("tokens", 1, MOST_TOKENS if micro else limits.tokens(lengths)),
            payload.value("returns", bool),
            payload.number("factor", 0.0, 1.0),
            frame_of(payload),
            read_samples(payload, len(lengths)) if limits.names_samples else None,
            payload.whole("held", 0, MOST_STEPS) if limits.names_samples else 0,
        )

    if of == "backward":
        fields(payload, ("of", "step", "micro"), tuple(payload.tensors.keys() & {FRAME}))
        micro = payload.whole("micro", 0, limits.micro_batches - 1)
        return Backward(step, micro, frame_of(payload))

    if of in ("clip", "average"):
        carries = FRAME in payload.tensors
        fields(payload, ("of", "step", "n", "norm", "factor"), (FRAME,) if carries else ())
        return Meeting(
            "clip" if of == "clip" else "average",
            step,
            payload.whole("n", 1, MOST_SAMPLES),
            payload.number("norm", 0.0, MOST_OWN_SQUARED_NORM),
            payload.number("factor", 0.0, 1.0),
            payload_frame(payload) if carries else None,
        )

    raise WireError(f"message value 'of': {of!r:.40} is no turn of a step")


FORWARD: Collection[str] = (
    *("of", "step", "micro", "steps", "lengths", "tokens", "returns", "factor"),
)
"""Values of a forward turn."""
SAMPLES: Collection[str] = ("samples", "held")
"""Further ones where an end holds hidden states by sample."""


def _carrying(frame: bytes, values: dict[str, Value]) -> Payload:
    """Return a message with a frame, or without one where there is nothing to send."""
    return frame_payload(frame, **values) if frame else Payload(values=values)


def frame_of(payload: Payload) -> bytes:
    """Return the frame of a message, empty where it carries none; raises `WireError`."""
    return payload_frame(payload) if payload.tensors else b""


def read_samples(payload: Payload, count: int) -> tuple[int, ...]:
    """Return the numbers of `count` sequences in a message; raises `WireError`."""
    samples = payload.value("samples", list)
    if len(samples) != count or not all(type(sample) is int for sample in samples):
        raise WireError(f"message value 'samples': expected {count} whole numbers")
    return SampleBatch(tuple(samples), (0,) * count).samples


def read_lengths(payload: Payload, sequences: int, longest: int | None) -> tuple[int, ...]:
    """Return the lengths of at most `sequences` sequences in a message; raises `WireError`.

    The server pads a batch to its longest sequence, so both bounds together bound its memory.
    """
    lengths = payload.value("lengths", list)
    most = longest or MOST_SEQUENCES
    if not 1 <= len(lengths) <= sequences or not all(
        type(length) is int and 1 <= length <= most for length in lengths
    ):
        raise WireError(
            f"message value 'lengths': expected at most {sequences} whole numbers from 1 to {most}"
        )
    return tuple(lengths)


def answer(turn: Content, frame: bytes | None, **values: Value) -> Payload:
    """Return the server's answer to a turn, which says whose answer it is."""
    about: dict[str, Value] = {"of": of(turn), "step": turn.step, **values}
    if isinstance(turn, Forward | Backward):
        about["micro"] = turn.micro
    return Payload(values=about) if frame is None else frame_payload(frame, **about)


def rejoin(step: int, frame: bytes | None) -> Payload:
    """Return the answer to a turn that is not used: the site goes on with `step`.

    `frame` has the state of the layers that sites share, where the site's is older.
    """
    values: dict[str, Value] = {"of": REJOIN, "step": step}
    return Payload(values=values) if frame is None else frame_payload(frame, **values)


def check_answer(payload: Payload, turn: Content) -> None:
    """Raise `WireError` unless `payload` answers `turn`."""
    expected = answer(turn, None).values
    given = {name: payload.values.get(name) for name in expected}
    if given != expected:
        raise WireError(f"the server answered {given!r:.100} to the turn {expected!r:.100}")


def of(turn: Content) -> str:
    """Return the kind of a turn, as its message names it."""
    if isinstance(turn, Meeting):
        return turn.of
    return "forward" if isinstance(turn, Forward) else "backward"
