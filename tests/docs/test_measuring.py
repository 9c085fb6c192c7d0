"""The examples of docs/measuring.md run as they are written there."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.runs.config import parse
from tests.support.harness import QUESTIONS, lines

PAGE = Path(__file__).parents[2] / "docs" / "measuring.md"


def _command(start: str) -> list[str]:
    """Return the words of the page's command that begins with `start`."""
    (line,) = re.findall(rf"^    fluvial ({re.escape(start)}.*)$", PAGE.read_text(), re.MULTILINE)
    return [word.strip("'") for word in line.split()]


def test_a_task_of_ones_own_runs_without_network(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "streams.yaml").write_text(task)
    lines(tmp_path / "streams.jsonl", QUESTIONS[:8])
    monkeypatch.chdir(tmp_path)
    words = _command("evaluate runs/my --tasks streams")
    words[1] = str(tiny_model)
    result = CliRunner().invoke(app, [*words, "--format", "json"], catch_exceptions=False)
    rows = json.loads(result.stdout)["tasks"]["rows"]
    assert [(row["task"], row["metric"], row["documents"]) for row in rows] == [
        ("streams", "acc", 8),
        ("streams", "acc_norm", 8),
    ]


def test_generated_answers_by_site(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = ("north", "south")
    records = [
        {"clinic": sites[number % 2], "prompt": f"Name {number}:", "completion": " river"}
        for number in range(4)
    ]
    lines(tmp_path / "answered.jsonl", records)
    monkeypatch.chdir(tmp_path)
    words = _command("evaluate runs/my --data answered.jsonl")
    words[1] = str(tiny_model)
    result = CliRunner().invoke(app, [*words, "--format", "json"], catch_exceptions=False)
    answers = json.loads(result.stdout)["data"]["answers"]
    assert {site: part["questions"] for site, part in answers["by_site"].items()} == {
        "north": 2,
        "south": 2,
    }
    assert answers["max_new_tokens"] == 32


def test_the_settings_of_tasks_in_a_run(run_config: dict[str, Any]) -> None:
    (text,) = re.findall(r"```toml\n(\[evaluate\]\n.*?)```", PAGE.read_text(), re.DOTALL)
    settings = parse(run_config | tomllib.loads(text), "test").evaluate
    assert (settings.tasks, settings.limit) == (("streams",), 100)
