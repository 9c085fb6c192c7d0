"""Predicted against measured figures of a round, for the record of a run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fluvial.methods.fedpipe.planner.plan import SitePlan
from fluvial.wire.payload import Value


@dataclass(frozen=True)
class Measured:
    """Figures of a site's round, as measured."""

    memory_bytes: int | None
    """Most bytes of the process, or of the device; None where it was not measured apart."""
    bytes_up: int
    bytes_down: int | None
    """None in round 1, whose adapter each site makes from the seed."""
    seconds: float
    """Seconds of training, without messages."""


def compared(plan: SitePlan, measured: Measured) -> dict[str, Value]:
    """Return each predicted figure, the measured one, and their relative error, as JSON values.

    The error is (predicted - measured) / measured, None where nothing was measured.
    """
    predicted: Mapping[str, float] = {
        "memory_bytes": plan.prediction.memory_bytes,
        "bytes_up": plan.prediction.bytes_up,
        "bytes_down": plan.prediction.bytes_down,
        "seconds": plan.prediction.compute_s,
    }
    figures: dict[str, Value] = {}
    values: dict[str, float | None] = asdict(measured)
    for name, figure in predicted.items():
        value = values[name]
        error = (figure - value) / value if value else None
        figures[name] = {"predicted": figure, "measured": value, "error": error}
    return figures
