"""Settings of FL-GLM that the model's shapes refuse before a run."""

from typing import Any

import pytest

from fluvial.errors import ConfigError
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from tests.support.models import with_fitting_model


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
    ],
)
def test_refused(method: dict[str, Any], message: str, run_config: dict[str, Any]) -> None:
    table = with_fitting_model(run_config | {"method": {"name": "flglm"} | method})
    with pytest.raises(ConfigError, match=message):
        plan(parse(table, "test"))
