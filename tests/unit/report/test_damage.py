"""What tables, pages and exports say of a finished run whose files are not those that it wrote."""

from pathlib import Path
from typing import Any

import pytest

from fluvial import api
from fluvial.errors import CheckpointError, ConfigError
from fluvial.report.page import page_of
from fluvial.report.show import run_tables
from fluvial.runs.checkpoint import RunFolder
from fluvial.storage.run_files import check_run_written, check_weights_written, read_run
from fluvial.training.folders import read_adapter_folder
from tests.unit.report.test_show import config, records, result, text_of


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A finished run with a finished baseline, and the digests of both."""
    path = tmp_path / "run"
    config(path, "fedavg")
    for place, start in ((path, 3.3), (path / "compare" / "local", 3.4)):
        with RunFolder(place) as folder:
            for record in records(9, 110, start=start):
                folder.append_metrics(record)
            folder.finish(result("fedavg", "identity", 3.2, 9, 110))
    return path


def damaged(path: Path, how: str) -> None:
    """Change a file, or put a folder in its place."""
    data = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "garbage": b"\xff\0x"}[how])


def words_of(run: dict[str, Any]) -> str:
    """Return the words of the tables, on one line."""
    return " ".join(text_of(run_tables(run)).split())


def test_nothing_is_said_of_a_whole_run(whole: Path, tmp_path: Path) -> None:
    assert read_run(whole)["damaged"] == []
    (whole / "digests.json").unlink()
    (whole / "metrics.jsonl").write_text("")
    assert read_run(whole)["damaged"] == []  # a run that has not finished knows no digests


@pytest.mark.parametrize("how", ["empty", "cut", "garbage", "gone"])
@pytest.mark.parametrize("place", ["", "compare/local/"])
def test_metrics_that_are_damaged_are_named_with_what_follows(
    place: str, how: str, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"{place}metrics.jsonl"
    damaged(whole / name, how)
    run = read_run(whole)
    (line,) = run["damaged"]
    assert line.startswith(name)
    assert ("is missing" if how == "gone" else "is damaged") in line
    assert "rounds may be missing or wrong; restore it from a copy" in line
    assert "rounds may be missing or wrong" in words_of(run)
    assert b"rounds may be missing or wrong" in page_of(run)
    api.load_result(whole)
    assert "rounds may be missing or wrong" in caplog.text


def test_other_files_that_are_changed_are_named(whole: Path) -> None:
    for name in ("result.json", "config.json"):
        text = (whole / name).read_text()
        (whole / name).write_text(text + "\n")
        (line,) = read_run(whole)["damaged"]
        assert f"{name} is damaged" in line
        (whole / name).write_text(text)

    (whole / "digests.json").write_text("[")
    (line,) = read_run(whole)["damaged"]
    assert "digests.json is damaged" in line
    assert "nothing shows whether" in line


def test_a_removed_result_is_named(whole: Path) -> None:
    (whole / "result.json").unlink()
    run = read_run(whole)
    (line,) = run["damaged"]
    assert "result.json is missing" in line
    assert "write it anew with --resume" in line
    assert "result.json is missing" in words_of(run)


@pytest.mark.parametrize("how", ["cut", "gone", "a folder"])
def test_a_weights_file_that_is_no_file_is_refused(how: str, whole: Path) -> None:
    adapter = whole / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    with RunFolder(whole) as folder:
        folder.finish(result("fedavg", "identity", 3.2, 9, 110))

    damaged(adapter / "adapter_model.safetensors", how)
    words = "is missing" if how == "gone" else "is damaged"
    told = pytest.raises(CheckpointError, match=f"adapter_model.safetensors {words}")
    with told:
        check_weights_written(adapter)
    with told:
        RunFolder(whole).verify_finished()


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl"])
@pytest.mark.parametrize("how", ["cut", "gone", "a folder"])
def test_weights_of_a_damaged_run_are_not_read(how: str, name: str, whole: Path) -> None:
    """For `evaluate` and `chat`; a copy of the weights in another folder is not of this run."""
    adapter = whole / "adapter"
    adapter.mkdir()
    check_run_written(whole)
    damaged(whole / name, how)
    words = "is missing" if how == "gone" else "is damaged"
    remedy = "restore it from a copy.*copy .*/adapter to another folder"
    with pytest.raises(CheckpointError, match=f"{whole}/{name} {words}.*{remedy}"):
        read_adapter_folder(adapter)
    adapter.rename(whole.parent / "adapter")
    with pytest.raises(ConfigError, match="is no PEFT adapter"):
        read_adapter_folder(whole.parent / "adapter")
