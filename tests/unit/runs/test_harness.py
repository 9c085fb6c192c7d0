"""Tasks of lm-eval at the end of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.errors import ConfigError
from fluvial.runs.config import load, parse
from tests.support.harness import write_tasks
from tests.support.runs import run_table


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    """Settings of [evaluate] with a task in a local folder."""
    path = write_tasks(tmp_path / "own")
    return {"tasks": ["texts"], "include_path": str(path), "limit": 6, "sample_tokens": 2}


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_run_measures_what_evaluate_measures(
    tune: str, run_config: dict[str, Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    table = run_config | {"rounds": 1, "tune": tune, "evaluate": asked}
    if tune == "full":
        del table["lora"]
    result = run_table(table, tmp_path / "run")
    command = ["evaluate", str(tmp_path / "run"), "--tasks", "texts", "--limit", "6"]
    command += ["--include-path", asked["include_path"], "--format", "json"]
    alone = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)
    assert result["tasks"]["rows"] == alone["tasks"]["rows"]
    assert result["tasks"]["rows"][0]["documents"] == 6
    assert str(tmp_path) not in json.dumps(result["tasks"])

    shown = CliRunner().invoke(app, ["show", str(tmp_path / "run")], catch_exceptions=False)
    assert "Tasks of lm-eval" in shown.stdout


def test_a_task_that_cannot_be_loaded_stops_a_run_before_it_begins(
    run_config: dict[str, Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "own" / "texts.yaml"
    content = json.loads(path.read_text()) | {"dataset_path": "cais/mmlu"}
    del content["dataset_kwargs"]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="--tasks texts: its data set is not in"):
        run_table(run_config | {"evaluate": asked}, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_failure_at_the_end_leaves_a_result(
    run_config: dict[str, Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    """A longer answer than the model's context, which lm-eval refuses when it is asked."""
    path = tmp_path / "own" / "written.yaml"
    content = json.loads(path.read_text())
    content["generation_kwargs"]["max_gen_toks"] = 10**4
    path.write_text(json.dumps(content))
    table = run_config | {"rounds": 1, "evaluate": asked | {"tasks": ["written"]}}
    result = run_table(table, tmp_path / "run")
    assert "lm-eval stopped" in result["tasks"]["why"]
    assert result["adapter_sha256"]
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "run")], catch_exceptions=False)
    assert "not measured, because" in " ".join(shown.stdout.split())


def test_settings_without_tasks_or_without_a_model_are_refused(
    run_config: dict[str, Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("include_path", "limit"):
        alone = {"evaluate": {name: asked[name]}}
        with pytest.raises(ConfigError, match=f"{name}: without effect, because tasks"):
            parse(run_config | alone, "test")
    local = {"method": {"name": "local"}, "evaluate": {"tasks": ["texts"]}}
    with pytest.raises(ConfigError, match=r"evaluate\.tasks: without effect.*writes no model"):
        parse(run_config | local, "test")
    both = parse(run_config | {"compare": ["local"], "evaluate": asked}, "test")
    assert both.baseline("local").evaluate.tasks == ()

    (tmp_path / "run.toml").write_text(
        "[evaluate]\ntasks = ['texts']\ninclude_path = 'own'\n[data]\nsource = 'stdlib'\n"
    )
    assert load(tmp_path / "run.toml").evaluate.include_path == str(tmp_path / "own")
