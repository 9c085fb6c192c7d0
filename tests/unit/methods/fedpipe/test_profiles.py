"""A site's profile on the wire: what a broken or lying site sends is refused with its field."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from fluvial.errors import WireError
from fluvial.federation.line import Line
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.planner.profile import MOST_RATE, Peak, Profile, Speed, Tokens
from fluvial.methods.fedpipe.planner.settings import SiteBudget
from fluvial.methods.fedpipe.profiles import MBIT, over_line

PROFILE = Profile(
    memory_bytes=10**9,
    speeds={"bfloat16": (Speed(1, 100.0), Speed(4, 300.0)), "nf4": (Speed(1, 90.0),)},
    up_bytes_s=1e5,
    down_bytes_s=1e6,
    latency_s=0.5,
    samples=10,
    tokens=(Tokens(16, 120), Tokens(64, 300)),
    fixed_s=0.25,
    peaks=(Peak(1, 64, True, 10**8),),
)


def test_a_profile_returns_from_its_values() -> None:
    assert Profile.from_values(PROFILE.to_values()) == PROFILE


def test_the_rates_that_settings_allow_are_those_that_a_profile_may_have() -> None:
    """A rate beyond them would stop a run in its profile, or when it is resumed."""
    budget = SiteBudget(site="north", up_mbit_s=8e6, down_mbit_s=1e-6)
    assert budget.up_mbit_s is not None
    assert budget.down_mbit_s is not None
    rates = {"up_bytes_s": budget.up_mbit_s * MBIT, "down_bytes_s": budget.down_mbit_s * MBIT}
    profile = replace(PROFILE, **rates)  # type: ignore[arg-type]
    assert Profile.from_values(profile.to_values()) == profile
    with pytest.raises(ValidationError, match="less than or equal to 8000000"):
        SiteBudget(site="north", up_mbit_s=1e9)

    with pytest.raises(ValidationError, match="site 'north' has no limit and no rate"):
        FedPipeConfig(budgets=(SiteBudget(site="north"),))

    unknown = replace(PROFILE, up_bytes_s=MOST_RATE, down_bytes_s=MOST_RATE)
    line = Line(up_mbit_s=1e9, down_mbit_s=1e9, rtt_ms=0)
    over = over_line({"north": unknown}, FedPipeConfig(), line)["north"]
    assert Profile.from_values(over.to_values()) == over


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("memory_bytes", -1, "profile.memory_bytes: -1 is not a whole number"),
        ("memory_bytes", 1e9, "profile.memory_bytes: 1000000000.0 is not a whole number"),
        ("memory_bytes", 2**60, "profile.memory_bytes"),
        ("memory_bytes", 10**400, "profile.memory_bytes: a number of 1329 bits"),
        ("memory_bytes", True, "profile.memory_bytes: True"),
        ("up_bytes_s", 0, "profile.up_bytes_s: 0 is not from"),
        ("up_bytes_s", math.nan, "profile.up_bytes_s: nan"),
        ("down_bytes_s", math.inf, "profile.down_bytes_s: inf"),
        ("down_bytes_s", "fast", "profile.down_bytes_s: 'fast' is not a number"),
        ("latency_s", -0.1, "profile.latency_s"),
        ("fixed_s", -1.0, "profile.fixed_s"),
        ("samples", 0, "profile.samples"),
        ("speeds", {}, "profile.speeds"),
        ("speeds", [], "profile.speeds"),
        ("speeds", {"nf4": []}, r"profile.speeds\['nf4'\]: expected a list"),
        ("speeds", {"nf4": [[1, 2.0, 3]]}, r"profile.speeds\['nf4'\]: expected entries of 2"),
        ("speeds", {"nf4": [[4, 2.0], [1, 3.0]]}, r"profile.speeds\['nf4'\]: .*ascending"),
        ("speeds", {"nf4": [[1, -2.0]]}, r"profile.speeds\['nf4'\] tokens_s: -2.0"),
        ("tokens", [], "profile.tokens"),
        ("tokens", [[16, 161]], "profile.tokens: 161 tokens are more than 10 sequences"),
        ("tokens", [[16, 120], [64, 100]], "profile.tokens: longer sequences have fewer"),
        ("tokens", [[16, 9]], "profile.tokens"),
        ("peaks", [[1, 64, 1, 10]], "profile.peaks checkpointing: 1 is not true or false"),
        ("peaks", [[1, 64, True, -1]], "profile.peaks bytes"),
        ("peaks", None, "profile.peaks"),
    ],
)
def test_a_lying_profile_is_refused_by_field(field: str, value: Any, words: str) -> None:
    values: Any = copy.deepcopy(PROFILE.to_values())
    values["profile"][field] = value
    with pytest.raises(WireError, match=words):
        Profile.from_values(values)


def test_fields_are_neither_missing_nor_more() -> None:
    values: Any = PROFILE.to_values()
    with pytest.raises(WireError, match="unknown name 'cheat'"):
        Profile.from_values({"profile": values["profile"] | {"cheat": 1}})

    del values["profile"]["tokens"]
    with pytest.raises(WireError, match="profile.tokens: is missing"):
        Profile.from_values(values)
    with pytest.raises(WireError, match="profile: expected names and values"):
        Profile.from_values({})


def test_tokens_of_a_length_that_was_not_counted_are_no_overestimate() -> None:
    assert PROFILE.tokens_at(64) == PROFILE.tokens_at(4096) == PROFILE.all_tokens == 300
    assert PROFILE.tokens_at(63) == PROFILE.tokens_at(16) == 120
    assert PROFILE.tokens_at(8) == 80
