"""A site of several processes over SuperLink and SuperNodes: the same run, and its failure."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from safetensors.torch import load_file

from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.wire.tensors import relative_error
from tests.support.flower_lab import deployment

pytestmark = pytest.mark.flower

ADAPTER = Path("adapter") / "adapter_model.safetensors"


def rank_of(pid: int) -> str:
    """The rank of a process by its environment, "" without one."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((e.partition(b"=")[2].decode() for e in entries if e.startswith(b"RANK=")), "")


def test_a_site_of_two_processes(run_config: dict[str, Any], tmp_path: Path) -> None:
    table = run_config | {
        "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": "attention"},
        "train": run_config["train"] | {"optim": "sgd", "learning_rate": 0.05},
        "evaluate": {"sample_tokens": 2, "sample_prompt": "the river"},
    }
    *_, result = execute(parse(table, "test"), tmp_path / "one")
    assert result.kind == "result"

    sites = {"north": 2, "south": 1, "west": 1}
    with deployment(tmp_path / "lab", dict.fromkeys(sites, ""), start=False) as lab:
        lab.start_server()
        for name, processes in sites.items():
            lab.make_site(name)
            lab.start_site(name, processes=processes)
        lab.wait_online(3, timeout=400)
        torchrun = lab._started["north"]
        (second,) = [pid for pid in children(torchrun.pid) if rank_of(pid) == "1"]
        before = idle_s(second)
        lab.submit(table, tmp_path / "two")
        lab.wait(tmp_path / "two", timeout=900)
        assert cpu_s(second) > before + 1.0, "it loads the model and trains"
        one, two = (load_file(tmp_path / run / ADAPTER) for run in ("one", "two"))
        assert relative_error(one, two) < 1e-8  # squared; fp32 sums in another order

        os.kill(second, signal.SIGKILL)
        until = time.monotonic() + 120
        while torchrun.poll() is None and time.monotonic() < until:
            time.sleep(0.5)
        assert torchrun.returncode not in (None, 0), "the site ends with its process"


def children(parent: int) -> list[int]:
    """The child processes of a process."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(pid) for pid in listed.split()]


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_s(pid: int) -> float:
    """The same once the process waits for a training."""
    used = cpu_s(pid)
    while True:
        time.sleep(10)
        before, used = used, cpu_s(pid)
        if used - before < 0.05:
            return used
