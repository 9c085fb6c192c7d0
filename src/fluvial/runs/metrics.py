"""Check of the metrics that a method returns for a round."""

from collections.abc import Mapping

from fluvial.errors import ConfigError

MEASURED = frozenset(
    {"round", "seconds", "times", "bytes_up", "bytes_down", "bytes", "missing", "asked_again"}
)
"""Names in the record of a round whose values the run measures itself."""


def check_metrics(place: str, metrics: Mapping[str, object]) -> None:
    """Raise `ConfigError`, which names `place`, for metrics that make no record of a round."""
    if lacking := sorted({"loss", "sites"} - metrics.keys()):
        raise ConfigError(f"{place} lack {' and '.join(lacking)}")
    if not isinstance(metrics["loss"], float | int | None):
        raise ConfigError(f"{place} have a loss that is no number")
    if not isinstance(metrics["sites"], int):
        raise ConfigError(f"{place} have a number of sites that is no whole number")
    if taken := sorted(MEASURED & metrics.keys()):
        raise ConfigError(
            f"{place} have {' and '.join(taken)}, which the run measures; choose another name"
        )
