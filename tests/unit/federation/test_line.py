"""The time of a round over a slow line, and what `fluvial check` says of it."""

from typing import Any

import pytest

from fluvial.errors import ConfigError
from fluvial.federation.line import FLOWER, Engine, Line, objects_s, round_s, transfer_s
from fluvial.runs.config import parse
from fluvial.runs.plan import plan

FREE = Line(up_mbit_s=1e9, down_mbit_s=1e9, rtt_ms=0)
FAST = Line(up_mbit_s=1000, down_mbit_s=1000, rtt_ms=0)
SLOW = Line(up_mbit_s=20, down_mbit_s=20, rtt_ms=100)
MB = 10**6


def test_a_line_without_bounds_costs_nothing() -> None:
    found = round_s(MB, MB, sites=3, line=FREE, engine=Engine(fixed_s=4.0, s_per_mb=0.5), train_s=2)
    assert found == pytest.approx(4 + 1 + 2, 1e-4)


def test_bytes_take_their_time_and_the_way_takes_its_own() -> None:
    whole = transfer_s(10 * MB, 20, SLOW.model_copy(update={"rtt_ms": 0}), FLOWER)
    assert whole == pytest.approx(8 * 10 / 20, rel=0.05)  # packets have headers
    assert transfer_s(10 * MB, 20, SLOW, FLOWER) > whole  # windows open first
    assert (
        round_s(0, 0, sites=1, line=SLOW) - round_s(0, 0, sites=1, line=FAST)
        > 0.1 * FLOWER.exchanges
    )
    assert objects_s(10 * MB, 20, SLOW, FLOWER) > objects_s(MB, 20, SLOW, FLOWER)


def test_each_direction_has_its_own_speed() -> None:
    thin = SLOW.model_copy(update={"up_mbit_s": 2})
    assert round_s(0, 10 * MB, sites=1, line=thin) - round_s(
        0, 10 * MB, sites=1, line=SLOW
    ) == pytest.approx(36, 0.1)
    assert round_s(10 * MB, 0, sites=1, line=thin) == round_s(10 * MB, 0, sites=1, line=SLOW)


def test_loss_and_neighbours_make_a_round_longer() -> None:
    lossy = [SLOW.model_copy(update={"loss": loss}) for loss in (0, 1e-5, 1e-4, 1e-3, 1e-2)]
    times = [round_s(10 * MB, 10 * MB, sites=1, line=line) for line in lossy]
    assert times == sorted(times)
    shared = SLOW.model_copy(update={"shared": True})
    times = [round_s(10 * MB, 10 * MB, sites=sites, line=shared) for sites in (1, 2, 4)]
    assert times[1] - times[0] == pytest.approx(8, rel=0.1)
    assert times == sorted(times)
    assert round_s(MB, MB, sites=1, line=SLOW) == round_s(MB, MB, sites=9, line=SLOW)


def test_check_predicts_a_round_from_the_bytes_that_it_predicts(run_config: dict[str, Any]) -> None:
    table = run_config | {"codec": {"name": "int8"}}
    silent = plan(parse(table, "test"))
    assert silent["round_over_line_s"] is None
    line = {"up_mbit_s": 0.01, "down_mbit_s": 20, "rtt_ms": 100}
    found = plan(parse(table | {"fleet": {"line": line}}, "test"))
    expected = round_s(
        found["bytes"]["down"],
        found["bytes"]["frame"],
        sites=len(found["sites"]),
        line=Line.model_validate(line),
    )
    assert found["round_over_line_s"] == expected
    assert found["round_over_line_s"] > found["bytes"]["frame"] * 8 / 0.01e6
    row = next(row for row in found["rows"] if "fleet.line" in row["what"])
    assert row["value"].startswith(f"{expected:.1f} s")
    assert [
        row for row in found["rows"] if row is not None and "fleet.line" not in row["what"]
    ] == silent["rows"]


def test_visits_that_wait_for_each_other_take_their_time_one_after_another(
    run_config: dict[str, Any],
) -> None:
    table = {key: value for key, value in run_config.items() if key != "lora"}
    line = {"up_mbit_s": 1, "down_mbit_s": 20, "rtt_ms": 100}
    table |= {
        "tune": "full",
        "fleet": {"line": line},
        "data": run_config["data"] | {"heldout_share": 0.2},
    }
    seconds = []

    for parallel in (1, 3):
        method = {"name": "fedcybgd", "parallel": parallel, "layers_per_block": 1}
        rows = plan(parse(table | {"method": method}, "test"))["rows"]
        words = next(row["value"] for row in rows if "fleet.line" in row["what"])
        seconds.append(float(words.split()[0]))
        assert f"of up to {min(parallel, 2)} visits at once" in words  # there are two blocks

    assert seconds[0] > seconds[1]


@pytest.mark.parametrize("name", ["ecolora", "flasc", "local"])
def test_a_method_with_a_code_of_its_own_has_a_time_too(
    name: str, run_config: dict[str, Any]
) -> None:
    usual = {key: value for key, value in run_config.items() if key not in ("codec", "evaluate")}
    seconds = []
    for rate in (0.01, 0.02):
        line = {"up_mbit_s": rate, "down_mbit_s": rate, "rtt_ms": 100}
        table = usual | {"method": {"name": name}, "fleet": {"line": line}}
        found = plan(parse(table, "test"))
        seconds.append(found["round_over_line_s"])
        row = next(row for row in found["rows"] if "fleet.line" in row["what"])
        assert row["value"].startswith(f"{seconds[-1]:.1f} s")
        assert not any("fleet.line" in note for note in found["notes"])

    assert seconds[0] > seconds[1]


@pytest.mark.parametrize("line", [{"up_mbit_s": 0}, {"rtt_ms": -1}, {"loss": 0.5}, {"speed": 3}])
def test_a_line_that_cannot_be_is_refused(run_config: dict[str, Any], line: dict[str, Any]) -> None:
    whole = {"up_mbit_s": 1, "down_mbit_s": 20, "rtt_ms": 100}
    with pytest.raises(ConfigError, match=rf"fleet\.line\.{next(iter(line))}"):
        parse(run_config | {"fleet": {"line": whole | line}}, "test")
