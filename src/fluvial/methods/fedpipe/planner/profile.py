"""A site's measured facts, and their strict reading from a message."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fluvial.errors import WireError
from fluvial.methods.fedpipe.planner.formats import FORMATS
from fluvial.models.quantisation import MOST_LAYERS
from fluvial.wire.payload import Value

KEY = "profile"
"""Name of the message value that carries a profile."""

MOST_BYTES = 2**50
"""Bytes of memory that a site may claim."""
MOST_RATE = 1e12
"""Tokens or bytes a second that a site may claim."""
LEAST_RATE = 1e-6
MOST_SECONDS = 1e6
MOST_COUNT = 2**40
MOST_ERROR = 1e3
MOST_POINTS = 256
"""Entries of one list of a profile."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second of whole training steps, without recomputation."""

    batch: int
    """Sequences of the pass."""
    tokens_s: float


@dataclass(frozen=True)
class Tokens:
    """Tokens of the sequences of a round, cut to a length."""

    length: int
    """Tokens of a sequence at most."""
    tokens: int
    """Tokens of all sequences together."""


@dataclass(frozen=True)
class Peak:
    """Most memory of a training step, as measured."""

    batch: int
    length: int
    checkpointing: bool
    bytes: int
    """Bytes of the whole process, or of the device."""


@dataclass(frozen=True)
class Profile:
    """Facts about one site that a plan follows from."""

    memory_bytes: int
    """Most bytes of the site: the user's limit, or what is free."""
    speeds: Mapping[str, tuple[Speed, ...]]
    """Speeds by format of the base, in ascending order of the batch; at least one format."""
    up_bytes_s: float
    """Rate from the site to the server, in bytes a second."""
    down_bytes_s: float
    """Rate from the server to the site, in bytes a second."""
    latency_s: float
    """Seconds of a round's messages without their bytes."""
    samples: int
    """Sequences that a full round trains on."""
    tokens: tuple[Tokens, ...]
    """Tokens of these sequences by length, in ascending order; the last one is uncut."""
    fixed_s: float = 0.0
    """Seconds of a round's training beside its steps."""
    peaks: tuple[Peak, ...] = ()
    """Measured memory, for calibration."""
    errors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Relative error of each decoder layer's weights by quantised format; none where plans do not
    mix formats."""

    @property
    def format(self) -> str:
        """Return the format of the base in which the site measured, the first by name."""
        return min(self.speeds)

    @property
    def unmeasured(self) -> bool:
        """Return whether the site made no pass, because its memory has room for none, and has no
        speed from its budget either."""
        speeds = (speed for curve in self.speeds.values() for speed in curve)
        return not self.peaks and all(speed.tokens_s <= LEAST_RATE for speed in speeds)

    @property
    def all_tokens(self) -> int:
        """Return the tokens of all sequences, uncut."""
        return self.tokens[-1].tokens

    def in_no_time(self) -> "Profile":
        """Return this profile with training that takes no time, where something was measured."""
        speeds = {
            name: tuple(replace(speed, tokens_s=MOST_RATE) for speed in curve)
            for name, curve in self.speeds.items()
        }
        return self if self.unmeasured else replace(self, speeds=speeds, fixed_s=0.0)

    def tokens_at(self, length: int) -> int:
        """Return the tokens of all sequences cut to `length`, of the next smaller length where it
        was not counted, which is no overestimate."""
        counted = [point.tokens for point in self.tokens if point.length <= length]
        if counted:
            return counted[-1]
        return min(self.tokens[0].tokens, self.samples * length)

    def to_values(self) -> dict[str, Value]:
        """Return the message values of this profile."""
        return {
            KEY: {
                "memory_bytes": self.memory_bytes,
                "speeds": {
                    name: [[speed.batch, float(speed.tokens_s)] for speed in speeds]
                    for name, speeds in sorted(self.speeds.items())
                },
                "up_bytes_s": float(self.up_bytes_s),
                "down_bytes_s": float(self.down_bytes_s),
                "latency_s": float(self.latency_s),
                "samples": self.samples,
                "tokens": [[point.length, point.tokens] for point in self.tokens],
                "fixed_s": float(self.fixed_s),
                "peaks": [
                    [peak.batch, peak.length, peak.checkpointing, peak.bytes] for peak in self.peaks
                ],
                "errors": {name: list(errors) for name, errors in sorted(self.errors.items())},
            }
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Value]) -> "Profile":
        """Return the inverse of `to_values`; raises `WireError` that names the wrong field.

        Every number has bounds, so that a site that lies or is broken fails alone.
        """
        given = values.get(KEY)
        if not isinstance(given, dict):
            raise WireError(f"{KEY}: expected names and values, found {type(given).__name__}")

        names = set(cls.__dataclass_fields__)
        for name in sorted(given.keys() - names):
            raise WireError(f"{KEY}: unknown name {name!r:.40}")
        for name in sorted(names - given.keys()):
            raise WireError(f"{KEY}.{name}: is missing")

        samples = _whole("samples", given["samples"], 1, MOST_COUNT)
        return cls(
            _whole("memory_bytes", given["memory_bytes"], 1, MOST_BYTES),
            _speeds(given["speeds"]),
            _number("up_bytes_s", given["up_bytes_s"], LEAST_RATE, MOST_RATE),
            _number("down_bytes_s", given["down_bytes_s"], LEAST_RATE, MOST_RATE),
            _number("latency_s", given["latency_s"], 0, MOST_SECONDS),
            samples,
            _tokens(given["tokens"], samples),
            _number("fixed_s", given["fixed_s"], 0, MOST_SECONDS),
            _peaks(given["peaks"]),
            _errors(given["errors"]),
        )


def _speeds(given: Value) -> dict[str, tuple[Speed, ...]]:
    if not isinstance(given, dict) or not 1 <= len(given) <= MOST_POINTS:
        raise WireError(f"{KEY}.speeds: expected speeds by format of the base")

    speeds = {}
    for name, rows in given.items():
        if name not in FORMATS:
            raise WireError(f"{KEY}.speeds: {name!r:.40} is none of {', '.join(FORMATS)}")

        where = f"speeds[{name!r:.40}]"
        curve = tuple(
            Speed(
                _whole(f"{where} batch", batch, 1, MOST_COUNT),
                _number(f"{where} tokens_s", tokens_s, LEAST_RATE, MOST_RATE),
            )
            for batch, tokens_s in _rows(where, rows, 2)
        )
        _ascending(where, [speed.batch for speed in curve])
        speeds[name] = curve

    return speeds


def _tokens(given: Value, samples: int) -> tuple[Tokens, ...]:
    points = tuple(
        Tokens(
            _whole("tokens length", length, 1, MOST_COUNT),
            _whole("tokens", tokens, samples, MOST_COUNT),
        )
        for length, tokens in _rows("tokens", given, 2)
    )
    _ascending("tokens", [point.length for point in points])

    for point in points:
        if point.tokens > samples * point.length:
            raise WireError(
                f"{KEY}.tokens: {point.tokens} tokens are more than {samples} sequences of at most "
                f"{point.length} hold"
            )
    if any(a.tokens > b.tokens for a, b in itertools.pairwise(points)):
        raise WireError(f"{KEY}.tokens: longer sequences have fewer tokens")

    return points


def _peaks(given: Value) -> tuple[Peak, ...]:
    if given == []:
        return ()

    peaks = []
    for batch, length, checkpointing, size in _rows("peaks", given, 4):
        if type(checkpointing) is not bool:
            raise WireError(
                f"{KEY}.peaks checkpointing: {checkpointing!r:.40} is not true or false"
            )
        peaks.append(
            Peak(
                _whole("peaks batch", batch, 1, MOST_COUNT),
                _whole("peaks length", length, 1, MOST_COUNT),
                checkpointing,
                _whole("peaks bytes", size, 1, MOST_BYTES),
            )
        )

    return tuple(peaks)


def _errors(given: Value) -> dict[str, tuple[float, ...]]:
    if not isinstance(given, dict) or len(given) > MOST_POINTS:
        raise WireError(f"{KEY}.errors: expected errors of layers by format of the base")

    errors = {}
    for name, values in given.items():
        where = f"errors[{name!r:.40}]"
        if name not in FORMATS or not FORMATS[name].quantised:
            raise WireError(f"{KEY}.{where}: this is no quantised format")
        if not isinstance(values, list) or not 1 <= len(values) <= MOST_LAYERS:
            raise WireError(f"{KEY}.{where}: expected a list of 1 to {MOST_LAYERS} numbers")
        errors[name] = tuple(_number(where, value, 0, MOST_ERROR) for value in values)

    return errors


def _rows(where: str, given: Value, width: int) -> list[list[Value]]:
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_POINTS:
        raise WireError(f"{KEY}.{where}: expected a list of 1 to {MOST_POINTS} entries")

    rows = []
    for row in given:
        if not isinstance(row, list) or len(row) != width:
            raise WireError(f"{KEY}.{where}: expected entries of {width} values, found {row!r:.40}")
        rows.append(row)

    return rows


def _ascending(where: str, numbers: Sequence[int]) -> None:
    if any(a >= b for a, b in itertools.pairwise(numbers)):
        raise WireError(f"{KEY}.{where}: entries are not in ascending order")


def _whole(where: str, given: Value, low: int, high: int) -> int:
    if type(given) is not int or not low <= given <= high:
        raise WireError(
            f"{KEY}.{where}: {_shown(given)} is not a whole number from {low} to {high}"
        )
    return given


def _number(where: str, given: Value, low: float, high: float) -> float:
    if type(given) not in (int, float) or isinstance(given, bool):
        raise WireError(f"{KEY}.{where}: {_shown(given)} is not a number")
    assert isinstance(given, int | float)
    if not math.isfinite(given) or not low <= given <= high:
        raise WireError(f"{KEY}.{where}: {_shown(given)} is not from {low:g} to {high:g}")
    return float(given)


def _shown(given: Value) -> str:
    """Return a value as an error shows it; a long whole number by its bits."""
    if type(given) is int and abs(given) >= 2**64:
        return f"a number of {given.bit_length()} bits"
    return f"{given!r:.40}"
