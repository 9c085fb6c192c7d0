"""The time model of a site's round: training at its measured speed, and bytes over its own link.

    t = fixed + tokens / speed(b) * (4 P + 6 n + [ckpt] (2 P + 2 n)) / (4 P + 6 n_0)
        + down / down_rate + up / up_rate + latency

is C2 of FedPipe as we concretise it: a frozen base costs 2 P in the forward pass and 2 P for the
gradient of its input, an adapter of n parameters 6 n, and checkpointing repeats the forward pass.
The speed is that of whole steps, measured with an adapter of n_0 parameters, without checkpointing;
`fixed` are the measured seconds of a round's training beside its steps. A parameter of a side path
costs 4 a token, for it is frozen, and its bytes down.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from fluvial.methods.fedpipe.planner.formats import FORMATS, Format, Wire
from fluvial.methods.fedpipe.planner.profile import Profile, Speed

VALUE_BYTES = 4
"""Bytes of a value of an uncoded update: fp32."""
HEADER_BYTES = 8
"""Bytes of header for each adapted module, each way."""


@dataclass(frozen=True)
class RoundTime:
    """Seconds of a site's round, of their causes."""

    compute_s: float
    up_s: float
    down_s: float
    latency_s: float

    @property
    def link_s(self) -> float:
        """Return the seconds of messages."""
        return self.up_s + self.down_s + self.latency_s

    @property
    def total_s(self) -> float:
        """Return all of them."""
        return self.compute_s + self.link_s


@dataclass(frozen=True)
class TimeModel:
    """Predicts seconds and bytes of a site's round from its profile."""

    base_parameters: int
    """P: parameters through which a token passes."""
    lora_measured: int
    """n_0: parameters of the adapter with which speeds were measured."""
    down_rate: int = 1
    """Bytes of the fp32 adapter for each byte of its download."""
    trained_share: float = 1.0
    """Share of the adapter's values that a site trains and sends; all of it is sent to the site."""
    factor: float = 1.0
    """Correction of the compute time by rounds that were measured."""

    def bytes_up(self, lora: int, modules: int, wire: Wire) -> int:
        """Return the bytes from a site in a round."""
        values = Fraction(VALUE_BYTES * lora) * Fraction(self.trained_share)
        return ceil(values / wire.rate) + HEADER_BYTES * modules

    def bytes_down(self, lora: int, modules: int) -> int:
        """Return the bytes to a site in a round."""
        return -(-VALUE_BYTES * lora // self.down_rate) + HEADER_BYTES * modules

    def seconds(
        self,
        profile: Profile,
        format: Format,
        wire: Wire,
        *,
        batch: int,
        tokens: int,
        checkpointing: bool,
        lora: int,
        modules: int,
    ) -> RoundTime:
        """Return the seconds of a round over `tokens` tokens."""
        steps_s = tokens * self.token_s(profile, format, batch)
        return RoundTime(
            steps_s * self._work(lora, checkpointing=checkpointing) + self.factor * profile.fixed_s,
            self.bytes_up(lora, modules, wire) / profile.up_bytes_s,
            self.bytes_down(lora, modules) / profile.down_bytes_s,
            profile.latency_s,
        )

    def line(
        self,
        profile: Profile,
        format: Format,
        wire: Wire,
        *,
        batch: int,
        tokens: int,
        checkpointing: bool,
        modules: int,
    ) -> tuple[Fraction, Fraction]:
        """Return (seconds without an adapter, seconds for each of its parameters), exactly.

        They are no less than `seconds`, whose bytes are whole: a byte each way more, and headers of
        all `modules`.
        """
        token_s = Fraction(self.token_s(profile, format, batch)) * tokens
        whole = 4 * self.base_parameters + 6 * self.lora_measured
        base = (6 if checkpointing else 4) * self.base_parameters
        each = 8 if checkpointing else 6
        header = HEADER_BYTES * modules + 1
        up = 1 / Fraction(profile.up_bytes_s)
        down = 1 / Fraction(profile.down_bytes_s)
        beside = Fraction(self.factor * profile.fixed_s) + Fraction(profile.latency_s)
        fixed = token_s * base / whole + header * (up + down) + beside
        per_parameter = token_s * each / whole + VALUE_BYTES * (
            up * Fraction(self.trained_share) / wire.rate + down / self.down_rate
        )
        return fixed, per_parameter

    def side_path(
        self, profile: Profile, format: Format, *, batch: int, tokens: int, checkpointing: bool
    ) -> tuple[Fraction, Fraction]:
        """Return (seconds of training, seconds of the download) for each parameter of a side path,
        exactly."""
        whole = 4 * self.base_parameters + 6 * self.lora_measured
        token_s = Fraction(self.token_s(profile, format, batch)) * tokens
        down = Fraction(profile.down_bytes_s) * self.down_rate
        return token_s * (6 if checkpointing else 4) / whole, VALUE_BYTES / down

    def token_s(self, profile: Profile, format: Format, batch: int) -> float:
        """Return the seconds of a token in a training step."""
        curve = profile.speeds.get(format.name)
        slowdown = 1.0
        if curve is None:
            curve = profile.speeds[profile.format]
            slowdown = format.slowdown / FORMATS[profile.format].slowdown
        return self.factor * slowdown / speed_at(curve, batch)

    def _work(self, lora: int, *, checkpointing: bool) -> float:
        """Return the work of a token against that of the measurement."""
        work = 4 * self.base_parameters + 6 * lora
        if checkpointing:
            work += 2 * self.base_parameters + 2 * lora
        return work / (4 * self.base_parameters + 6 * self.lora_measured)

    def to_json(self) -> dict[str, Any]:
        """Return the model as JSON values, for the record of a run."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TimeModel":
        """Return the inverse of `to_json`; the record is the run's own."""
        return cls(**values)


def speed_at(curve: tuple[Speed, ...], batch: int) -> float:
    """Return the tokens a second at a batch size: linear between measured sizes, constant beyond
    them."""
    before = curve[0]
    if batch <= before.batch:
        return before.tokens_s

    for after in curve[1:]:
        if batch <= after.batch:
            share = (batch - before.batch) / (after.batch - before.batch)
            return before.tokens_s + share * (after.tokens_s - before.tokens_s)
        before = after

    return before.tokens_s


def under_training(deadline_s: float, full_s: float) -> float:
    """Return u = max(0, 1 - tau / t): the share of the local data that is not processed by a
    deadline, where all of it takes `full_s` (our definition; the paper's is not known)."""
    return max(0.0, 1.0 - deadline_s / full_s) if full_s > 0 else 0.0
