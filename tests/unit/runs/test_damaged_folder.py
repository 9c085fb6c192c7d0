"""Run folders in which a file is gone, of another kind or of another run: reported by name, never
another result."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import CheckpointError
from fluvial.federation.releases import Mechanism, claim
from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.site_process.journal import Journal
from tests.support.site_process import header, kept
from tests.unit.site_process.test_private_site import at

LEDGER = "sites/north/private/releases.json"


def stopped(table: dict[str, Any], folder: Path) -> Path:
    """The folder of a run that was stopped after round 1."""
    for event in execute(parse(table, "test"), folder):
        if event.kind == "round":
            break

    return folder


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def make_folder_of(name: str) -> Callable[[Path], Any]:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return act


def make_file_of(name: str) -> Callable[[Path], Any]:
    def act(folder: Path) -> None:
        shutil.rmtree(folder / name)
        (folder / name).write_text("")

    return act


def finish_empty(folder: Path) -> None:
    (folder / "result.json").write_text("{}")
    (folder / "digests.json").write_text("{}")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (
        lambda folder: (folder / "config.json").unlink(),
        "config.json is missing",
    ),
    "a list": (write("config.json", b"[]"), "config.json is damaged"),
    "null": (write("config.json", b"null"), "config.json is damaged"),
    "bytes": (write("config.json", b"\xff{"), "config.json is damaged"),
    "deep": (write("config.json", b"[" * 100_000), "config.json is damaged"),
    "a folder": (make_folder_of("config.json"), "config.json is damaged"),
    "a result of null": (write("result.json", b"null"), "result.json is damaged"),
    "an empty result": (finish_empty, "digests.json is damaged"),
    "deep metrics": (write("metrics.jsonl", b"[" * 100_000), "metrics.jsonl is damaged"),
    "metrics as a folder": (make_folder_of("metrics.jsonl"), "metrics.jsonl cannot be read"),
    "checkpoints as a file": (make_file_of("checkpoints"), "cannot write .*checkpoints"),
}


def test_a_file_of_another_kind_is_told_by_its_name(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    made = stopped(run_config, tmp_path / "run")
    for number, (act, text) in enumerate(DAMAGES.values()):
        folder = tmp_path / str(number)
        shutil.copytree(made, folder)
        act(folder)

        with pytest.raises(CheckpointError, match=text):
            list(execute(parse(run_config, "test"), folder, resume=True))


def test_another_run_does_not_go_on_from_a_folder_without_its_configuration(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The checkpoint of another seed was taken for this run's, without a word."""
    folder = stopped(run_config, tmp_path / "run")
    (folder / "config.json").unlink()

    with pytest.raises(CheckpointError, match="already holds a run"):
        list(execute(parse(run_config | {"seed": 9}, "test"), folder))


def test_what_lies_in_the_place_of_the_adapter_is_replaced(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """A link goes, and what it points to stays; a name of a checkpoint that is no number is no
    checkpoint."""
    made = stopped(run_config, tmp_path / "run")
    *_, straight = execute(parse(run_config, "test"), tmp_path / "straight")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")

    for kind in ("file", "link"):
        folder = tmp_path / kind
        shutil.copytree(made, folder)
        (folder / "checkpoints" / "round-²³.safetensors").write_bytes(b"")

        if kind == "file":
            (folder / "adapter").write_text("")
        else:
            (folder / "adapter").symlink_to(elsewhere)

        *_, found = execute(parse(run_config, "test"), folder, resume=True)
        assert found.values["adapter_sha256"] == straight.values["adapter_sha256"]
        assert (elsewhere / "mine").read_text() == "mine"


@pytest.mark.parametrize("placement", ["update", "aggregate"])
def test_a_lost_or_foreign_secret_is_noticed(
    placement: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """A new one would count from 0 again, and disturb by other noise than the run began with."""
    table = run_config | {"method": at(4.0, placement), "codec": {"name": "identity"}}
    ledger = LEDGER if placement == "update" else "private/releases.json"
    made = stopped(table, tmp_path / "run")
    foreign = stopped(table, tmp_path / "another")
    damages: dict[str, Callable[[Path], Any]] = {
        "gone": Path.unlink,
        "folder gone": lambda path: shutil.rmtree(path.parent),
        "foreign": lambda path: shutil.copy(foreign / ledger, path),
        "bytes": lambda path: path.write_bytes(b"\xff"),
    }

    for name, act in damages.items():
        folder = tmp_path / name
        shutil.copytree(made, folder)
        act(folder / ledger)

        with pytest.raises(CheckpointError, match=r"releases\.json is (missing|damaged)"):
            list(execute(parse(table, "test"), folder, resume=True))


@pytest.mark.parametrize("how", ["gone", "older"])
def test_a_site_of_its_own_notices_a_lost_or_older_ledger(how: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path, "site")
    private = journal.store.private("site")
    mechanism = Mechanism("update", 1.0, 1.0, 3)
    claim(private, mechanism, b"one")
    before = (private / "releases.json").read_bytes()
    claim(private, mechanism, b"two")
    journal.settle(header(seq=1))
    journal.post(header(seq=1), kept(1))

    if how == "gone":
        (private / "releases.json").unlink()
    else:
        (private / "releases.json").write_bytes(before)

    with pytest.raises(CheckpointError, match=r"releases\.json is missing, another one or older"):
        Journal(tmp_path, "site").settle(header(seq=2, ack=1))
