"""`fluvial plan` on a run of three sites, of which one is too small."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.errors import ConfigError
from fluvial.methods.fedpipe.planner.formats import FORMATS
from fluvial.methods.fedpipe.planner.memory import MemoryModel
from fluvial.methods.fedpipe.planner.time import TimeModel
from fluvial.report.site_plans import site_plans_table
from fluvial.runs.config import parse
from fluvial.runs.site_plans import site_plans
from tests.support.runs import run_table, toml_of
from tests.unit.report.test_show import text_of

BUDGETS = [
    {"site": "north", "memory_mb": 50.0, "tokens_s": 1e4, "up_mbit_s": 0.05, "rtt_ms": 100.0},
    {"site": "south", "memory_mb": 0.001, "tokens_s": 1e4},
    {"site": "west", "memory_mb": 50.0, "tokens_s": 1e5},
]


@pytest.fixture
def table(run_config: dict[str, Any]) -> dict[str, Any]:
    method = {"name": "fedpipe", "budgets": BUDGETS, "probe_rank": 2, "probe_steps": 2}
    return run_config | {"method": method, "compare": ["local"]}


def test_each_site_has_a_plan_within_its_limits_or_a_reason(table: dict[str, Any]) -> None:
    planned = site_plans(parse(table, "test"))
    sites = {site["name"]: site for site in planned["sites"]}
    assert set(sites) == {"north", "south", "west"}

    for name in ("north", "west"):
        plan = sites[name]["plan"]
        assert sites[name]["refused"] is None
        assert 0 < plan["prediction"]["memory_bytes"] <= sites[name]["limits"]["memory_bytes"]
        assert plan["prediction"]["bytes_up"] > 0
        assert set(plan["ranks"].values()) <= {2, 4}

    assert sites["south"]["plan"] is None
    assert sites["south"]["refused"].startswith("the base in format float32 needs")
    assert planned["method"]["why"]
    assert planned["codec"]["name"] in ("identity", "int8", "trellis")
    assert "no plan for site south" in text_of(site_plans_table(planned))


def test_the_bytes_are_those_of_the_codec(table: dict[str, Any]) -> None:
    planned = site_plans(parse(table | {"codec": {"name": "int8"}}, "test"))
    for site in planned["sites"]:
        if site["plan"] is not None:
            prediction = site["plan"]["prediction"]
            headers = 8 * len(site["plan"]["ranks"])
            uncoded = prediction["bytes_down"] - headers
            assert site["plan"]["rate"] in (3, 4)
            assert prediction["bytes_up"] - headers == pytest.approx(
                uncoded / site["plan"]["rate"], abs=1
            )


def test_the_command_prints_the_same_plans_and_leaves_nothing(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.toml"
    method = {key: value for key, value in table["method"].items() if key != "budgets"}
    budgets = "".join(f"[[method.budgets]]\n{toml_of(budget)}" for budget in BUDGETS)
    config.write_text(toml_of(table | {"method": method}) + budgets)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["plan", str(config), "--format", "json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(json.dumps(site_plans(parse(table, "test"))))
    assert list(tmp_path.iterdir()) == [config]


def test_a_run_records_the_models_that_its_plans_were_made_with(
    table: dict[str, Any], tmp_path: Path
) -> None:
    few = table | {"rounds": 1, "compare": [], "fleet": {"on_failure": "skip", "quorum": 0.5}}
    setup = run_table(few, tmp_path / "run")["setup"]
    assert set(setup["plans"]) == {"north", "west"}
    plan = setup["plans"]["north"]
    memory = MemoryModel.from_json(setup["models"]["north"]["memory"])
    parameters = 64 * sum(plan["ranks"].values())  # q, k, v and o are 32 x 32
    assert (
        memory.total(
            FORMATS[plan["format"]],
            plan["batch"],
            plan["length"],
            checkpointing=plan["checkpointing"],
            lora=parameters,
        )
        <= plan["prediction"]["memory_bytes"]
    )
    assert TimeModel.from_json(setup["models"]["north"]["time"]).base_parameters > 0


def test_a_method_without_plans_is_refused(run_config: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match="under method 'fedpipe', and under another method the choice of a table"
    ):
        site_plans(parse(run_config, "test"))
