"""The form of `fluvial.json`, and of a run's configuration beside it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import ConfigError
from fluvial.storage import exported

WRONG: list[tuple[Any, str]] = [
    ([], "must be a JSON object, found list"),
    (None, "must be a JSON object, found NoneType"),
    ({"data": 3}, "'data' must be an object"),
    ({"data": None}, "'data' must be an object"),
    ({"model": []}, "'model' must be an object"),
    ({"suffix": 3}, "'suffix' must be text"),
    ({"suffix": None}, "'suffix' must be text"),
    ({"site_column": ["a"]}, "'site_column' must be text"),
    ({"base_digest": 1}, "'base_digest' must be text"),
    ({"records_are_mostly": {}}, "'records_are_mostly' must be text"),
    ({"readings": {}}, "'readings' must be a list of objects"),
    ({"readings": [{}, "north"]}, "'readings.1' must be an object"),
    ({"readings": [{"suffix": 1}]}, "'readings.0.suffix' must be text"),
    ({"data": {"columns": "a"}}, "'data.columns' must be an object"),
    ({"data": {"by_site": {"north": 1}}}, "'data.by_site.north' must be an object"),
]


@pytest.mark.parametrize(("content", "told"), WRONG)
def test_a_value_of_another_form_is_refused_with_its_key(
    content: Any, told: str, tmp_path: Path
) -> None:
    file = tmp_path / exported.FILE
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{file}: {told}')}; copy it again$"):
        exported.read(tmp_path)


def test_what_a_run_wrote_is_read(tmp_path: Path) -> None:
    resolved = {"data": {"columns": {"prompt": "q"}, "chat_template": None, "by_site": {}}}
    exported.write(tmp_path, "0", resolved, readings=[{"suffix": ".csv"}, {"suffix": ""}])
    assert exported.read(tmp_path)["data"] == {"columns": {"prompt": "q"}}


def test_the_config_json_of_a_model_has_any_form(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"data": 3, "suffix": 1}))
    assert exported.read(tmp_path / "adapter") == {}
