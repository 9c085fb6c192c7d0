"""Steps and rounds that a proposed run aims at, by the size of its model."""

from dataclasses import dataclass

from fluvial.runs.config import RunConfig

PASSES = 3
"""Passes over the data of the middle site that a run aims at."""
SMALL = 10**8
"""Parameters below which a model is taken as new to every task."""
DEFAULT_ROUNDS: int = RunConfig.model_fields["rounds"].default


@dataclass(frozen=True)
class Aim:
    """Steps and rounds that a run aims at, by the size of its model."""

    least_steps: int
    """Optimizer steps of a site in all, however few its records are."""
    least_rounds: int
    most_rounds: int
    round_steps: int
    """Steps of a site in a round, where the rounds suffice; more of them let sites drift apart."""
    most_steps: int = 20
    """Steps of a site in a round at most."""


USUAL = Aim(least_steps=60, least_rounds=5, most_rounds=DEFAULT_ROUNDS, round_steps=20)
NEW = Aim(least_steps=240, least_rounds=5, most_rounds=60, round_steps=4)
"""Aim of a model of less than `SMALL` parameters, as measured: docs/log.md, 30 November 2026."""


def is_small(parameters: int) -> bool:
    """Return whether a model of so many parameters is taken as new to every task."""
    return parameters < SMALL


def aim_of(parameters: int, *, private: bool) -> Aim:
    """Return the aim of a run; one that is private adds noise in each round, and has fewer."""
    return NEW if is_small(parameters) and not private else USUAL
