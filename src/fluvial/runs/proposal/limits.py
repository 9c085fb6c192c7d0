"""Limits of a run, in the words of `fluvial init`, and the method that follows from them."""

from collections.abc import Iterable
from typing import Literal, cast, get_args

from fluvial.errors import ConfigError

Limit = Literal["slow-links", "small-memory", "base-stays", "unequal-sites", "privacy"]
LIMITS: dict[Limit, str] = {
    "slow-links": "the lines between server and sites are slow",
    "small-memory": "the sites have little memory",
    "base-stays": "the base model must not be at the sites",
    "unequal-sites": "the sites have unequal machines",
    "privacy": "what a site sends must be differentially private",
}
"""Limits and their meaning."""
MethodName = Literal["fedavg", "cgfedllm", "flglm", "fedpipe"]
_APART = ("base-stays", "unequal-sites", "privacy")
"""Limits that ask for methods of their own."""


def limits_of(words: Iterable[str]) -> frozenset[Limit]:
    """Return the limits that are named, also several with commas between; raises `ConfigError`.

    "none" names no limit.
    """
    names = [name.strip() for word in words for name in word.split(",")]
    for name in names:
        if name and name != "none" and name not in get_args(Limit):
            raise ConfigError(f"--limit {name!r:.40}: choose among {', '.join(LIMITS)}, or none")

    if "none" in names and len(set(names)) > 1:
        raise ConfigError("--limit none: names no limit, and others are named; remove one or other")

    limits = frozenset(cast(Limit, name) for name in names if name in get_args(Limit))
    apart = [name for name in _APART if name in limits]
    if len(apart) > 1:
        raise ConfigError(
            f"--limit {apart[0]} and --limit {apart[1]}: each asks for a method of its own, and a "
            "run has one; choose the harder limit"
        )
    return limits


def method_for(limits: frozenset[Limit]) -> MethodName:
    """Return the method that the limits ask for."""
    if "base-stays" in limits:
        return "flglm"
    if "unequal-sites" in limits:
        return "fedpipe"
    return "cgfedllm" if limits & {"privacy", "slow-links"} else "fedavg"


def reads_public(limits: frozenset[Limit]) -> bool:
    """Return whether public text is used to choose the codec."""
    return method_for(limits) == "cgfedllm" and "privacy" not in limits
