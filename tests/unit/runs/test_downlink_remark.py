"""The remark on a run whose updates are coded and whose downloads are not."""

from typing import Any

import pytest

from fluvial.runs.config import parse
from fluvial.runs.plan import plan

Table = dict[str, Any]

CODED: Table = {"codec": {"name": "trellis", "rate": 64, "error_feedback": True}, "rounds": 3}
FAST: Table = {"fleet": {"line": {"up_mbit_s": 1.0, "down_mbit_s": 1000.0, "rtt_ms": 1.0}}}
EVEN: Table = {"fleet": {"line": {"up_mbit_s": 1.0, "down_mbit_s": 1.0, "rtt_ms": 1.0}}}


@pytest.mark.parametrize(
    ("change", "remarked"),
    [
        (CODED, True),
        (CODED | EVEN, True),
        (CODED | FAST, False),  # its downloads take less time than its uploads
        (CODED | {"downlink": {"name": "trellis", "rate": 32}}, False),
        ({"codec": {"name": "trellis", "rate": 64}, "rounds": 1}, False),  # round 1 sends none
        ({"codec": {"name": "int8"}, "rounds": 3}, False),
        (CODED | {"method": {"name": "ecolora"}, "codec": None}, False),  # it codes both ways
    ],
)
def test_an_uncoded_downlink_beside_a_coded_uplink_is_remarked(
    run_config: Table, change: Table, remarked: bool
) -> None:
    table = {key: value for key, value in run_config.items() if key not in ("codec", "downlink")}
    table = {key: value for key, value in (table | change).items() if value is not None}
    planned = plan(parse(table, "test"))
    found = [note for note in planned["notes"] if note.startswith("downlink: ")]
    assert len(found) == remarked
    if remarked:
        down, frame = planned["bytes"]["down"], planned["bytes"]["frame"]
        assert f"receives {down:,} B in a round, {down / frame:.0f} times what it sends" in found[0]
