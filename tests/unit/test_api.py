"""Mistakes of a caller from Python: each error names the argument, the key or the path."""

from pathlib import Path
from typing import Any

import pytest

import fluvial


def test_a_file_is_no_folder_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text("{}")

    with pytest.raises(fluvial.FluvialError, match="result.json is a file; give the folder"):
        fluvial.load_result(file)


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({3: 4}, "the table: 3: the key is of type int; write it as a str"),
        ({"train": {3: 4}}, "the table: train.3: the key is of type int"),
        ({"data": {"columns": {3: "text"}}}, "the table: data.columns.3: the key is of type int"),
    ],
)
def test_a_key_that_is_no_text_is_named(wrong: dict[Any, Any], place: str) -> None:
    with pytest.raises(fluvial.ConfigError, match=place):
        fluvial.check(wrong)


def test_a_key_that_is_no_text_hides_no_other_fault() -> None:
    wrong: dict[Any, Any] = {"train": {3: 4, "rate": 1}, "rounds": 0}

    with pytest.raises(fluvial.ConfigError) as raised:
        fluvial.check(wrong)

    places = {line.split(": ")[1] for line in str(raised.value).splitlines()}
    assert places == {"train.3", "train.rate", "rounds = 0"}


def test_a_table_may_hold_paths(run_config: dict[str, Any]) -> None:
    model = run_config["model"] | {"name_or_path": Path(run_config["model"]["name_or_path"])}
    data = run_config["data"] | {"source": Path(run_config["data"]["source"])}

    assert fluvial.load_config(run_config | {"model": model, "data": data}) == fluvial.load_config(
        run_config
    )
