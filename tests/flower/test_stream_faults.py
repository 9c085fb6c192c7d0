"""Processes of a deployment that are killed while a tensor of a step is on its way over the live
stream."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from tests.flower.conftest import Row
from tests.support.flower_lab import SERVER, Deployment, deployment
from tests.support.models import four_layers
from tests.support.moments import Moments
from tests.support.runs import run_table

pytestmark = [pytest.mark.flower, pytest.mark.faults]

SITES = ("north", "south", "west")
DEADLINE_S = 60.0
TENSORS = {
    "hidden states up": "north 2 sending forward 1",
    "hidden states down": "server answering forward 1",
    "gradient up": "north 2 sending backward 1",
    "gradient down": "server answering backward 1",
}
"""Moments at which each tensor of a step is held back, by its name. A tensor up is that of north's
second step in round 2; one down is the first of any site's second step, in round 1."""


@pytest.fixture(scope="module")
def table(three_sites: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two rounds of split learning, whose steps are conversations."""
    columns = {"by": "column", "column": "client"}
    model = four_layers(tmp_path_factory.mktemp("model") / "model")
    return {
        "seed": 1,
        "rounds": 2,
        "model": {"name_or_path": str(model)},
        "lora": {"r": 4, "target_modules": "attention"},
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


def client_batch(table: dict[str, Any]) -> dict[str, Any]:
    """Return the same run in steps of all sites together, where a failed site is asked again."""
    fleet = table["fleet"] | {"on_failure": "retry"}
    return table | {"method": {"name": "flglm"}, "fleet": fleet}


@pytest.fixture(scope="module")
def together(table: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter of `client_batch` in one process."""
    result = run_table(client_batch(table), tmp_path_factory.mktemp("together") / "run")
    return str(result["adapter_sha256"])


@pytest.fixture(scope="module")
def _lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, Moments]]:
    folder = tmp_path_factory.mktemp("stream")
    moments = Moments(folder / "moments")
    with deployment(
        folder / "lab", dict.fromkeys(SITES, ""), environment=moments.environment
    ) as deployed:
        yield deployed, moments


@pytest.fixture
def lab(_lab: tuple[Deployment, Moments]) -> Deployment:
    deployed, moments = _lab
    moments.clear()
    return deployed


@pytest.fixture
def moments(_lab: tuple[Deployment, Moments]) -> Moments:
    return _lab[1]


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_site_that_is_killed(
    tensor: str,
    lab: Deployment,
    moments: Moments,
    table: dict[str, Any],
    undisturbed: str,
    tmp_path: Path,
    row: Row,
) -> None:
    """The run stops soon, and ends the same when it is resumed."""
    moments.arm(TENSORS[tensor])
    out = tmp_path / f"site-{tensor.replace(' ', '-')}"
    number = lab.submit(table, out)
    moments.wait(TENSORS[tensor], timeout=180)
    lab.kill("north", "task")
    killed = time.monotonic()
    moments.free()
    assert lab.finished(number, timeout=60)["status"] == "finished:failed"
    seconds = time.monotonic() - killed
    assert seconds < 45
    assert "ended with signal 9" in lab.logs(number)

    lab.submit(table, out, resume=True)
    assert lab.wait(out)["adapter_sha256"] == undisturbed
    row(
        f"kill -9 of a site's client process at its {tensor} (split learning)",
        "stops inside the deadline; resumed: same adapter",
        "site 'north' failed: the process that answered ended with signal 9; resumed: same adapter",
        seconds,
    )


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_site_that_is_killed_and_asked_again(
    tensor: str,
    lab: Deployment,
    moments: Moments,
    table: dict[str, Any],
    together: str,
    tmp_path: Path,
    row: Row,
) -> None:
    """The others wait, and it goes on in the same step, with the server's weights and moments."""
    moments.arm(TENSORS[tensor])
    out = tmp_path / f"rejoined-{tensor.replace(' ', '-')}"
    lab.submit(client_batch(table), out)
    moments.wait(TENSORS[tensor], timeout=180)
    lab.kill("north", "task")
    killed = time.time()
    moments.free()
    failure = moments.failure()
    assert failure["site"] == "north"
    assert "ended with signal 9" in failure["reason"]
    assert lab.wait(out)["adapter_sha256"] == together
    row(
        f"kill -9 of a site's client process at its {tensor} (client batch, on_failure='retry')",
        "noticed inside the deadline; rejoins in the same step: same adapter",
        "the process that answered ended with signal 9; rejoined: same adapter",
        failure["time"] - killed,
    )


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_run_whose_process_is_killed(
    tensor: str,
    lab: Deployment,
    moments: Moments,
    table: dict[str, Any],
    undisturbed: str,
    tmp_path: Path,
    row: Row,
) -> None:
    """The sites give up long before the deadline, join the resumed run, and it ends the same."""
    log = lab.site("north") / "errors.log"
    before = log.read_text() if log.exists() else ""
    moments.arm(TENSORS[tensor])
    out = tmp_path / f"server-{tensor.replace(' ', '-')}"
    number = lab.submit(table, out)
    moments.wait(TENSORS[tensor], timeout=180)
    lab.kill(SERVER, "serverapp")
    killed = time.monotonic()
    moments.free()
    until = killed + DEADLINE_S
    while not (log.exists() and "live stream is closed" in log.read_text()[len(before) :]):
        assert time.monotonic() < until, lab.tail("north")
        time.sleep(0.1)

    seconds = time.monotonic() - killed
    assert lab.finished(number, timeout=120)["status"] == "finished:failed"
    lab.submit(table, out, resume=True)
    assert lab.wait(out)["adapter_sha256"] == undisturbed
    row(
        f"kill -9 of the server app at the {tensor} (split learning)",
        "the sites end their task inside the deadline; resumed: same adapter",
        "the site found the port of the live stream closed; run finished:failed; resumed: same "
        "adapter",
        seconds,
    )
