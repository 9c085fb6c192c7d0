"""The time that `fluvial init` names, and the shorter run that it proposes for a first look."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from fluvial.runs.config import RunConfig, load, parse
from fluvial.runs.plan import plan
from fluvial.runs.proposal import duration
from fluvial.runs.proposal.duration import Duration, duration_of, first_look
from fluvial.runs.proposal.lengths import Lengths
from fluvial.runs.proposal.models import look_at_model
from tests.unit.runs.test_proposal import answers, run_init, written

SITES = [
    {"records": 100, "train": 90, "heldout": 10, "questions": 10},
    {"records": 50, "train": 40, "heldout": 10, "questions": 10},
]
LENGTHS = Lengths((20, 40), (4, 4))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(model: Path, **changes: object) -> RunConfig:
    table = {
        "rounds": 40,
        "compare": ["local"],
        "model": {"name_or_path": str(model)},
        "data": {"source": "records.jsonl", "partition": {"by": "iid", "sites": 2}},
        "train": {"max_steps": 4},
        "fleet": {"workers": 1},
    }
    return parse(table | changes, "test")


def test_a_short_run_has_no_first_look(tiny_model: Path) -> None:
    options = ("--model", str(tiny_model), "--data", written(answers()))
    after = run_init("--yes", *options).output.partition("Next:")[2]
    assert re.search(r"run q.toml  # about [\d.]+ s here", after)
    assert "first look" not in after


@pytest.mark.parametrize("limit", ["none", "unequal-sites"])
def test_the_command_for_a_first_look_passes_check(
    limit: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder differs from that of the whole run, which may follow."""
    monkeypatch.setattr(duration, "_operations_a_second", lambda _: 1e7)
    options = ("--model", str(tiny_model), "--data", written(answers()), "--limit", limit)
    _, _, last = run_init("--yes", *options).output.partition("For a first look, in about ")
    time, command = last.strip().splitlines()
    assert time.endswith("min:")
    words = shlex.split(command)
    assert words[words.index("run") + 1 :][:3] == ["q.toml", "--out", "runs/q-first"]
    overrides = [word for before, word in pairwise(words) if before == "--set"]
    whole, short = load(Path("q.toml")), load(Path("q.toml"), overrides)
    assert short.rounds < whole.rounds
    assert plan(short)["sites"]


def test_a_small_model_is_timed_and_a_large_one_is_not(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is a small one with much text, which would be tokenised once more."""
    written(answers())
    config = config_of(
        tiny_model,
        data={
            "source": "records.jsonl",
            "columns": {"prompt": "question", "completion": "answer"},
            "partition": {"by": "iid", "sites": 2},
        },
    )
    model = look_at_model(str(tiny_model))
    timed = duration_of(config, SITES, model, LENGTHS)
    assert timed.is_measured
    assert "by the size" not in timed.words()

    monkeypatch.setattr(duration, "measure", lambda *_, **__: pytest.fail("was timed"))
    much = [{**SITES[0], "records": 10**5}]
    assert not duration_of(config, much, model, LENGTHS).is_measured
    monkeypatch.setattr(duration, "SMALL", 0)
    estimated = duration_of(config, SITES, model, LENGTHS)
    assert estimated.words().endswith(" here, by the size of the model")


@pytest.mark.parametrize("layer_s", [0.0, 0.01])
def test_an_estimate_follows_parameters_tokens_layers_and_steps(
    layer_s: float, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration, "SMALL", 0)
    monkeypatch.setattr(duration, "LAYER_S", {"cpu": layer_s, "cuda": layer_s})
    monkeypatch.setattr(duration, "_operations_a_second", lambda _: 2e6)
    monkeypatch.setattr(duration, "EFFICIENCY", 1.0)
    model = look_at_model(str(tiny_model))
    config = config_of(tiny_model, compare=[])
    found = duration_of(config, SITES, model, LENGTHS)
    sequence_s = 2 * model.parameters * 40 / 2e6
    steps = 40 * 2 * 4  # rounds, sites, steps of a site in a round
    sequences = steps * config.train.logical_batch
    layers_s = model.layers * layer_s * (2 * steps + 2 * 20)
    trained_s = sequence_s * (2 * sequences + 2 * 20)
    assert found.run_s == pytest.approx(trained_s + layers_s, rel=1e-3)
    assert found.run_s > duration.LONG_S >= found.first_look_s
    assert found.overrides[0].startswith("rounds=")


@pytest.mark.parametrize(
    ("round_s", "measure_s", "overrides"),
    [
        (5.0, 1.0, ["rounds=15"]),
        (15.0, 10.0, ["rounds=3", "data.max_heldout=16"]),
        (80.0, 1.0, ["rounds=2", "data.max_heldout=8", "compare=[]"]),
        (4000.0, 1.0, ["rounds=2", "data.max_heldout=4", "compare=[]", "train.max_steps=2"]),
    ],
)
def test_a_first_look_takes_away_rounds_before_anything_else(
    round_s: float, measure_s: float, overrides: list[str], tiny_model: Path
) -> None:
    def seconds(config: RunConfig) -> float:
        training_s = config.rounds * round_s * (config.train.max_steps or 0) / 4
        heldout = min(64, config.data.max_heldout or 64)
        return (1 + len(config.compare)) * (training_s + heldout * measure_s / 10 * 2)

    found, first_s = first_look(config_of(tiny_model), seconds)
    assert found == overrides
    assert first_s <= duration.LONG_S or overrides[0] == "rounds=2"


def test_a_first_look_raises_no_setting(tiny_model: Path) -> None:
    small = config_of(tiny_model, train={"max_steps": 1}, compare=[])
    found, _ = first_look(small, lambda config: 1e4 * config.rounds)
    assert found == ["rounds=2", "data.max_heldout=4"]


def test_the_words_of_a_time_are_rough() -> None:
    assert Duration(700.0, is_measured=True).words() == "about 12 min here"
