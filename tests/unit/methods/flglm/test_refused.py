"""Settings of FL-GLM that the model's shapes refuse before a run."""

from typing import Any

import pytest

from fluvial.errors import ConfigError
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from tests.support.models import with_fitting_model

NOISE = {"clip": 1.0, "multiplier": 0.5}
"""Noise under which 7 % of the tokens were read from hidden states behind one layer."""


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"mode": "hierarchical", "ends": "own", "parts": {"middle": "frozen"}},
            "nothing to average",
        ),
        ({"parts": {"back": "full"}}, "method.mode='client-batch': with all weights tuned"),
        (
            {"front": 0, "parts": {"front": "lora"}},
            "method.parts.front='lora': no module of lora.target_modules is in the front",
        ),
        (
            {"front": 0, "parts": {"middle": "frozen", "back": "frozen"}},
            "method.parts: nothing is left to tune",
        ),
        ({"hidden": {"name": "int4", "outlier_channels": 65536}}, "method.hidden.outlier_channels"),
        ({"gradient": {"name": "int4", "outlier_channels": 65536}}, "method.gradient.outlier_"),
        (
            {
                "parts": {"front": "frozen", "middle": "frozen"},
                "gradient": {"name": "int8"},
            },
            "gradient: without effect, because no gradient is sent",
        ),
        ({"noise": NOISE, "leakage": {"most": 0.5}}, "for a bound below 94%, freeze front and mid"),
    ],
)
def test_refused(method: dict[str, Any], message: str, run_config: dict[str, Any]) -> None:
    table = with_fitting_model(run_config | {"method": {"name": "flglm"} | method})
    with pytest.raises(ConfigError, match=message):
        plan(parse(table, "test"))


def test_noise_meets_a_bound_on_leakage_where_no_gradient_is_sent(
    run_config: dict[str, Any],
) -> None:
    method = {
        "name": "flglm",
        "parts": {"front": "frozen", "middle": "frozen"},
        "noise": NOISE,
        "leakage": {"most": 0.5},
    }
    plan(parse(with_fitting_model(run_config | {"method": method}), "test"))


@pytest.mark.parametrize("name", ["codec", "downlink"])
def test_a_codec_of_updates_is_refused_with_the_settings_that_choose_one(
    run_config: dict[str, Any], name: str
) -> None:
    table = run_config | {"method": {"name": "flglm"}, name: {"name": "int8"}}
    words = "which method.hidden and method.gradient choose; remove it"
    with pytest.raises(ConfigError, match=f"{name}: without effect.*{words}"):
        parse(table, "test")


@pytest.mark.parametrize(
    "settings",
    [{"method": {"name": "flglm", "parts": {"back": "full"}}}, {"tune": "full"}],
    ids=["a part", "all"],
)
def test_weights_that_are_tuned_are_not_quantised(
    run_config: dict[str, Any], settings: dict[str, Any]
) -> None:
    table = run_config | {"method": {"name": "flglm"}} | settings
    table["model"] = table.get("model", {}) | {"quantization": "nf4"}
    if "tune" in settings:
        table.pop("lora", None)

    with pytest.raises(ConfigError, match="quantization: weights of the base are tuned"):
        parse(table, "test")
