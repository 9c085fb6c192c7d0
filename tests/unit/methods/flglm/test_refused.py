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
        ({"mode": "hierarchical", "ends": "own", "frozen": ["middle"]}, "nothing to average"),
        ({"hidden": {"name": "int4", "outlier_channels": 65536}}, "method.hidden.outlier_channels"),
        ({"gradient": {"name": "int4", "outlier_channels": 65536}}, "method.gradient.outlier_"),
    ],
)
def test_refused(method: dict[str, Any], message: str, run_config: dict[str, Any]) -> None:
    table = with_fitting_model(run_config | {"method": {"name": "flglm"} | method})
    with pytest.raises(ConfigError, match=message):
        plan(parse(table, "test"))
