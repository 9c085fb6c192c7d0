"""The end of a run in process."""

import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest

from fluvial.errors import ClientError
from fluvial.federation.sites import Site, Task
from fluvial.methods import METHODS
from fluvial.wire.payload import Payload
from tests.support.runs import run_table


def test_no_site_works_on_after_its_run(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = threading.Event()

    def train(site: Site, _message: Payload) -> Payload:
        if site.name == "north":
            began.wait(60)
            raise RuntimeError("power cut")

        began.set()
        while True:
            time.sleep(0.01)

    tasks = cast(dict[str, Task], METHODS["fedavg"].tasks)
    monkeypatch.setitem(tasks, "train", train)
    table = run_config | {"fleet": {"workers": 2, "on_failure": "stop"}}
    before = set(threading.enumerate())

    with pytest.raises(ClientError, match="'north' failed"):
        run_table(table, tmp_path / "run")

    assert set(threading.enumerate()) <= before
    assert not (tmp_path / "run/sites/south/errors.log").exists()


def test_a_model_that_nothing_has_changed_is_a_result(
    run_config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The largest weights of an initial adapter are in its factors A, so all factors B stay 0."""
    method = {"name": "flasc", "download": "weights", "density_down": 0.01}
    result = run_table(run_config | {"method": method}, tmp_path / "run")
    assert result["heldout"]["final"]["loss"] == result["heldout"]["base"]["loss"]
    assert "the tuned model is exactly the base" in caplog.text
