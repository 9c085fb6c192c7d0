"""Fixtures of the tests of a site's process."""

from typing import Any

import pytest

from fluvial.models.pool import ModelPool
from fluvial.runs.config import RunConfig, parse

# -- answers -------------------------------------------------------------------------------------


@pytest.fixture
def table(run_config: dict[str, Any]) -> dict[str, Any]:
    """Four rounds of FedAvg whose sites keep a residual."""
    codec = {"name": "top_k", "rate": 8, "error_feedback": True}
    return run_config | {"rounds": 4, "codec": codec}


@pytest.fixture
def config(table: dict[str, Any]) -> RunConfig:
    return parse(table, "test")


@pytest.fixture
def pool(config: RunConfig) -> ModelPool:
    return ModelPool(config.model, config.adapter)
