"""Run folders and sites' state: a damaged, cut, missing or foreign file is noticed; all is private;
drafts go."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import CheckpointError
from fluvial.federation.store import StateStore
from fluvial.runs.checkpoint import _OWN, RunFolder
from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.site_process.journal import Journal
from fluvial.storage.files import sweep
from fluvial.wire.payload import Payload
from tests.support.site_process import header, kept, play


@pytest.fixture
def table(run_config: dict[str, Any]) -> dict[str, Any]:
    """Sites keep residuals, and what they received."""
    return run_config | {
        "rounds": 3,
        "codec": {"name": "top_k", "rate": 8, "error_feedback": True},
        "downlink": {"name": "int8"},
    }


@pytest.fixture
def stopped(table: dict[str, Any], tmp_path: Path) -> Path:
    """The folder of a run that was stopped after round 2."""
    folder = tmp_path / "run"
    for event in execute(parse(table, "test"), folder):
        if event.kind == "round" and event.values["round"] == 2:
            break

    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.name)


def of_north(folder: Path) -> Path:
    return newest(folder, "sites/north/residual-*")


def swap_with_south(folder: Path) -> Path:
    """The name of north's file, the bytes of south's."""
    path = of_north(folder)
    shutil.copy(newest(folder, "sites/south/residual-*"), path)
    return path


def take_souths(folder: Path) -> Path:
    """South's file, name and bytes, in the place of north's."""
    path = of_north(folder)
    path.unlink()
    shutil.copy(newest(folder, "sites/south/residual-*"), path.parent)
    return path


def take_older(folder: Path) -> Path:
    path = of_north(folder)
    path.unlink()
    return path


def damage(pattern: str, how: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def act(folder: Path) -> Path:
        path = newest(folder, pattern)
        how(path)
        return path

    return act


def second_line(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1].replace('"sites": 3', '"sites": 2')]))


DAMAGES: dict[str, Callable[[Path], Path]] = {
    "a bit of the checkpoint": damage("checkpoints/*.safetensors", flip),
    "a checkpoint that is cut": damage("checkpoints/*.safetensors", cut),
    "an older checkpoint": damage(
        "checkpoints/*.safetensors",
        lambda path: shutil.copy(min(path.parent.glob("*.safetensors")), path),
    ),
    "a checkpoint without a digest": damage("checkpoints/*.sha256", Path.unlink),
    "a bit of a residual": damage("sites/north/residual-*", flip),
    "a residual that is cut": damage("sites/north/residual-*", cut),
    "a residual that is gone": take_older,
    "another site's bytes": swap_with_south,
    "another site's file": take_souths,
    "a site that is gone": damage("sites/north", shutil.rmtree),
    "a bit of what was received": damage("sites/south/received-*", flip),
    "metrics that are cut": damage(
        "metrics.jsonl", lambda path: path.write_text(path.read_text().splitlines()[0])
    ),
    "metrics that are gone": damage("metrics.jsonl", Path.unlink),
    "a digit of the metrics": damage("metrics.jsonl", second_line),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_run_is_not_resumed(what: str, stopped: Path, table: dict[str, Any]) -> None:
    path = DAMAGES[what](stopped)
    name = path.name.partition("-")[0].removesuffix(".sha256")
    with pytest.raises(
        CheckpointError, match=f"{name}.*(damaged|missing|in its place|no round).*"
    ) as told:
        list(execute(parse(table, "test"), stopped, resume=True))

    assert any(
        remedy in str(told.value)
        for remedy in ("restore it from a copy", "Remove it to go on", "--out")
    )


def test_an_undamaged_run_is_resumed_to_the_same_result(
    stopped: Path, table: dict[str, Any], tmp_path: Path
) -> None:
    *_, resumed = execute(parse(table, "test"), stopped, resume=True)
    *_, straight = execute(parse(table, "test"), tmp_path / "straight")
    assert resumed.values["adapter_sha256"] == straight.values["adapter_sha256"]
    *_, again = execute(parse(table, "test"), stopped, resume=True)
    assert again.values == resumed.values

    for name in ("result.json", "metrics.jsonl", "adapter/adapter_model.safetensors"):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(stopped, copy)
        flip(copy / name)

        with pytest.raises(CheckpointError, match=f"{Path(name).name} is damaged"):
            list(execute(parse(table, "test"), copy, resume=True))


# -- a site's journal ----------------------------------------------------------------------------


def settled(folder: Path) -> Path:
    """A site that answered two rounds, of which the first counts."""
    play(folder, (header(round=1, seq=1), 1), (header(round=2, seq=2, ack=1), 2))
    return folder


JOURNAL: dict[str, Callable[[Path], Any]] = {
    "a bit of what is pending": lambda folder: flip(folder / "site.pending" / "one"),
    "what is pending is gone": lambda folder: (folder / "site.pending" / "one").unlink(),
    "a digit of the journal": lambda folder: (folder / "site.pending" / "journal.json").write_text(
        (folder / "site.pending" / "journal.json").read_text().replace('"round": 2', '"round": 3')
    ),
}


@pytest.mark.parametrize("what", JOURNAL)
def test_a_site_notices_a_damaged_pending_file(what: str, tmp_path: Path) -> None:
    JOURNAL[what](settled(tmp_path))
    with pytest.raises(CheckpointError, match=r"(one|journal\.json).*(missing|damaged).*"):
        Journal(tmp_path, "site").settle(header(round=3, seq=3, ack=2))


def test_a_site_notices_a_file_that_is_gone_or_damaged(tmp_path: Path) -> None:
    folder = settled(tmp_path / "a")
    newest(folder, "site/two-*").unlink()
    with pytest.raises(CheckpointError, match=r"two-000001-.* is missing; restore"):
        Journal(folder, "site").settle(header(round=3, seq=3, ack=0))
    folder = settled(tmp_path / "b")
    flip(newest(folder, "site/two-*"))
    journal = Journal(folder, "site")
    journal.settle(header(round=3, seq=3, ack=0))

    with pytest.raises(CheckpointError, match="two-000001-.* is damaged"):
        journal.store.read("site", "two")


def test_a_site_notices_that_its_folder_is_of_another_time(tmp_path: Path) -> None:
    folder = settled(tmp_path / "now")
    shutil.copytree(folder, tmp_path / "backup")
    journal = Journal(folder, "site")

    for round in (3, 4):
        journal.settle(header(round=round, seq=round, ack=round - 1))
        journal.post(header(round=round, seq=round), kept(round))

    with pytest.raises(CheckpointError, match="older than what the server accepted"):
        Journal(tmp_path / "backup", "site").settle(header(round=5, seq=5, ack=4))


# -- private, and swept --------------------------------------------------------------------------


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o000)
    yield
    os.umask(before)


def test_everything_of_a_run_is_its_owners_only(
    table: dict[str, Any], tmp_path: Path, open_umask: None
) -> None:
    *_, _ = execute(parse(table | {"rounds": 2}, "test"), tmp_path / "runs" / "one")
    found = [tmp_path / "runs" / "one", *(tmp_path / "runs" / "one").rglob("*")]
    assert len(found) > 10

    for path in found:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_everything_that_a_site_keeps_is_its_owners_only(tmp_path: Path, open_umask: None) -> None:
    folder = tmp_path / "site"
    settled(folder)
    StateStore(folder).draft("site", "one", Payload(values={"x": 1}))

    for path in [folder, *folder.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_what_a_killed_process_left_goes_when_the_folder_is_opened(
    stopped: Path, tmp_path: Path
) -> None:
    left = [
        stopped / "checkpoints" / ".round-000003.safetensors.partial",
        stopped / "sites" / "north" / ".cache.0123456789abcdef.draft",
        stopped / ".adapter.partial" / "adapter_model.safetensors",
    ]
    mine = [
        stopped / ".notes",
        stopped / "other" / ".mine.partial",
        stopped / ".draft.partial" / "mine",
        stopped / ".x.draft",
    ]
    for path in (*left, *mine):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")

    with RunFolder(stopped), pytest.raises(CheckpointError, match="in use"), RunFolder(stopped):
        pass
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in mine)
    assert sweep(stopped, _OWN) == []


def test_a_run_looks_at_its_own_files_only(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder may be that of a project, or a home with a million files."""
    looked = []

    def rglob(path: Path, _: str) -> list[Path]:
        looked.append(path.relative_to(stopped).as_posix())
        return []

    monkeypatch.setattr(Path, "rglob", rglob)
    with RunFolder(stopped) as folder:
        folder.finish({})
    assert {"checkpoints", "sites", "adapter"} <= set(looked) <= set(_OWN)
