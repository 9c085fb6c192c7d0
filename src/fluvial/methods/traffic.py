"""Predicted bytes of a site's messages in a round, with everything around their frames."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from fluvial.codecs import CODECS, CodecSettings
from fluvial.codecs.auto import AutoSettings
from fluvial.codecs.forecast import frame_size
from fluvial.codecs.quantise import IdentitySettings
from fluvial.exchange import reports_error
from fluvial.exchange.gathering import START
from fluvial.models.adapters import is_side
from fluvial.training.answer_scores import AnswerSums
from fluvial.wire.payload import Payload, Value, frame_payload
from fluvial.wire.tensors import Layout

SHORT_LOSS = 1.5
"""A loss of few digits; a message has six of them at most."""
LONG_LOSS = 1.23456e-05
FULL_LOSS = 1.2345678901234567e-05
"""A loss of as many digits as a float can have."""
MOST_TOKENS = 10**9
"""Label tokens, and millionths of scores, of a site up to which a prediction holds."""
PREDICTED_SAMPLES = 10**7
"""Sequences of a site up to which a prediction holds."""
DIGEST = "0" * 32
"""A digest of a start, of which all have one length."""
CODED = 0.01
"""Share by which the frame of a random update may differ in length from that of a real one."""


@dataclass(frozen=True)
class Bytes:
    """Predicted bytes of one message, or why there are none."""

    least: int = 0
    most: int = 0
    unknown: str = ""
    """Why nothing can be predicted; empty where it can."""

    def __add__(self, other: "Bytes") -> "Bytes":
        """Return the bytes of both together."""
        return Bytes(
            self.least + other.least, self.most + other.most, self.unknown or other.unknown
        )

    def less(self, other: "Bytes", times: int) -> "Bytes":
        """Return these bytes without those of `times` messages."""
        return Bytes(self.least - times * other.least, self.most - times * other.most, self.unknown)

    @property
    def words(self) -> str:
        """The prediction for people."""
        if self.unknown:
            return f"not predicted: {self.unknown}"
        if self.least == self.most:
            return f"{self.most:,} B"
        if 4 * self.least < self.most:
            return f"at most {self.most:,} B"
        return f"{self.least:,} to {self.most:,} B"


@dataclass(frozen=True)
class Traffic:
    """Predicted bytes between the server and one site in one round."""

    down: Bytes
    up: Bytes


def exactly(size: int) -> Bytes:
    """Return a prediction without doubt."""
    return Bytes(size, size)


def unknown(why: str) -> Bytes:
    """Return the absence of a prediction."""
    return Bytes(unknown=why)


def coded_frame(settings: CodecSettings, layout: Layout, *, sparse: bool = False) -> Bytes:
    """Return the bytes of a coded update of `layout`: exact, within `CODED`, or anything up to the
    budget. The last is for codecs that leave some of it where an update has little to send, and for
    updates most of whose values may be zero, `sparse`."""
    if isinstance(settings, AutoSettings):
        return unknown("codec 'auto' is chosen by measurement when the run starts")
    if settings.snr_driven:
        return unknown("the rate of each round follows the errors that sites report")

    size = frame_size(settings, layout)
    kind = CODECS[settings.name]
    if kind.exact:
        return exactly(size)
    most = kind.frame_size(settings, layout)
    if size < (1 - CODED) * most or sparse or not kind.fills:
        return Bytes(0, most)
    return Bytes(int(size * (1 - CODED)), min(int(size * (1 + CODED)) + 1, most))


def envelope(*values: Mapping[str, Value], frame: bool = True) -> Bytes:
    """Return the bytes around a frame, where a message has one of these sets of `values`."""
    sizes = [
        len((frame_payload(b"0", **each) if frame else Payload(values={**each})).to_bytes()) - frame
        for each in values
    ]
    return Bytes(min(sizes), max(sizes))


def answer(*, error: bool = False, loss: float = LONG_LOSS, **values: Value) -> Bytes:
    """Return the bytes around the frame of an update: sample count, loss, error of the codec."""
    short: dict[str, Value] = {"n": 1, "loss": SHORT_LOSS}
    long: dict[str, Value] = {"n": PREDICTED_SAMPLES, "loss": loss}
    if error:
        short["e"] = 0.5
        long["e"] = LONG_LOSS
    return envelope({**values, **short}, {**values, **long})


@dataclass(frozen=True)
class Measured:
    """The model in one held-out measure, as the server sends it to each site."""

    model: Bytes | None
    """Bytes of its frame; None where the site has the model."""
    values: Mapping[str, Value] = field(default_factory=dict)
    """Further values of the message."""

    @classmethod
    def of(cls, layout: Layout, values: Mapping[str, Value] | None = None) -> "Measured":
        """Return a model of `layout` that is sent exactly."""
        return cls(exactly(frame_size(IdentitySettings(), layout)), values or {})

    def bytes(self, models: int, new_tokens: int) -> Bytes:
        """Return the bytes of all held-out measures of one site, in both directions.

        The base is measured once, the run's model `models` times; answers of `new_tokens` are
        written where the records have some.
        """
        asked: dict[str, Value] = {"generate": new_tokens}
        base = envelope({**asked, "which": "base"}, frame=False)
        if self.model is None:
            sent = envelope({**asked, "which": "own"}, frame=False)
        else:
            named = {**asked, **self.values}
            sent = self.model + envelope({**named, "which": "sent"}, {**named, "which": "shared"})

        counts = asdict(AnswerSums()) if new_tokens else {}
        short: dict[str, Value] = {"loss_sum": SHORT_LOSS, "hits": 0, "tokens": 1}
        long: dict[str, Value] = {"loss_sum": FULL_LOSS, "hits": MOST_TOKENS, "tokens": MOST_TOKENS}
        long |= dict.fromkeys(counts, MOST_TOKENS)
        reply = envelope(short, long, frame=False)
        return sum([sent + reply] * models, start=base + reply)


def shared_up(settings: CodecSettings, sent: Layout, *, frame_only: bool = False) -> Bytes:
    """Return the bytes of an update that goes through `fluvial.exchange`."""
    around = envelope({}) if frame_only else answer(error=reports_error(settings))
    return coded_frame(settings, sent) + around


def starts(received: Layout) -> bool:
    """Return whether the adapter of round 1 is the start that sites make: not with a side path."""
    return not any(map(is_side, received.names))


def shared_down(
    settings: CodecSettings | None,
    layout: Layout,
    round: int,
    *,
    all_sites: bool,
    version: bool,
    assigned: Mapping[str, Value],
    rated: bool = False,
) -> Bytes:
    """Return the bytes of an adapter that goes through `fluvial.exchange`.

    `all_sites` says that each site takes part in each round, `version` that the message has the
    version of a codec that is fitted again and again, `assigned` the values of an assignment,
    `rated` that the message has the rate of the round, of up to five figures.
    """
    if rated:
        short, long = (
            shared_down(
                settings,
                layout,
                round,
                all_sites=all_sites,
                version=version,
                assigned={**assigned, "rate": rate},
            )
            for rate in (4.0, 1234.5)
        )
        return Bytes(short.least, long.most, short.unknown)

    values: dict[str, Value] = {"round": round, **assigned}
    if version:
        values["codec"] = round

    start: dict[str, Value] = {START: DIGEST}
    if settings is None and round == 1 and starts(layout):
        return envelope(
            values | start, values | start | ({"codec": 1} if version else {}), frame=False
        )
    if settings is None:
        frame = exactly(frame_size(IdentitySettings(), layout))
        return frame + envelope(values, values | ({"codec": 1} if version else {}))
    if round == 1:
        values |= {"base": 0, "version": 0, "sizes": [], **start}
        return envelope(values, frame=False)
    if not all_sites:
        return unknown("a site that was away gets every frame that it missed")

    frame = coded_frame(settings, layout)
    base = 0 if round == 2 else round - 1
    values |= start if base == 0 else {}
    return frame + envelope(
        *(
            values | {"base": base, "version": round, "sizes": [size]}
            for size in (frame.least, frame.most)
        )
    )
