"""FedPipe over SuperLink and SuperNodes: the same run as in this process, also through kills."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from fluvial.storage.run_files import PAGE
from tests.oracle.test_fedpipe import UNEQUAL, Table
from tests.support.flower_lab import SERVER, Deployment, deployment
from tests.support.moments import Moments
from tests.support.runs import run_table

pytestmark = pytest.mark.flower

SITES = ("north", "south", "west")
SLOW_S = 400.0
"""Seconds until a site trains, on a machine that others use too."""
BUDGETS = [
    {"site": "north", "memory_mb": 0.27, "tokens_s": 4000.0},
    {"site": "south", "memory_mb": 0.30, "tokens_s": 2000.0},
    {"site": "west", "memory_mb": 9.0, "tokens_s": 1000.0},
]
"""Nothing of a profile depends on the machine, so that the plan is the same everywhere."""


@pytest.fixture
def table(run_config: Table) -> Table:
    """Three sites with plans of unequal ranks, coded in both directions."""
    return run_config | {
        "lora": UNEQUAL["lora"],
        "method": UNEQUAL["method"] | {"budgets": BUDGETS},
        "codec": {"name": "int8", "error_feedback": True},
        "downlink": {"name": "int8"},
        "evaluate": {"sample_tokens": 2, "sample_prompt": "the river"},
        "fleet": {"on_failure": "retry", "retries": 3, "deadline_s": 300.0},
    }


class Lab:
    """A deployment whose processes have moments."""

    def __init__(self, deployed: Deployment, moments: Moments) -> None:
        self.deployed = deployed
        self.moments = moments

    def answers(self, site: str, out: Path, task: str) -> int:
        """Return how many answers to `task` left a site in a run."""
        lines = (self.deployed.site(site) / "outgoing.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return sum(
            entry.get("task") == task  # an error that leaves has none
            and "error" not in entry
            and entry["run"].startswith(f"{out.name} ")
            for entry in entries
        )


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("fedpipe")
    moments = Moments(folder / "moments")
    with deployment(
        folder / "lab", dict.fromkeys(SITES, ""), environment=moments.environment
    ) as deployed:
        yield Lab(deployed, moments)


def plans(result: dict[str, Any]) -> dict[str, Any]:
    setup = cast(dict[str, dict[str, Any]], result["setup"])
    return setup["plans"]


def check_same(result: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise `AssertionError` unless plans, weights and held-out measures are equal."""
    assert plans(result) == plans(own)
    assert result["adapter_sha256"] == own["adapter_sha256"]
    assert result["heldout_by_site"] == own["heldout_by_site"]


def test_deployed_equals_in_process_and_kills_change_nothing(
    lab: Lab, table: Table, tmp_path: Path
) -> None:
    own = run_table(table, tmp_path / "own")
    assert len({json.dumps(plan["ranks"]) for plan in plans(own).values()}) == 3

    straight = tmp_path / "straight"
    lab.deployed.submit(table, straight)
    result = lab.deployed.wait(straight, SLOW_S)
    check_same(result, own)
    assert result["bytes"] == own["bytes"]
    assert "<h2>Plan of each site</h2>" in (straight / PAGE).read_text()

    # A site's process is killed in the probe, and the site is asked again.
    lab.moments.clear()
    lab.moments.arm("north 0 training")
    probed = tmp_path / "killed-in-probe"
    lab.deployed.submit(table, probed)
    lab.moments.wait("north 0 training", SLOW_S)
    lab.deployed.kill("north", "task", signal.SIGKILL)
    failure = lab.moments.failure()
    lab.moments.free()
    assert (failure["site"], failure["round"]) == ("north", 0)
    check_same(lab.deployed.wait(probed, SLOW_S), own)

    # The server is killed between the plan and the end of round 1; resumed, nobody measures again.
    lab.moments.clear()
    lab.moments.arm("north 1 training")
    resumed = tmp_path / "killed-after-plan"
    lab.deployed.submit(table, resumed)
    lab.moments.wait("north 1 training", SLOW_S)
    planned = (resumed / "checkpoints" / "round-000000.safetensors").read_bytes()
    lab.deployed.kill(SERVER, "serverapp", signal.SIGKILL)
    lab.moments.free()
    assert planned
    lab.deployed.submit(table, resumed, resume=True)
    check_same(lab.deployed.wait(resumed, SLOW_S), own)
    assert [lab.answers(site, resumed, "profile") for site in SITES] == [1, 1, 1]
    assert [lab.answers(site, resumed, "probe") for site in SITES] == [1, 1, 1]
