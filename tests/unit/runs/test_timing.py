"""The time of a round from a measured step, and the time left from measured rounds; with clocks of
our own."""

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.data import Example, Question
from fluvial.formatting import human_seconds
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.models.tuning import tuned_parameters
from fluvial.report.plan_tables import plan_table
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.runs.remaining import Pace, Remaining
from fluvial.runs.set_up_time import SetUp, left_out, set_up
from fluvial.runs.step_time import time_answers
from fluvial.runs.timed_plan import _coding_note, timed
from fluvial.runs.timing import MeasuredCoding, MeasuredTimes, Work, measure, predict
from tests.support.models import with_fitting_model
from tests.support.runs import toml_of
from tests.unit.report.test_show import text_of

TGAP = {"method": {"name": "cgfedllm", "tgap": {"source": "sites"}}}
FOUND = MeasuredTimes(site="north", load_s=3.0, step_s=0.5, call_s=0.25, heldout_s=0.1)


def test_a_round_by_hand() -> None:
    work = Work(steps=[4, 4, 2, 2], heldout=[10, 10, 10, 10], questions=(), cohort=4, workers=2)
    ahead = predict(FOUND, work, rounds=5, every=2)
    assert ahead.training_s == pytest.approx((2.25 + 2.25 + 1.25 + 1.25) / 2)
    assert ahead.measuring_s == pytest.approx(40 / 2 * 0.1)
    assert ahead.run_s == pytest.approx(5 * 3.5 + (2 + 2) * 2.0)
    over_line = predict(FOUND, work, rounds=5, every=0, line_s=7.0)
    assert over_line.run_s == pytest.approx(5 * (3.5 + 7.0) + 2 * 2.0)


def test_written_answers_are_part_of_a_measure() -> None:
    """Ten answers of 2 s at each of two sites that work at a time, beside their losses."""
    work = Work(steps=[1, 1], heldout=[10, 10], questions=[10, 10], cohort=2, workers=2)
    ahead = predict(replace(FOUND, answer_s=2.0), work, rounds=3, every=1)
    assert ahead.measuring_s == pytest.approx(10 * 0.1 + 10 * 2.0)
    assert ahead.run_s == pytest.approx(3 * ahead.training_s + (2 + 3) * 21.0)


def test_a_set_up_is_its_rounds_and_its_codings() -> None:
    work = SetUp(steps=[2, 2, 4], rounds=5, codings=7, workers=2)
    assert work.seconds(step_s=1.0, call_s=0.5, coding_s=0.25) == pytest.approx(
        5 * (2.5 + 2.5 + 4.5) / 2 + 7 * 0.25
    )
    assert SetUp().seconds(step_s=1.0, call_s=0.5, coding_s=0.25) == 0


@pytest.mark.parametrize(
    ("codec", "codings", "unknown"),
    [
        ({"name": "auto", "rate": 16}, 7, []),
        ({"name": "int8"}, 1, []),
        ({"name": "resnet"}, 0, ["the fit of a learned codec"]),
    ],
)
def test_the_set_up_of_a_run(
    run_config: dict[str, Any], codec: dict[str, Any], codings: int, unknown: list[str]
) -> None:
    """TGAP on three simulated sites: one of its rounds measures the codec, under `auto` once and
    with error feedback six times more; what is fitted has no estimate."""
    tgap = {"name": "cgfedllm", "tgap": {"source": "public", "rounds": 4, "simulated_sites": 3}}
    config = parse(run_config | {"method": tgap, "codec": codec}, "test")
    layout = ModelPool(config.model, config.adapter).layout
    public = {name: [Example([1, 2], [1, 2])] * 8 for name in "abcd"}
    found = set_up(config, layout, {}, public)
    assert (list(found.steps), found.rounds) == ([3, 3, 3], 4)
    assert found.codings == 3 * codings
    assert left_out(config, layout) == unknown
    plain = parse(run_config, "test")
    assert set_up(plain, layout, {}, public) == SetUp()
    assert not left_out(plain, layout)


def test_an_answer_is_timed_by_a_batch(run_config: dict[str, Any]) -> None:
    """All tokens of short answers; of long ones the first, and the pace of those after nine."""
    questions = [Question(f"{number}", "x") for number in range(20)]

    def seconds(tokens: int, *reads: float) -> float:
        evaluate = {"max_new_tokens": tokens, "sample_tokens": 2}
        config = parse(run_config | {"evaluate": evaluate}, "test")
        pool = ModelPool(config.model, config.adapter)
        clock = iter(reads)
        with pool.model(initial_state(pool.layout, 0)) as model:
            return time_answers(config, pool, model, questions, lambda: next(clock))

    assert seconds(0) == 0
    assert seconds(4, 1.0, 5.0) == pytest.approx(4.0 / 8)
    assert seconds(54, 0.0, 1.0, 1.0, 4.0) == pytest.approx((3.0 + 30 * 2.0 / 15) / 8)


def test_a_round_is_never_shorter_than_its_longest_site() -> None:
    work = Work(steps=[100, 1, 1], heldout=[1, 1, 1], questions=(), cohort=3, workers=8)
    assert predict(FOUND, work, rounds=1, every=0).training_s == pytest.approx(50.25)
    half = Work(steps=[4] * 8, heldout=[1] * 8, questions=(), cohort=4, workers=1)
    assert predict(FOUND, half, rounds=1, every=0).training_s == pytest.approx(4 * 2.25)


def test_the_prediction_is_made_of_what_the_clock_said(
    run_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes one second further each time it is read: every measured span is one
    second."""
    monkeypatch.setattr(ModelPool, "end_remarks", lambda *_, **__: ["the end was never trained"])
    config = parse(run_config, "test")
    clock = itertools.count(0.0, 1.0)
    found, work, _ = measure(config, lambda: next(clock))
    assert (found.load_s, found.call_s) == (1.0, 1.0)
    assert found.step_s == 0.0  # one step and three took a second each
    assert found.site == "west"  # 40 of 90 records
    assert list(work.steps) == [3, 3, 3]
    clock = itertools.count(0.0, 10.0)
    planned = timed(config, plan(config), lambda: next(clock))
    assert planned["notes"][-1] == "the end was never trained"
    told = planned["time"]
    assert (told["step_s"], told["call_s"]) == (
        10.0,
        0.0,
    )  # slow enough for one step to be the measure
    assert told["round_training_s"] == max(3 * 30.0 / told["workers"], 30.0)
    assert told["run_s"] == pytest.approx(2 * told["round_training_s"] + 2 * told["measuring_s"])
    coding_s = 2 * max(3 * 10.0 / told["workers"], 10.0)
    assert told["here_s"] == pytest.approx(10.0 + told["run_s"] + coding_s)  # with the load
    assert told["set_up_s"] == told["answer_s"] == 0
    later = timed(config, plan(config), lambda: next(clock), started_s=5.0)
    assert later["time"]["here_s"] == pytest.approx(told["here_s"] + 5.0)


def test_coding_counts_with_the_line(run_config: dict[str, Any]) -> None:
    """Every span is a second, so int8 takes as long, and the smaller frame is a gain."""
    line = {"up_mbit_s": 1.0, "down_mbit_s": 1.0, "rtt_ms": 0.0}
    settings = run_config | {
        "codec": {"name": "trellis", "rate": 16},
        "fleet": run_config.get("fleet", {}) | {"line": line},
    }
    config = parse(settings, "test")
    clock = itertools.count(0.0, 1.0)
    planned = plan(config)
    told = timed(config, planned, lambda: next(clock))
    assert told["time"]["coding_s"] == 1.0
    time = told["time"]
    coding_s = 2 * max(3 / time["workers"], 1.0)  # a second of each of three sites, in two rounds
    assert time["here_s"] == pytest.approx(1.0 + time["run_s"] + coding_s)
    both = timed(parse(settings | {"compare": ["local"]}, "test"), planned, lambda: next(clock))
    assert both["time"]["here_s"] == pytest.approx(2 * time["here_s"] - coding_s - 1.0)
    assert any("with local before it" in row["what"] for row in both["rows"])
    rows = {row["what"]: row["value"] for row in told["rows"]}
    assert rows["coding and decoding an update by trellis, measured"] == "1.0 s; int8 1.0 s"
    many = time["many_machines"]
    assert many["line_s"] == pytest.approx(planned["round_over_line_s"] + 1.0)
    what = "a round over fleet.line, each site on a machine like this, with training and coding"
    assert rows[what] == human_seconds(many["training_s"] + many["line_s"])
    assert not any("longer than with int8" in note for note in told["notes"])

    for name, timed_as in (("auto", "trellis"), ("klt", None)):
        codec = {"codec": {"name": name, "rate": 16, "error_feedback": name == "auto"}}
        found, *_ = measure(parse(run_config | codec | TGAP, "test"))
        assert (found.coding.codec if found.coding else None) == timed_as


@pytest.mark.parametrize("sites", [None, ["north", "south", "west"]])
def test_sites_share_this_machine_and_have_many_alone(
    run_config: dict[str, Any], sites: list[str] | None
) -> None:
    """An hour for each read of the clock; three sites, which a round on this machine trains one
    after another, also where the sites of a deployment are named."""
    line = {"up_mbit_s": 1.0, "down_mbit_s": 1.0, "rtt_ms": 0.0}
    fleet = {"line": line, "workers": 1} | ({} if sites is None else {"sites": sites})
    config = parse(run_config | {"fleet": fleet}, "test")
    clock = itertools.count(0.0, 3600.0)
    planned = plan(config)
    told = timed(config, planned, lambda: next(clock))
    rows = {row["what"]: row["value"] for row in told["rows"]}
    assert rows["training in a round on this machine, 1 sites at a time"] == "9 h 00 min"
    many = told["time"]["many_machines"]
    assert many["training_s"] == 3 * 3600
    assert many["run_s"] == pytest.approx(2 * many["round_s"] + 2 * many["measuring_s"])
    assert not any("e+" in value for value in rows.values())
    alone = timed(config, planned | {"round_over_line_s": None}, lambda: next(clock))
    assert alone["time"]["many_machines"] is None
    assert not any("each site on a machine" in row["what"] for row in alone["rows"])


def test_a_codec_slower_than_the_upload_that_it_saves_is_named(run_config: dict[str, Any]) -> None:
    coding = MeasuredCoding("trellis", 3.0, 1_000_000, 1.0, 2_000_000)
    assert coding.loss_s(8.0) == pytest.approx(1.0)
    assert coding.loss_s(2.0) == pytest.approx(-2.0)


def test_check_times_when_asked_only(run_config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(toml_of(run_config))
    plain, asked = (
        CliRunner().invoke(app, ["check", str(tmp_path / "c.toml"), "--format", "json", *more])
        for more in ([], ["--time"])
    )
    assert "time" not in json.loads(plain.stdout)
    told = json.loads(asked.stdout)["time"]
    assert told["step_s"] > 0
    assert "one optimizer step at west, measured" in text_of(plan_table(json.loads(asked.stdout)))


@pytest.mark.parametrize(
    "parts",
    [
        {"front": "full", "middle": "lora", "back": "lora"},
        {"front": "frozen", "middle": "full", "back": "frozen"},
    ],
)
@pytest.mark.parametrize("front", [1, "auto"])
def test_a_step_of_parts_that_are_tuned_apart(
    run_config: dict[str, Any], parts: dict[str, str], front: int | str
) -> None:
    """The step is that of the tensors that the run tunes, and of no others."""
    method = {"name": "flglm", "front": front, "parts": parts, "ends": "own"}
    table = with_fitting_model({**run_config, "method": method})
    if "lora" not in parts.values():
        del table["lora"]

    config = parse(table, "test")
    found, *_ = measure(config)
    assert found.step_s > 0

    if front != "auto":
        pool = ModelPool(config.model, config.adapter)
        with pool.model(initial_state(pool.layout, 0), trainable="A and B") as model:
            trained = {id(p) for p in model.parameters() if p.requires_grad}
            tuned = tuned_parameters(model)
        assert tuned.keys() == set(pool.layout.names)
        assert {id(parameter) for parameter in tuned.values()} == trained


# -- while it runs -------------------------------------------------------------------------------


def test_time_left_is_that_of_measured_rounds() -> None:
    left = Remaining([("local", 4), ("cgfedllm", 4)])
    assert (left.left_s(), left.words()) == (None, "")
    left.round("local", 1, 4, 10.0)
    assert (
        left.left_s() == 3 * 10.0 + 4 * 10.0
    )  # the method has no rounds yet: as fast as the baseline
    assert left.words() == "about 1 min or more left"  # and its codec may be slow
    left.round("local", 2, 4, 20.0)
    assert left.left_s() == pytest.approx(2 * 15.0 + 4 * 15.0)
    left.finished("local")
    left.round("cgfedllm", 1, 4, 100.0)
    assert left.left_s() == 300.0
    assert left.words() == "about 5 min left"


def test_a_run_that_goes_on_has_fewer_rounds_left() -> None:
    left = Remaining([("fedavg", 20)])
    left.round("fedavg", 18, 20, 6.0)
    assert left.left_s() == 12.0


def test_set_up_has_a_pace_of_its_own() -> None:
    now = iter([0.0, 8.0, 100.0, 101.0])
    left = Remaining([("cgfedllm", 3)], clock=lambda: next(now))

    def say(text: str, *values: object) -> None:
        left.heard(logging.LogRecord("fluvial", logging.INFO, "", 0, text, values, None))

    say("TGAP round %d of %d", 1, 6)
    assert left.words() == ""
    say("round %d, %s: %s answered (%d of %d)", 0, "snapshot", "a", 1, 3)
    say("TGAP round %d of %d", 3, 6)  # four seconds each, four to go
    assert left.words() == "set-up about 16 s, then the rounds"
    say("autoencoder: iteration %d of %d, error %.3f", 100, 600, 0.5)
    assert left.words() == ""
    say("autoencoder: iteration %d of %d, error %.3f", 200, 600, 0.4)
    assert left.words() == "set-up about 4 s, then the rounds"
    left.round("cgfedllm", 1, 3, 2.0)
    assert left.words() == "about 4 s left"


def test_a_stage_of_a_command_has_a_pace() -> None:
    """What begins is counted as left, what is done is not; another stage begins anew."""
    now = iter([0.0, 4.0, 10.0, 13.0])
    pace = Pace(clock=lambda: next(now))

    def say(text: str, *values: object) -> None:
        pace.heard(logging.LogRecord("fluvial", logging.INFO, "", 0, text, values, None))

    say("counting tokens of site %d of %d", 1, 5)
    assert pace.words() == ""
    say("counting tokens of site %d of %d", 3, 5)  # two seconds each, three to go
    assert pace.words() == "about 6 s left"
    say("loading the base model")
    assert pace.words() == ""
    say("multiple choice: %d of %d sequences", 10, 40)
    assert pace.words() == ""
    say("multiple choice: %d of %d sequences", 20, 40)
    assert pace.words() == "about 6 s left"


@pytest.mark.parametrize(("coding_s", "remarked"), [(0.2, False), (30.0, True)])
def test_a_slow_codec_is_remarked_where_it_costs_a_second(
    run_config: dict[str, Any], coding_s: float, remarked: bool
) -> None:
    line = {"up_mbit_s": 1.0, "down_mbit_s": 1.0, "rtt_ms": 0.0}
    config = parse(run_config | {"fleet": {"line": line}}, "test")
    notes = _coding_note(config, MeasuredCoding("trellis", coding_s, 1000, 0.1, 2000))
    assert bool(notes) == remarked
    assert not notes or "longer than with int8 at 1 Mbit/s" in notes[0]
