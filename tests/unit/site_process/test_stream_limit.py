"""The time for which a site waits for its server's answer to a turn."""

import math
from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import RefusalError
from fluvial.federation.config import FleetConfig
from fluvial.runs.config import parse
from fluvial.site_process.process import JOIN, SiteProcess
from fluvial.wire.payload import Payload
from tests.support.models import with_fitting_model
from tests.support.site_process import header, site_file


class Silent:
    """A way to a server that never answers."""

    within_s = math.inf

    def __init__(self) -> None:
        """Send nothing yet."""
        self.sent = 0

    def send(self, data: bytes) -> None:
        """Count a turn."""
        assert data
        self.sent += 1

    def receive(self) -> bytes:
        """Give up."""
        raise RefusalError(f"no answer within {self.within_s:g} s")


@pytest.mark.parametrize(
    ("fleet", "within_s"),
    [
        ({}, 1800.0),
        ({"deadline_s": 5.0}, 15.0),
        ({"deadline_s": 5.0, "on_failure": "skip", "quorum": 0.5}, 15.0),
        ({"deadline_s": 5.0, "on_failure": "retry", "retries": 3}, 60.0),
    ],
)
def test_the_limit_follows_from_the_deadline(fleet: dict[str, Any], within_s: float) -> None:
    assert FleetConfig.model_validate(fleet).answer_within_s(1) == within_s


@pytest.mark.parametrize(
    ("method", "turns"),
    [
        ({"mode": "client-batch"}, 5),
        ({"mode": "hierarchical"}, 5),
        ({"mode": "hierarchical", "sync_steps": 3}, 15),
    ],
)
def test_a_site_that_converses_has_the_limit_of_its_run(
    method: dict[str, Any], turns: int, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The turns of another site from one meeting to the next, and two with which it begins."""
    train = run_config["train"] | {"gradient_accumulation_steps": 2}
    table = with_fitting_model(
        run_config
        | {
            "method": {"name": "flglm", "ends": "own", **method},
            "train": train,
            "fleet": {"deadline_s": 2.0},
        }
    )
    here = SiteProcess(site_file(tmp_path))
    sent = parse(table, "test").model_dump(mode="json", exclude_unset=True)
    here.answer(header(task=JOIN), Payload(values={"config": sent}).to_bytes())
    stream = Silent()
    with pytest.raises(RefusalError, match=f"within {2 * (turns + 2)} s"):
        here.answer(header(seq=2), Payload(values={"round": 1}).to_bytes(), stream)
    assert stream.sent == 2  # as many as may be in flight
