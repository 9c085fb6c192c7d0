"""Which configurations `fluvial plan` can show: those whose method or budget plans before a run."""

from fluvial.errors import ConfigError

PLANS = "fedpipe"
"""Name of the method that makes a plan for each site."""


def check_planned(method: str, *, budget: bool) -> None:
    """Raise `ConfigError` for a configuration that plans nothing: one of another method than
    `PLANS` that has no table `budget`."""
    if method != PLANS and not budget:
        raise ConfigError(
            f"method.name={method!r:.60} without [budget]: nothing is planned before the run; "
            f"`fluvial plan` shows the plan of each site under method {PLANS!r}, and under another "
            "method the choice of a table [budget]"
        )
