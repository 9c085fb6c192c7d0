"""What a server that chooses a run's settings can get out of a site that bounds epsilon: no more
than its file says."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import CheckpointError
from fluvial.federation.sites import adapter_message
from fluvial.models.states import initial_state
from fluvial.site_process.journal import Header
from fluvial.site_process.process import JOIN, SiteProcess
from fluvial.site_process.site_file import Allowed, SiteFile
from fluvial.wire.payload import Payload, payload_frame
from tests.unit.site_process.test_private_site import at

ORACLES: dict[str, dict[str, Any]] = {
    "another form": {"form": "prompt_completion"},
    "no such column": {"columns": {"text": "none"}},
    "an encoding": {"encoding": "utf-16"},
}
"""Settings of [data] that a server may choose, and whose failure would tell of the records."""


def process(folder: Path, most: float | None = 8.0) -> SiteProcess:
    allow = Allowed(max_epsilon=most, run_paths=("*",))
    return SiteProcess(SiteFile(name="north", folder=folder, device="cpu", allow=allow))


def header(task: str, run: str = "one", round: int = 1) -> Header:
    return Header(run=run, task=task, round=round, session="s", seq=1, ack=0, base=-1)


def join(site: SiteProcess, table: dict[str, Any], run: str = "one") -> Payload:
    message = Payload(values={"config": table}).to_bytes()
    return Payload.from_bytes(site.answer(header(JOIN, run, 0), message).data)


def private(run_config: dict[str, Any], epsilon: float) -> dict[str, Any]:
    return run_config | {"method": at(epsilon), "codec": {"name": "identity"}}


@pytest.mark.parametrize("what", list(ORACLES))
def test_settings_that_fail_on_some_records_tell_nothing_of_them(
    what: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Each refusal would be an exact answer to a question about the records, outside epsilon, as
    often as one likes."""
    table = private(run_config, 0.5)
    for share, records in (("fits", None), ("fails", ORACLES[what])):
        asked = table | {"data": table["data"] | (records or {})}
        site = process(tmp_path / share)
        joined = join(site, asked)
        assert joined.values["site"] == "north"
        pool = next(iter(site._pools.values()))
        start = initial_state(pool.layout, 1)
        sent = adapter_message(start, round=1).to_bytes()
        answer = Payload.from_bytes(site.answer(header("train"), sent).data)
        assert (sorted(answer.tensors), answer.values) == (["f"], {})
        assert len(set(payload_frame(answer))) > 100

    assert (tmp_path / "fits" / "errors.log").exists() is False
    assert list((tmp_path / "fails").rglob("errors.log"))


def test_the_same_failure_is_told_where_nothing_is_promised(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    asked = run_config | {"data": run_config["data"] | ORACLES["another form"]}
    with pytest.raises(Exception, match="form"):
        join(process(tmp_path, most=None), asked)


@pytest.mark.parametrize("change", ["epsilon", "seed", "cut", "bit"])
def test_a_damaged_configuration_of_a_run_is_refused(
    change: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """It says what the site trains and what the run counts; with another epsilon, other runs would
    get more."""
    join(process(tmp_path), private(run_config, 4.0))
    [path] = tmp_path.glob("runs/*/config.json")
    data = path.read_bytes()

    if change == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif change == "bit":
        path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    else:
        stored = json.loads(data)
        if change == "seed":
            stored["config"]["seed"] += 1
        else:
            stored["config"]["method"]["privacy"]["epsilon"] = 0.01

        path.write_text(json.dumps(stored))

    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        join(process(tmp_path), private(run_config, 2.0), run="two")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        process(tmp_path).answer(header("train"), Payload().to_bytes())
