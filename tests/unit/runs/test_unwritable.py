"""Places that a person names, where nothing can be written: one line with the remedy, and
what was there stays."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.errors import CheckpointError, ConfigError
from fluvial.models.pretrained import ModelConfig
from fluvial.report.page import write_html
from fluvial.runs.config import parse
from fluvial.runs.export import export_run
from fluvial.runs.run import execute
from fluvial.storage.files import write_whole
from fluvial.storage.run_files import check_free
from fluvial.training.folders import kind_of, read_adapter_folder
from fluvial.training.opened import check_base
from tests.support.runs import run_table, small_table

RUNNER = CliRunner()
PAGE = b"<!DOCTYPE html>\n<p>a page</p>"


@pytest.fixture(scope="module")
def finished(tiny_model: Path, three_sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of one step."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    table = small_table(tiny_model, three_sites) | {"rounds": 1, "train": {"max_steps": 1}}
    run_table(table, folder)
    return folder


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A path in which no file can be made, not even by root: a file where a folder should be."""
    (tmp_path / "file").write_text("kept")
    return tmp_path / "file" / "new"


WRITERS: dict[str, Callable[[Path, Path, Path, Path], Any]] = {
    "recipes": lambda path, *_: call("recipes", "clinic", "--write", path),
    "show": lambda path, run, *_: call("show", run, "--html", path),
    "init": lambda path, _, model, data: call(
        "init", path, "--model", model, "--data", data, "--site-column", "client", "--yes"
    ),
    "export": lambda path, run, *_: export_run(run, path, form="merged"),
}


def call(*arguments: object) -> None:
    RUNNER.invoke(app, list(map(str, arguments)), catch_exceptions=False)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_cannot_be_written_is_named(
    writer: str, closed: Path, finished: Path, tiny_model: Path, three_sites: Path
) -> None:
    with pytest.raises(ConfigError, match=f"cannot write {closed}: .*(choose|name) another"):
        WRITERS[writer](closed, finished, tiny_model, three_sites)
    assert closed.parent.read_text() == "kept"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also no empty file, which would count as one that exists."""
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_bytes(b"old")

    def full(path: Path, _: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for path in (old, new):
        with pytest.raises(ConfigError, match=r"No space left on device; name another file"):
            write_whole(path, b"data", "name another file")
    assert [path.name for path in tmp_path.iterdir()] == ["old.toml"]
    assert old.read_bytes() == b"old"


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", b"data", "name another file")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"data"


def test_a_page_replaces_pages_only(tmp_path: Path) -> None:
    """`show RUN --html RUN/result.json` would end the run."""
    result, page = tmp_path / "result.json", tmp_path / "page.html"
    result.write_text("{}")
    with pytest.raises(ConfigError, match=r"result.json: exists and is no page"):
        write_html(PAGE, result)
    assert result.read_text() == "{}"

    for _ in range(2):
        write_html(PAGE, page)
    assert page.read_bytes() == PAGE


def test_a_folder_of_a_model_is_no_run(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no run: its config.json is a model's"):
        export_run(tiny_model, tmp_path / "out")


def test_a_run_without_its_configuration_is_no_baseline(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing; restore it"):
        export_run(tmp_path / "run", tmp_path / "out")


def test_other_weights_than_those_of_the_run_are_noticed(finished: Path, tmp_path: Path) -> None:
    """A value that is another one still is a tensor: nothing but the digest tells."""
    shutil.copytree(finished, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    card = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(card | {"base_model_name_or_path": ""}))
    read_adapter_folder(adapter)  # a base may be renamed

    weights = adapter / "adapter_model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(CheckpointError, match=r"safetensors is damaged: its bytes are not those"):
        read_adapter_folder(adapter)


def test_a_base_whose_files_changed_is_refused(finished: Path, tmp_path: Path) -> None:
    """Its losses and its merged model would be those of another model, without a word."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = json.loads((folder / "config.json").read_text())
    adapter = read_adapter_folder(folder / "adapter")
    other = tmp_path / "other"
    shutil.copytree(adapter.base, other)
    moved = ModelConfig(name_or_path=str(other))
    check_base(adapter, moved)
    exported = export_run(
        folder, tmp_path / "out", form="merged", overrides=[f"model.name_or_path={str(other)!r}"]
    )
    assert exported.check is not None
    assert config["model"]["name_or_path"] not in (tmp_path / "out" / "README.md").read_text()

    weights = other / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ConfigError, match=r"not those of the base that .* was trained on; restore"):
        check_base(replace(adapter, base=str(other)), moved)


def test_another_base_by_name_is_told(
    finished: Path, tiny_gqa_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be a copy in another type, so that it is the user's to decide."""
    check_base(
        read_adapter_folder(finished / "adapter"), ModelConfig(name_or_path=str(tiny_gqa_model))
    )
    assert "not those of the base" in caplog.text


def test_an_unfinished_run_has_no_weights_yet(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"fluvial": "test"}))
    with pytest.raises(ConfigError, match="has not finished; continue it"):
        kind_of(str(tmp_path))
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="leaves each site its own weights"):
        kind_of(str(tmp_path))


def test_printed_commands_can_be_copied(finished: Path, tmp_path: Path) -> None:
    to = tmp_path / "my model"
    words = ["export", str(finished), "--form", "merged", "--to", str(to)]
    assert f"vllm serve '{to}'" in RUNNER.invoke(app, words, catch_exceptions=False).output
    file = tmp_path / "my file.toml"
    written = RUNNER.invoke(app, ["recipes", "clinic", "--write", str(file)])
    assert f"fluvial check '{file}'" in written.output


@pytest.mark.parametrize("name", ["adapter/mine.txt", "report.html", "setup.json"])
def test_a_run_replaces_nothing_of_others(
    name: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Neither what has a run's names, nor drafts of other programs in a folder that is no run's."""
    mine, draft = tmp_path / name, tmp_path / "below" / ".film.partial"
    for path in (mine, draft):
        path.parent.mkdir(exist_ok=True)
        path.write_text("kept")
    with pytest.raises(CheckpointError, match=r"holds no run, but .*, which a run would replace"):
        next(execute(parse(run_config, "test"), tmp_path))
    assert mine.read_text() == draft.read_text() == "kept"


def test_a_path_that_is_no_text_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    """Weights are written at the end, by a library that takes UTF-8 only."""
    with pytest.raises(CheckpointError, match=r"a\\udc80b: its path is no UTF-8"):
        check_free(tmp_path / "a\udc80b", resume=False)
    check_free(tmp_path / "\u00e4", resume=False)
