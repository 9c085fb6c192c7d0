"""Every recipe is read and checked, with a small model and few records in place of a hub's."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import ConfigError
from fluvial.runs.config import load, merge, parse
from fluvial.runs.plan import plan
from fluvial.storage import recipes
from tests.conftest import _llama

OF_THE_PACKAGE = {"quickstart", "stdlib", "fedcybgd", "fedpipe", "flglm", "thin-line"}
"""Recipes that need no model and no data."""
OF_MUCH_TEXT = {"stdlib", "fedpipe", "thin-line"}
"""Recipes whose text takes seconds to be tokenised."""
FEWER_SITES: dict[str, dict[str, Any]] = {
    "cgfedllm-paper": {"partition": {"sites": 4, "min_records": 12}},
    "fedcybgd-paper": {"partition": {"sites": 8}, "heldout_share": 0.1},
    "fedcybgd": {"sites": ["archives", "email"]},
    "flglm": {"sites": ["archives", "email"]},
    "stdlib": {"sites": ["archives", "email"]},
    "thin-line": {"sites": ["archives", "email"]},
}
"""Changes of `[data]` that leave fewer sites than a recipe has."""


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small Llama with a context of 1024 tokens, whose canvas is large enough for the
    paper's autoencoder."""
    folder = tmp_path_factory.mktemp("long_model")
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4}
    return _llama(folder, max_position_embeddings=1024, **shape)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with records that have the columns of every recipe, as one file and a file a site."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "clinic").mkdir()
    lines: dict[str, list[str]] = {"north": [], "south": [], "west": []}

    for number in range(120):
        site = list(lines)[number % 3]
        record = {"hospital": site, "site": site, "category": f"c{number % 4}"}
        record |= dict.fromkeys(("context", "input"), "")
        asked = ("instruction", "document", "question")
        told = ("response", "summary", "answer", "output")
        record |= dict.fromkeys(asked, f"What is {number}?") | dict.fromkeys(told, f"It is {site}.")
        lines[site].append(json.dumps(record))

    for site, texts in lines.items():
        (folder / "clinic" / f"{site}.jsonl").write_text("\n".join(texts))
    (folder / "all.jsonl").write_text("\n".join(text for texts in lines.values() for text in texts))
    return folder


def small(name: str, table: dict[str, Any], model: Path, records: Path) -> dict[str, Any]:
    """Return the table of a recipe with the small model and the few records."""
    if name in OF_THE_PACKAGE:
        return merge(table, {"data": FEWER_SITES.get(name, {})})

    columns = set(table["data"].get("columns", {}).values())
    asked, told = {"document": ("document", "summary"), "question": ("question", "answer")}.get(
        next(iter(columns & {"document", "question"}), ""), ("instruction", "output")
    )
    kept = {asked, told, "hospital", "site", "category", *columns}
    if "context" in columns:
        kept -= {"output"}

    def written(source: Path, target: Path) -> None:
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        fitting = [{key: row[key] for key in row if key in kept} for row in rows]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(map(json.dumps, fitting)))

    data: Path = records / f"{name}.jsonl"
    if table["data"].get("partition") == {"by": "file"}:
        data = records / name
        for file in (records / "clinic").glob("*.jsonl"):
            written(file, data / file.name)
    else:
        written(records / "all.jsonl", data)

    change = {
        "model": {"name_or_path": str(model)},
        "data": {"source": str(data), **FEWER_SITES.get(name, {})},
    }
    table["model"].pop("revision", None)  # a hub id has one
    if "chat_template" in table["data"]:
        del table["data"]["chat_template"]  # conversations need it, and these are none

    return merge(table, change)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in OF_MUCH_TEXT else [])
        for name in recipes.names()
    ],
)
def test_a_recipe_passes_check(name: str, long_model: Path, records: Path) -> None:
    config = parse(small(name, tomllib.loads(recipes.text(name)), long_model, records), name)
    planned = plan(config)
    assert len(planned["sites"]) >= 2
    assert planned["model"]["trainable"] > 0


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_a_configuration(name: str) -> None:
    assert load(Path(f"recipe:{name}"), as_written=True).rounds >= 5


@pytest.mark.parametrize("name", recipes.names())
def test_the_first_line_of_a_recipe_says_what_it_is_for(name: str) -> None:
    text = recipes.text(name)
    assert text.startswith("# ")
    assert recipes.summary(name).endswith(".")
    assert len(recipes.summary(name)) <= 125


def test_a_recipe_is_read_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in it are relative to the working directory, those of a file to its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clinic").mkdir()
    assert load(Path("recipe:clinic")).data.source == str(tmp_path / "clinic")
    assert load(Path("recipe:quickstart"), ["rounds=3"]).rounds == 3
    assert recipes.stem(Path("recipe:quickstart")) == recipes.stem(Path("some/quickstart.toml"))

    with pytest.raises(ConfigError, match="the recipes are cgfedllm-paper"):
        load(Path("recipe:quick"))


def test_figures_of_the_papers_are_those_of_the_recipes() -> None:
    """Values that the pages of the methods and docs/fidelity.md name too."""
    dolly = tomllib.loads(recipes.text("cgfedllm-paper"))
    assert dolly["rounds"] == 20
    assert dolly["train"]["learning_rate"] == 1.5e-4
    assert dolly["method"]["fraction"] * dolly["data"]["partition"]["sites"] == 5
    batch = dolly["train"]["per_device_train_batch_size"]
    assert batch * dolly["train"]["gradient_accumulation_steps"] == 32

    cycles = tomllib.loads(recipes.text("fedcybgd-paper"))
    visits = cycles["rounds"] * cycles["data"]["partition"]["sites"]
    assert visits == 384
    assert cycles["rounds"] * cycles["train"]["num_train_epochs"] == 18
    rows = 51_502 / cycles["data"]["partition"]["sites"]
    batch = cycles["train"]["per_device_train_batch_size"]
    batch *= cycles["train"]["gradient_accumulation_steps"]
    assert int(rows // batch) * cycles["train"]["num_train_epochs"] == 150
