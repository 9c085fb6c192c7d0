"""Processes of a deployment that are killed in the middle of turns over the live stream."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from tests.flower.conftest import Row
from tests.support.flower_lab import SERVER, Deployment, deployment
from tests.support.models import four_layers
from tests.support.runs import run_table

pytestmark = [pytest.mark.flower, pytest.mark.faults]

SITES = ("north", "south", "west")
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def table(three_sites: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two rounds of split learning, whose steps are conversations."""
    columns = {"by": "column", "column": "client"}
    model = four_layers(tmp_path_factory.mktemp("model") / "model")
    return {
        "seed": 1,
        "rounds": 2,
        "model": {"name_or_path": str(model)},
        "lora": {"r": 4},
        "data": {
            "source": str(three_sites),
            "form": "text",
            "max_length": 32,
            "partition": columns,
        },
        "train": {"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 4},
        "evaluate": {"sample_tokens": 2},
        "method": {"name": "flglm", "mode": "hierarchical"},
        "fleet": {"sites": list(SITES), "deadline_s": DEADLINE_S},
    }


@pytest.fixture(scope="module")
def undisturbed(table: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter of the run in one process."""
    result = run_table(table, tmp_path_factory.mktemp("own") / "run")
    return str(result["adapter_sha256"])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("stream") / "lab"
    with deployment(folder, dict.fromkeys(SITES, "")) as deployed:
        yield deployed


def turns_of(lab: Deployment, site: str, run: str, round: int) -> int:
    """Return how many payloads of training have left a site in a round of the run."""
    log = lab.site(site) / "outgoing.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return sum(
        entry.get("task") == "train" and entry["round"] == round and entry["run"].startswith(run)
        for entry in entries
    )


def in_the_middle(lab: Deployment, site: str, run: str, round: int) -> None:
    """Return when two turns of the site have left it in a round of the run."""
    until = time.monotonic() + 180
    while turns_of(lab, site, run, round) < 2:
        assert time.monotonic() < until, lab.tail(site) + lab.tail(SERVER)
        time.sleep(0.01)


def test_a_site_that_is_killed_in_the_middle_of_its_turns(
    lab: Deployment, table: dict[str, Any], undisturbed: str, tmp_path: Path, row: Row
) -> None:
    """The run stops soon, and ends the same when it is resumed."""
    out = tmp_path / "killed-site"
    number = lab.submit(table, out)
    in_the_middle(lab, "north", "killed-site ", 2)
    lab.kill("north", "task")
    killed = time.monotonic()
    assert lab.finished(number, timeout=60)["status"] == "finished:failed"
    seconds = time.monotonic() - killed
    assert seconds < 45
    assert "ended with signal 9" in lab.logs(number)

    lab.submit(table, out, resume=True)
    assert lab.wait(out)["adapter_sha256"] == undisturbed
    row(
        "kill -9 of a site's client process in the middle of its turns (split learning)",
        "stops inside the deadline; resumed: same adapter",
        "site 'north' failed: the process that answered ended with signal 9; resumed: same adapter",
        seconds,
    )


def test_a_run_whose_process_is_killed_in_the_middle_of_turns(
    lab: Deployment, table: dict[str, Any], undisturbed: str, tmp_path: Path, row: Row
) -> None:
    """The sites give up long before the deadline, join the resumed run, and it ends the same."""
    out = tmp_path / "killed-server"
    number = lab.submit(table, out)
    in_the_middle(lab, "north", "killed-server ", 2)
    lab.kill(SERVER, "serverapp")
    killed = time.monotonic()
    log = lab.site("north") / "errors.log"
    until = killed + DEADLINE_S
    while not (log.exists() and "live stream is closed" in log.read_text()):
        assert time.monotonic() < until, lab.tail("north")
        time.sleep(0.1)

    seconds = time.monotonic() - killed
    assert lab.finished(number, timeout=120)["status"] == "finished:failed"
    lab.submit(table, out, resume=True)
    assert lab.wait(out)["adapter_sha256"] == undisturbed
    row(
        "kill -9 of the server app in the middle of turns (split learning)",
        "the sites end their task inside the deadline; resumed: same adapter",
        "the site found the port of the live stream closed; run finished:failed; resumed: same "
        "adapter",
        seconds,
    )
