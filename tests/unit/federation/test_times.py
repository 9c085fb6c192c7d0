"""Seconds of the parts of a round: their sums, and what a site may report."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import WireError
from fluvial.federation.meter import MEASURING
from fluvial.federation.sites import Site
from fluvial.federation.times import REPORTED, RoundTimes, read_list, to_list
from fluvial.wire.payload import Payload
from tests.support.bare_sites import NAMES, site_fleet
from tests.support.runs import run_table


def test_parts_add_up_to_the_time_of_an_answer() -> None:
    """Two answers of one site, and its measures; by hand."""
    times = RoundTimes()
    times.answered("a", "train", 10.0, {"work": 5.0, "training": 3.0, "coding": 0.5, "download": 2})
    times.answered("a", "train", 1.0, {"work": 0.25, "training": 0.25})
    times.answered("a", MEASURING, 4.0, {"work": 4.0})
    times.answered("b", "train", 7.0, {})
    times.server.add("decoding", 0.125)

    closed = times.close_round()
    assert closed["sites"]["a"] == {
        "download": 2.0,
        "training": 3.25,
        "coding": 0.5,
        "other": 1.5,
        "transfer": 3.75,
        "measuring": 4.0,
    }
    assert math.fsum(closed["sites"]["a"].values()) == 15.0
    assert closed["sites"]["b"] == {"unreported": 7.0}
    assert closed["server"] == {"decoding": 0.125}
    assert times.close_round() == {"server": {}, "sites": {}}


def test_a_list_of_seconds_is_read_as_it_was_written() -> None:
    seconds = {"work": 5.0, "training": 3.0, "coding": 0.5, "download": 2.0}
    assert read_list(to_list({**seconds, "waiting": 9.0})) == seconds
    assert read_list(None) == {}


@pytest.mark.parametrize(
    "value",
    [
        "1",
        [1.0],
        [1.0] * (len(REPORTED) + 1),
        [1.0, 1.0, 1.0, -1.0],
        [1.0, 1.0, 1.0, math.nan],
        [1.0, 1.0, 1.0, math.inf],
        [1.0, 1.0, 1.0, True],
        [1.0, 1.0, 1.0, "1"],
    ],
)
def test_other_seconds_of_a_site_are_refused(value: Any) -> None:
    with pytest.raises(WireError, match="header: times="):
        read_list(value)


def test_a_site_of_this_process_reports_its_work() -> None:
    """The site sleeps 50 ms as training and 20 ms beside it."""

    def work(site: Site, _message: Payload) -> Payload:
        with site.stopwatch.time("training"):
            time.sleep(0.05)
        time.sleep(0.02)
        return Payload()

    fleet = site_fleet(work, workers=1)
    messages = dict.fromkeys(NAMES, Payload())
    list(fleet.ask("work", messages, round=1, read=lambda _, reply: reply))
    for parts in fleet.times.close_round()["sites"].values():
        assert parts["training"] >= 0.05
        assert parts["other"] >= 0.02
        assert parts["download"] == parts["coding"] == 0.0


def test_every_round_of_a_run_has_its_times(run_config: dict[str, Any], tmp_path: Path) -> None:
    """With a coded downlink, which the server codes from round 2 on."""
    codec = {"name": "hadamard", "rate": 8}
    run_table(run_config | {"rounds": 2, "codec": codec, "downlink": codec}, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        sites = record["times"]["sites"]
        assert sites.keys() == record["bytes"].keys()
        for parts in sites.values():
            assert parts["training"] > 0
            assert parts["coding"] > 0
            assert math.fsum(parts.values()) <= record["seconds"]
        assert record["times"]["server"]["decoding"] > 0

    assert records[1]["times"]["server"]["coding"] > 0
