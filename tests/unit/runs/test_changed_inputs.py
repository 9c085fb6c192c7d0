"""A run goes on with the records and the base model that it began with, or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import CheckpointError
from fluvial.runs.config import parse
from fluvial.runs.run import execute
from tests.support.runs import small_table


def _edited(file: Path) -> None:
    lines = file.read_text("utf-8").splitlines()
    record = json.loads(lines[0])
    record["text"] += " changed"
    file.write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")


def _reordered(file: Path) -> None:
    lines = file.read_text("utf-8").splitlines()
    file.write_text("\n".join([*lines[1:], lines[0]]) + "\n")


def _other_tokens(model: Path) -> None:
    file = model / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace('"<pad>"', '"<gap>"'))


def _other_epsilon(model: Path) -> None:
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))


def _other_weights(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    changed = {name: tensor * 1.05 for name, tensor in weights.items()}
    save_file(changed, model / "model.safetensors", {"format": "pt"})


@pytest.fixture
def begun(tmp_path: Path, tiny_model: Path, three_sites: Path) -> dict[str, Any]:
    """Begin a run and stop it after round 1."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    records = Path(shutil.copy(three_sites, tmp_path / "records.jsonl"))
    table = {**small_table(model, records), "rounds": 2, "train": {"max_steps": 1}}
    for event in execute(parse(table, "test"), tmp_path / "run"):
        if event.kind == "round":
            break

    return table


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("records.jsonl", _edited, "data.source names now"),
        ("records.jsonl", _reordered, "data.source"),
        ("model", _other_epsilon, "model.name_or_path"),
        ("model", _other_tokens, "model.name_or_path"),
        ("model", _other_weights, "model.name_or_path"),
    ],
)
def test_a_run_does_not_go_on_with_what_has_changed(
    name: str,
    change: Callable[[Path], None],
    message: str,
    begun: dict[str, Any],
    tmp_path: Path,
) -> None:
    path = tmp_path / name
    kept = tmp_path / "kept"
    (shutil.copytree if path.is_dir() else shutil.copy)(path, kept)
    change(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        list(execute(parse(begun, "test"), tmp_path / "run", resume=True))
    assert "put the files back" in str(caught.value)

    (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    kept.rename(path)
    *_, last = execute(parse(begun, "test"), tmp_path / "run", resume=True)
    assert last.kind == "result"
