"""A site that fails in any of the four tensors of a step: the same weights, or its failure."""

from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import DivergenceError
from fluvial.methods.flglm import tasks
from fluvial.methods.flglm.turns import Backward, Content, Forward
from tests.support.models import four_layers
from tests.support.runs import run_table

MOMENTS = {
    "before h_A": (Forward, False),
    "after h_B": (Forward, True),
    "before g_B": (Backward, False),
    "after g_A": (Backward, True),
}
"""Kind of the turn, and whether its answer has come."""


@pytest.fixture
def table(run_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run whose steps have two micro-batches, both of which are in flight."""
    micro = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return run_config | {
        "model": {"name_or_path": str(four_layers(tmp_path / "model"))},
        "train": run_config["train"] | micro,
    }


@pytest.fixture(params=MOMENTS)
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let one site fail once, in the second step, at this moment; the list names it then."""
    kind, answered = MOMENTS[request.param]
    send = tasks._Visit.send
    receive = tasks._Visit.receive
    failed: list[str] = []

    def end_if_due(content: Content, has_answer: bool) -> None:
        due = isinstance(content, kind) and content.step == 1 and has_answer == answered
        if due and not failed:
            failed.append(request.param)
            raise DivergenceError("the test ends this site")

    def watched_send(self: Any, content: Content) -> Any:
        end_if_due(content, False)
        yield from send(self, content)

    def watched_receive(self: Any) -> Any:
        content = self.open[0]
        received = yield from receive(self)
        end_if_due(content, True)
        return received

    monkeypatch.setattr(tasks._Visit, "send", watched_send)
    monkeypatch.setattr(tasks._Visit, "receive", watched_receive)
    return failed


@pytest.mark.parametrize(("mode", "ends"), [("sequential", "shared"), ("hierarchical", "own")])
def test_a_site_that_begins_again_changes_nothing(
    table: dict[str, Any], tmp_path: Path, failing: list[str], mode: str, ends: str
) -> None:
    """The replica begins again with it; nothing of the attempt that failed is left."""
    method = {"name": "flglm", "mode": mode, "ends": ends, "leakage": {"sites": "none"}}
    table = table | {"rounds": 1, "method": method}
    retried = run_table(
        table | {"fleet": {"on_failure": "retry", "workers": 1}}, tmp_path / "retried"
    )
    assert failing
    undisturbed = run_table(table, tmp_path / "undisturbed")
    for key in ("adapter_sha256", "heldout", "heldout_by_site"):
        assert retried[key] == undisturbed[key]


def test_a_client_batch_goes_on_without_the_site(
    table: dict[str, Any], tmp_path: Path, failing: list[str]
) -> None:
    """The others make the round's steps; the site takes part again in the next one."""
    result = run_table(
        table | {"method": {"name": "flglm"}, "fleet": {"on_failure": "skip"}}, tmp_path / "run"
    )
    assert failing
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [row.count('"sites": 2') for row in rows] == [1, 0]
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]


@pytest.mark.parametrize("ends", ["shared", "own"])
def test_a_client_batch_takes_the_site_back(
    table: dict[str, Any], tmp_path: Path, failing: list[str], ends: str
) -> None:
    """A step waits for the site that begins again, which goes on from the server's weights and
    moments: with shared ends, the bits of an undisturbed run. Its own ends begin the round again.
    """
    train = table["train"] | {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    method = {"name": "flglm", "ends": ends, "leakage": {"sites": "none"}}
    table = table | {"rounds": 1, "method": method, "train": train}
    retried = run_table(table | {"fleet": {"on_failure": "retry"}}, tmp_path / "retried")
    assert failing
    undisturbed = run_table(table, tmp_path / "undisturbed")
    rows = (tmp_path / "retried" / "metrics.jsonl").read_text().splitlines()
    assert [('"sites": 3' in row, "missed_steps" in row) for row in rows] == [(True, False)]
    same = retried["heldout_by_site"] == undisturbed["heldout_by_site"]
    assert same == (ends == "shared")
    assert retried["adapter_sha256"] == undisturbed["adapter_sha256"]
