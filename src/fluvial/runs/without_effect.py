"""Settings of other tables that a method has no use for, which a configuration may not set."""

from collections.abc import Iterator
from dataclasses import dataclass

from fluvial.federation.config import BOUNDS, Bound, FleetConfig
from fluvial.methods.interface import MethodSettings, Traits
from fluvial.methods.measuring import EvaluateConfig
from fluvial.settings import Settings

_UNBOUNDED: dict[Bound, str] = {
    "max_update_growth": "compares no updates with each other",
    "max_weight_share": "averages no updates by their samples",
}
"""Reasons for which a bound changes nothing, as predicates of the method."""


@dataclass(frozen=True)
class Useless:
    """A setting that changes nothing under a method."""

    table: str
    name: str
    default: object
    why: str
    """Predicate of the method: the reason."""


def useless(method: MethodSettings, traits: Traits) -> Iterator[Useless]:
    """Yield the settings of `[fleet]` and `[evaluate]` that change nothing under `method`."""
    for bound in sorted(BOUNDS - method.bounds):
        yield _setting("fleet", FleetConfig, bound, _UNBOUNDED[bound])

    if traits.pooled:
        for name in ("quorum", "line", "workers", "sites", "join_timeout_s"):
            yield _setting("fleet", FleetConfig, name, "has all data at one place")
        yield _setting("evaluate", EvaluateConfig, "cross_site", "has one model for all data")

    if not traits.exports:
        tasks = ("tasks", "num_fewshot", "limit", "include_path")
        for name in ("sample_prompt", "sample_tokens", *tasks):
            yield _setting("evaluate", EvaluateConfig, name, "writes no model")


def _setting(table: str, kind: type[Settings], name: str, why: str) -> Useless:
    return Useless(table, name, kind.model_fields[name].default, why)
