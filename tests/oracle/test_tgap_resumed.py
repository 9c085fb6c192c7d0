"""A run that was killed during TGAP, or whose updates lie on disk, against one in one piece."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.codecs.base import Snapshot
from fluvial.errors import CheckpointError, GateError
from fluvial.exchange.ensemble import Ensemble, Progress
from fluvial.federation.meter import Kind
from fluvial.models.states import initial_state
from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.storage.run_files import ENSEMBLE
from fluvial.wire.payload import OWN_FILES, Payload
from fluvial.wire.tensors import Named
from tests.support.runs import run_table
from tests.support.updates import attention_layout

CHILD = """
import json, os, signal, sys
from pathlib import Path
from fluvial.exchange.ensemble import Ensemble
from fluvial.runs.config import parse
from fluvial.runs.run import execute

close = Ensemble.close
def die_in_round_3(ensemble, progress, sites):
    if progress.round == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    close(ensemble, progress, sites)

Ensemble.close = die_in_round_3
list(execute(parse(json.loads(sys.argv[1]), "test"), Path(sys.argv[2])))
"""


def of(table: dict[str, Any], reading: str) -> dict[str, Any]:
    tgap = {"source": "sites", "rounds": 4, "reading": reading}
    codec = {"name": "klt", "rate": 8, "error_feedback": True}
    method = {"name": "cgfedllm", "tgap": tgap, "gate": "report"}
    return table | {"rounds": 1, "method": method, "codec": codec}


def codec_of(folder: Path) -> Named:
    """Return the tensors of the checkpoint before the first round, the fitted codec among them."""
    data = (folder / "checkpoints" / "round-000000.safetensors").read_bytes()
    return dict(sorted(Payload.from_bytes(data, OWN_FILES).tensors.items()))


def same(left: Named, right: Named) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_kill_9_during_tgap_gives_the_same_codec_frames_and_bytes(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The process is killed when the third of four rounds is nearly whole; two are on the disk."""
    table = of(run_config, "federated")
    straight = run_table(table, tmp_path / "straight")
    command = [sys.executable, "-c", CHILD, json.dumps(table), str(tmp_path / "killed")]
    died = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (tmp_path / "killed" / ENSEMBLE).is_dir()

    *_, last = execute(parse(table, "test"), tmp_path / "killed", resume=True)
    assert same(codec_of(tmp_path / "killed"), codec_of(tmp_path / "straight"))
    assert last.values["setup"] == straight["setup"]
    assert last.values["adapter_sha256"] == straight["adapter_sha256"]  # by the same frames
    assert last.values["bytes"] == straight["bytes"]


def test_an_interrupted_local_reading_goes_on(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each site goes on from its own adapter, which only the ensemble has."""
    table = of(run_config, "local")
    straight = run_table(table, tmp_path / "straight")
    with monkeypatch.context() as patch:
        close = Ensemble.close

        def interrupted(ensemble: Ensemble, progress: Progress, sites: list[str]) -> None:
            close(ensemble, progress, sites)
            if progress.round == 2:
                raise KeyboardInterrupt

        patch.setattr(Ensemble, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_table(table, tmp_path / "stopped")

    *_, last = execute(parse(table, "test"), tmp_path / "stopped", resume=True)
    assert same(codec_of(tmp_path / "stopped"), codec_of(tmp_path / "straight"))
    assert last.values["bytes"] == straight["bytes"]
    assert not (tmp_path / "stopped" / ENSEMBLE).exists()


LAYOUT = attention_layout(16, 16, layers=1, rank=2, modules=("q_proj",))
START = initial_state(LAYOUT, 0)


def filled(folder: Path | None, rounds: int, seed: int = 0) -> tuple[Ensemble, list[Snapshot]]:
    """Return an ensemble with whole rounds of two sites, and what was put into it."""
    ensemble = Ensemble(folder, {"seed": seed}, START, LAYOUT)
    put = []
    shared = START
    for number in range(1, rounds + 1):
        for site in ("b", "a/c"):
            update = {name: torch.randn(tensor.shape) for name, tensor in START.items()}
            put.append(Snapshot(site, number, shared, update))
            ensemble.keep(put[-1], alone=False)

        shared = {name: tensor + number for name, tensor in START.items()}
        traffic: dict[Kind, int] = {("up", "snapshot"): 10 * number}
        ensemble.close(Progress(number, shared, traffic), ["b", "a/c"])

    return ensemble, sorted(put, key=lambda taken: (taken.round, taken.site))


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_ensemble_gives_back_what_was_put_in(on_disk: bool, tmp_path: Path) -> None:
    folder = tmp_path / "tgap" if on_disk else None
    ensemble, put = filled(folder, 11)
    if on_disk:
        ensemble = Ensemble(folder, {"seed": 0}, START, LAYOUT)

    found = ensemble.snapshots()
    assert [(one.round, one.site) for one in found] == [(one.round, one.site) for one in put]
    assert all(same(one.update, other.update) for one, other in zip(found, put, strict=True))
    assert all(same(one.received, other.received) for one, other in zip(found, put, strict=True))
    assert ensemble.progress().round == 11
    assert ensemble.progress().traffic == {("up", "snapshot"): 110}


def anonymous_kib() -> int:
    """Return the process's memory that is no page of a file."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts memory by kind")
def test_updates_that_are_read_are_pages_of_their_files(tmp_path: Path) -> None:
    """32 updates of 2 MiB are in hand, and take no memory of the process's own."""
    layout = attention_layout(4096, 4096, layers=1, rank=64, modules=("q_proj",))
    start = {name: torch.zeros(shape) for name, shape in layout.shapes}
    ensemble = Ensemble(tmp_path, {}, start, layout)
    sites = [f"site-{number}" for number in range(32)]
    for number, site in enumerate(sites):
        update = {name: tensor + number for name, tensor in start.items()}
        ensemble.keep(Snapshot(site, 1, start, update), alone=False)

    ensemble.close(Progress(1, start, {}), sites)
    del update
    before = anonymous_kib()
    updates = {taken.site: taken.update for taken in ensemble.snapshots()}
    assert anonymous_kib() - before < 16 * 1024
    assert len(updates) == 32
    assert all(float(updates[site][layout.names[1]][5, 5]) == n for n, site in enumerate(sites))


def test_a_round_that_is_not_whole_does_not_count(tmp_path: Path) -> None:
    ensemble, put = filled(tmp_path, 2)
    ensemble.keep(Snapshot("b", 3, START, put[0].update), alone=False)
    again = Ensemble(tmp_path, {"seed": 0}, START, LAYOUT)
    assert again.progress().round == 2
    assert len(again.snapshots()) == 4


def test_updates_of_another_kind_begin_a_new_ensemble(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    assert Ensemble(tmp_path, {"seed": 1}, START, LAYOUT).progress().round == 0
    assert Ensemble(tmp_path, {"seed": 0}, START, LAYOUT).progress().round == 0


def test_a_damaged_update_is_refused(tmp_path: Path) -> None:
    ensemble, _ = filled(tmp_path, 1)
    path = next(tmp_path.glob("updates-b/update1-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="damaged"):
        _ = ensemble.snapshots()[1].update


def test_another_codec_takes_the_ensemble_of_the_one_that_the_gate_refused(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = of(run_config, "federated")
    straight = run_table(table, tmp_path / "straight")
    strict = table["method"] | {"gate": "refuse"}
    refused = {"name": "random_k", "rate": 64}
    with pytest.raises(GateError):
        run_table(table | {"method": strict, "codec": refused}, tmp_path / "run")

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("no update is collected again")

    monkeypatch.setattr(Ensemble, "keep", fail)
    *_, last = execute(parse(table, "test"), tmp_path / "run", resume=True)
    assert same(codec_of(tmp_path / "run"), codec_of(tmp_path / "straight"))
    assert last.values["bytes"] == straight["bytes"]
