"""Records that a run trained on are known again where its model is measured on them."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import DataConfig
from fluvial.runs.trained_on import trained_on, trained_words
from fluvial.storage.inputs import digests


def written(path: Path, numbers: range, *names: str) -> str:
    rows = [dict(zip(names, (f"question {n}", f"answer {n}"), strict=True)) for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a run of two sites, one of which shares a held-out file and one holds out half."""
    oslo = written(tmp_path / "oslo.jsonl", range(8), "q", "a")
    held = written(tmp_path / "held.jsonl", range(6, 10), "prompt", "completion")
    bern = written(tmp_path / "bern.jsonl", range(20, 30), "prompt", "completion")
    by_site = {
        "oslo": {
            "source": oslo,
            "columns": {"prompt": "q", "completion": "a"},
            "heldout_source": held,
            "heldout": {"columns": {}},
        },
        "bern": {"source": bern},
    }
    data = DataConfig.model_validate({"by_site": by_site, "heldout_share": 0.5})
    table = {"data": data.model_dump(mode="json"), "seed": 3, "fluvial": "1"}
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    described: dict[str, Any] = {**table, "run": {"inputs": digests(table)}}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def test_records_of_a_run_by_their_content(run: Path) -> None:
    """The name of a file and of its columns makes no difference, the held-out part is not among
    them."""
    oslo = DataConfig(
        source=str(run.parent / "oslo.jsonl"), columns={"prompt": "q", "completion": "a"}
    )
    assert trained_on(run / "adapter", oslo) == 8
    assert trained_on(run / "adapter", DataConfig(source=str(run.parent / "held.jsonl"))) == 2
    assert trained_on(run / "adapter", DataConfig(source=str(run.parent / "bern.jsonl"))) == 5
    new = written(run.parent / "new.jsonl", range(40, 44), "prompt", "completion")
    assert trained_on(run / "adapter", DataConfig(source=new)) == 0


def test_what_is_not_known_is_not_said(run: Path) -> None:
    """A folder without its run, and a run whose files have changed since."""
    bern = DataConfig(source=str(run.parent / "bern.jsonl"))
    assert trained_on(run.parent / "none", bern) is None
    assert trained_on(run, bern) is None
    written(run.parent / "oslo.jsonl", range(9), "q", "a")
    assert trained_on(run / "adapter", bern) is None


def test_the_words_say_how_many() -> None:
    assert trained_words(None, 9) == trained_words(0, 9) == ""
    assert trained_words(9, 9).startswith("The run trained on all 9 records")
    assert "on 2 of these 9 records" in trained_words(2, 9)
