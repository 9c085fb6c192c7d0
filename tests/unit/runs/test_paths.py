"""Relative paths: those in a file are relative to its folder, those of `--set` to the working
directory."""

import json
import shutil
from pathlib import Path

import pytest

from fluvial.errors import CheckpointError, ConfigError
from fluvial.runs.beginning import begun
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import load, parse
from fluvial.runs.run import execute

TOML = """
rounds = 1
[model]
name_or_path = "M"
[data]
source = "three.jsonl"
form = "text"
max_length = 32
partition = { by = "column", column = "client" }
[train]
max_steps = 1
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, three_sites: Path) -> Path:
    made = tmp_path / "project"
    shutil.copytree(tiny_model, made / "M")
    shutil.copy(three_sites, made / "three.jsonl")
    (made / "my.toml").write_text(TOML)
    (tmp_path / "elsewhere").mkdir()

    return made


def test_a_path_means_the_same_from_any_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    near = load(Path("my.toml"))
    monkeypatch.chdir(folder.parent / "elsewhere")
    far = load(Path("../project/my.toml"))
    assert near == far
    assert (near.model.name_or_path, near.data.source) == (
        str(folder / "M"),
        str(folder / "three.jsonl"),
    )


def test_a_run_is_resumed_from_another_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for event in execute(load(Path("my.toml")), folder / "run"):
        if event.kind == "round":
            break

    monkeypatch.chdir(folder.parent / "elsewhere")
    *_, last = execute(load(Path("../project/my.toml")), folder / "run", resume=True)
    assert last.kind == "result"


def test_a_path_from_the_working_directory_alone_is_refused_with_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "configs").mkdir()
    shutil.move(folder / "my.toml", folder / "configs" / "my.toml")
    monkeypatch.chdir(folder)

    with pytest.raises(ConfigError) as caught:
        load(Path("configs/my.toml"))
    first, second = str(caught.value).splitlines()
    assert 'model.name_or_path = "M": lies in the working directory' in first
    assert first.endswith('write "../M"')
    assert second.endswith('write "../three.jsonl"')


def test_an_override_is_relative_to_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = folder.parent / "elsewhere"
    shutil.copy(folder / "three.jsonl", elsewhere / "own.jsonl")
    monkeypatch.chdir(elsewhere)
    config = load(Path("../project/my.toml"), ['data.source = "own.jsonl"'])
    assert config.data.source == str(elsewhere / "own.jsonl")


@pytest.mark.parametrize("name", ["org/name", "embedded", "gpt2", "x" * 5000, "a\\nb"])
def test_the_id_of_a_hub_is_no_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "my.toml").write_text(f'[model]\nname_or_path = "{name}"\n')
    assert load(tmp_path / "my.toml").model.name_or_path == name.replace("\\n", "\n")


def test_one_file_has_one_path_from_every_folder(folder: Path) -> None:
    """Two contenders of a comparison then have the same data, wherever their files lie."""
    inner = folder / "inner"
    inner.mkdir()
    other = TOML.replace('"M"', '"../M"').replace('"three', '"../three')
    (inner / "my.toml").write_text(other)
    assert load(inner / "my.toml") == load(folder / "my.toml")

    (folder / "link").symlink_to(folder.parent / "elsewhere")
    (folder / "my.toml").write_text(TOML.replace('"M"', '"link/../project/M"'))
    assert Path(load(folder / "my.toml").model.name_or_path).samefile(folder / "M")


def test_a_run_whose_files_lie_elsewhere_now_says_where_they_were(tmp_path: Path) -> None:
    """A change of another setting is named as such."""
    before = parse({"data": {"source": "/old/visits.jsonl"}}, "test")
    stored = {"fluvial": "0", **before.resolved()}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    moved = parse({"data": {"source": "/new/visits.jsonl"}}, "test")
    words = "data.source was '/old/visits.jsonl'.*put them back there, or a link"
    with RunFolder(tmp_path) as folder:
        with pytest.raises(CheckpointError, match=words):
            begun(folder, moved, resume=True)
        other = parse({"data": {"source": "/new/visits.jsonl", "max_length": 64}}, "test")
        with pytest.raises(CheckpointError, match="another configuration .differs in data"):
            begun(folder, other, resume=True)
        assert begun(folder, before, resume=True)[0] == before
