"""The choice within a budget: what is open, what fits, what is kept, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.errors import CheckpointError, ConfigError
from fluvial.federation.line import Line, round_s
from fluvial.methods import METHODS
from fluvial.models.pool import ModelPool
from fluvial.report.page import write_page
from fluvial.runs.budget import candidates
from fluvial.runs.budget.candidates import Adapter, Candidate, Costs
from fluvial.runs.budget.config import BudgetConfig
from fluvial.runs.budget.pairs import Pair, pairs
from fluvial.runs.budget.preview import choice_alone
from fluvial.runs.budget.reason import reason
from fluvial.runs.budget.settled import Open, settle
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import texts_of
from fluvial.runs.plan import plan
from fluvial.runs.run import execute
from fluvial.storage.run_files import read_run
from tests.support.budget import BUDGET, budget_table
from tests.support.runs import run_table, run_with_stops, toml_of

Table = dict[str, Any]


@pytest.fixture
def table(run_config: Table, tmp_path: Path) -> Table:
    """Return a run of which everything but the steps is open."""
    return budget_table(run_config, tmp_path)


def test_the_choice_is_within_its_bytes_and_shown(table: Table, tmp_path: Path) -> None:
    result = run_table(table, tmp_path / "run")
    choice = result["setup"]["budget"]
    rows = read_run(tmp_path / "run")["metrics"]
    sent = {site: sum(row["bytes"][site]["up train"] for row in rows) for site in rows[0]["bytes"]}
    assert max(sent.values()) <= choice["up_bytes"] <= BUDGET["up_bytes"]
    assert choice["up_bytes"] - max(sent.values()) < 60 * table["rounds"] + choice["up_bytes"] // 50

    config = read_run(tmp_path / "run")["config"]
    assert config["lora"]["r"] == choice["chosen"]["r"]
    assert config["codec"]["name"] == choice["chosen"]["codec"]["name"]
    chosen = [row for row in choice["trials"] if row["chosen"]]
    assert len(chosen) == 1
    longest = [row["loss"] for row in choice["trials"] if row["rounds"] == BUDGET["trial_rounds"]]
    assert chosen[0]["loss"] == min(longest)
    assert choice["why"].startswith(f"rank {choice['chosen']['r']} on ")

    helped = chosen[0]["loss"] < choice["base_loss"]
    assert helped != ("this text tells little" in choice["why"])

    # The page, the check and the plan show it.
    write_page(read_run(tmp_path / "run"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("Trials within the budget") == 2  # the figure and the table
    notes = plan(parse(table, "test"))["notes"]
    assert any("will be chosen when the run starts" in note for note in notes)
    file = tmp_path / "config.toml"
    file.write_text(toml_of(table))
    done = CliRunner().invoke(app, ["plan", str(file), "--format", "json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == choice


def test_trials_are_no_longer_than_the_run(table: Table, tmp_path: Path) -> None:
    short = table | {"rounds": 2, "budget": table["budget"] | {"trial_rounds": 8}}
    result = run_table(short, tmp_path / "run")
    assert max(trial["rounds"] for trial in result["setup"]["budget"]["trials"]) == 2


def test_trials_count_their_steps(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    """The steps end at what was to be done, which is no more than check says."""
    steps = {"train": {"learning_rate": 1e-3, "per_device_train_batch_size": 2}}
    config = parse(table | steps | {"budget": BUDGET | {"max_steps": [1, 3]}}, "test")
    (said,) = re.findall(r"at most (\S+) optimizer steps", " ".join(plan(config)["notes"]))
    caplog.set_level("INFO", "fluvial")
    choice_alone(config)
    found = re.findall(r"trials at (\d+) of (\d+) steps at most", caplog.text)
    done = [int(number) for number, _ in found]
    assert done == sorted(set(done))
    assert found[-1][0] == found[-1][1]
    assert max(int(total) for _, total in found) <= int(said.replace(",", ""))
    assert " answered (" not in caplog.text


def divided(table: Table, **budget: Any) -> Table:
    """Return a run of which the rounds and the steps of a round are open too."""
    kept = {key: value for key, value in table.items() if key != "rounds"}
    train = {"learning_rate": 1e-3, "per_device_train_batch_size": 2}
    return kept | {"train": train, "budget": BUDGET | {"total_steps": 6} | budget}


def test_steps_are_divided_into_rounds(
    table: Table, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Many short rounds and few long ones have equal steps, and their bytes are within the same."""
    table = divided(table, max_steps=[1, 3, 2], trial_rounds=8)
    config = parse(table, "test")
    (said,) = re.findall(r"at most (\S+) optimizer steps", " ".join(plan(config)["notes"]))
    caplog.set_level("INFO", "fluvial")
    straight = run_table(table, tmp_path / "run")
    done = re.findall(r"trials at (\d+) of \d+ steps at most", caplog.text)
    assert int(done[-1]) <= int(said.replace(",", ""))

    choice = straight["setup"]["budget"]
    rounds = {row["max_steps"]: row["of_rounds"] for row in choice["trials"]}
    assert rounds == {1: 6, 2: 3, 3: 2}
    assert choice["trials"][0]["max_steps"] == 2
    assert all(row["up_bytes"] <= BUDGET["up_bytes"] for row in choice["trials"])
    whole = [row for row in choice["trials"] if row["rounds"] == row["of_rounds"]]
    (best,) = [row for row in whole if row["chosen"]]
    assert best["loss"] == min(row["loss"] for row in whole)

    read = read_run(tmp_path / "run")
    chosen = choice["chosen"]
    assert read["config"]["rounds"] == len(read["metrics"]) == chosen["rounds"]
    assert chosen["rounds"] == rounds[chosen["max_steps"]]
    assert f"{chosen['max_steps']} steps a round in {chosen['rounds']} rounds" in choice["why"]
    stopped = run_with_stops(table, tmp_path / "stopped", [5, 99])
    assert stopped["adapter_sha256"] == straight["adapter_sha256"]

    file = tmp_path / "config.toml"
    file.write_text(toml_of(table))
    shown = CliRunner().invoke(app, ["plan", str(file)]).output
    assert f": rounds = {chosen['rounds']}\n" in shown


def test_one_division_is_the_run_with_its_rounds(table: Table, tmp_path: Path) -> None:
    own = run_table(divided(table, max_steps=[2]), tmp_path / "own")
    rounds = divided(table, max_steps=[2]) | {"rounds": 3}
    del rounds["budget"]["total_steps"]
    fixed = run_table(rounds, tmp_path / "fixed")
    assert own["adapter_sha256"] == fixed["adapter_sha256"]
    assert own["setup"]["budget"]["trials"] == fixed["setup"]["budget"]["trials"]
    assert own["setup"]["budget"]["chosen"] == fixed["setup"]["budget"]["chosen"] | {"rounds": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 3}, "budget.total_steps: without effect, because rounds is set"),
        (
            {"train": {"max_steps": 2}},
            "budget.total_steps: without effect, because train.max_steps or",
        ),
        (
            {"budget": {"up_bytes": 9, "total_steps": 20}},
            "budget.max_steps: 16 steps a round leave",
        ),
    ],
)
def test_steps_that_cannot_be_divided_are_refused(
    table: Table, change: Table, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_table(divided(table, max_steps=[2]) | change, tmp_path / "run")


def test_a_run_that_is_resumed_keeps_the_choice(table: Table, tmp_path: Path) -> None:
    table = table | {"compare": ["local"]}  # a baseline has the chosen adapter and no budget
    straight = run_table(table, tmp_path / "a")
    stopped = run_with_stops(table, tmp_path / "b", [5, 99])
    assert stopped["adapter_sha256"] == straight["adapter_sha256"]
    assert stopped["setup"] == straight["setup"]
    chosen = straight["setup"]["budget"]["chosen"]
    local = json.loads((tmp_path / "a" / "compare" / "local" / "result.json").read_text())
    assert local["setup"] == {}
    assert chosen.keys() == {"target_modules", "r", "codec"}

    (tmp_path / "b" / "budget.json").rename(tmp_path / "lost.json")
    with pytest.raises(CheckpointError, match=r"budget\.json is missing"):
        list(execute(parse(table, "test"), tmp_path / "b", resume=True))

    (tmp_path / "lost.json").rename(tmp_path / "b" / "budget.json")
    kept = json.loads((tmp_path / "b" / "budget.json").read_text())
    damaged: list[tuple[Any, str]] = [
        ([1], r"holds no choice of a budget; restore it"),
        ({}, r"the choice of the budget has no 'codec'; restore it"),
        ({**chosen, "r": "x"}, r"the choice of the budget: lora\.r.*restore it"),
        ({**chosen, "codec": {"name": "none"}}, r"the choice of the budget: codec.*restore it"),
    ]
    for choice, words in damaged:
        text = json.dumps({**kept, "chosen": choice})
        (tmp_path / "b" / "budget.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"(?s)b/budget\.json\S* {words}") as error:
            list(execute(parse(table, "test"), tmp_path / "b", resume=True))
        assert "pydantic" not in str(error.value)
    (tmp_path / "b" / "budget.json").write_text(json.dumps(kept))

    other = table | {"lora": table["lora"] | {"r": 7}, "budget": {"up_bytes": 3000}}
    with pytest.raises(CheckpointError, match=r"lora\.r"):
        list(execute(parse(other, "test"), tmp_path / "b", resume=True))


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (11.6, "needs 11.6 s of 12.0 s"),
        (3.0, "needs 3 s of 12 s"),
        (11.99996, "needs 12.000 s of 12.000 s"),
    ],
)
def test_the_reason_tells_seconds_and_losses_apart(needed: float, words: str) -> None:
    """A loss that is lower by less than is shown is not said to be better."""
    row = {"max_steps": 4, "codec": "int8", "rate": 4.0, "r": 2, "target_modules": "attention"}
    row |= {"loss": 5.68503, "rounds": 2, "of_rounds": 2, "chosen": True}
    record: dict[str, Any] = {
        "chosen": {},
        "up_bytes": 10,
        "down_bytes": 20,
        "run_s": needed,
        "limits": {"up_bytes": None, "total_bytes": None, "run_s": 12.0},
        "trials": [row, row | {"chosen": False}],
        "base_loss": 6.0,
        "alone_loss": 5.68501,
    }
    why = reason(record)
    assert words in why
    assert "do better" not in why
    assert "do better (5.6849)" in reason(record | {"alone_loss": 5.68494})
    assert "no better than the base" in reason(record | {"base_loss": 5.68504})


def test_a_limit_of_time_bounds_bytes_and_steps(table: Table) -> None:
    """A clock that counts its calls: each step and each coding takes a known time."""
    line = {"up_mbit_s": 0.01, "down_mbit_s": 1.0, "rtt_ms": 10.0}
    budget = {"run_s": 40.0, "trial_sites": 2}
    config = parse(table | {"budget": budget, "fleet": {"line": line}}, "test")
    assert config.budget is not None
    pool = ModelPool(config.model, config.adapter)
    ticks = iter(range(10**9))
    texts = texts_of(config, pool)
    costs = Costs(config, config.budget, texts, clock=lambda: 0.01 * next(ticks))
    adapter = Adapter("attention", 2, None)
    (found,) = costs.candidates(
        adapter, pool.beside(config.lora.model_copy(update={"r": 2})), [Pair("trellis", "exact")]
    )
    assert found.train_s is not None
    assert found.run_s is not None
    first_s, *later_s = (
        round_s(
            down,
            found.up_bytes // config.rounds,
            sites=config.method.cohort(len(texts.names)),
            line=Line.model_validate(line),
            train_s=found.train_s,
        )
        for down in found.downs
    )
    assert found.run_s == pytest.approx(first_s + (config.rounds - 1) * later_s[0])
    assert found.downs[0] < 200 < found.downs[1]
    assert found.run_s <= 40.0


LINE = {"up_mbit_s": 0.02, "down_mbit_s": 0.02, "rtt_ms": 10.0}


@pytest.fixture
def timed(table: Table, monkeypatch: pytest.MonkeyPatch) -> Table:
    """The run behind a slow line, with steps and codecs that take no time, and one adapter."""
    monkeypatch.setattr(candidates, "time_steps", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(candidates, "coding_s", lambda *_: 0.0)
    lora = table["lora"] | {"r": 16, "target_modules": "all-linear"}
    return table | {"lora": lora, "fleet": {"line": LINE}}


def costs_of(table: Table, **budget: Any) -> Costs:
    config = parse(table | {"budget": {"run_s": 1e6, **budget}}, "test")
    assert config.budget is not None
    return Costs(config, config.budget, texts_of(config, ModelPool(config.model, config.adapter)))


def within(costs: Costs, run_s: float) -> Candidate | None:
    """The first candidate within so many seconds."""
    budget = costs.budget.model_copy(update={"run_s": run_s})
    pool = ModelPool(costs.config.model, costs.config.adapter)
    tried = pairs(budget, Open.of(costs.config))
    return replace(costs, budget=budget).first(Adapter(None, None, None), pool, tried)


def test_the_less_time_the_coarser_both_ways(timed: Table) -> None:
    """Neither way stays exact while the other is coarse."""
    costs = costs_of(timed)
    found = []
    run_s = 1e6
    while (candidate := within(costs, run_s)) is not None:
        assert candidate.run_s is not None
        assert candidate.run_s <= run_s
        found.append(candidate)
        run_s = 0.97 * candidate.run_s

    names = [(each.pair.up, each.pair.down) for each in found]
    assert names[:3] == [("int8", "exact"), ("int8", "int8"), ("int4", "int8")]
    assert names[-1] == ("trellis", "trellis")
    coarser = [each.bits[0] for each in found]
    assert coarser == sorted(coarser, reverse=True)


def test_a_slow_line_has_a_coded_downlink(timed: Table, tmp_path: Path) -> None:
    exact = within(costs_of(timed, downlinks=["exact"], codecs=["int8"]), 1e6)
    assert exact is not None
    assert exact.run_s is not None
    budget = {"run_s": exact.run_s - 0.1, "trial_rounds": 2, "trial_sites": 2}
    table = timed | {"budget": budget}
    straight = run_table(table, tmp_path / "run")
    choice = straight["setup"]["budget"]
    assert choice["run_s"] <= budget["run_s"]
    chosen = choice["chosen"]["downlink"]
    assert "error_feedback" not in chosen
    assert read_run(tmp_path / "run")["config"]["downlink"]["name"] == chosen["name"]
    rows = read_run(tmp_path / "run")["metrics"]
    received = [sum(row["bytes"][site]["down train"] for row in rows) for site in rows[0]["bytes"]]
    assert max(received) <= choice["down_bytes"] < exact.down_bytes
    assert f", downlink {chosen['name']} at 1/" in choice["why"]
    tried = [(row["codec"], row["downlink"]) for row in choice["trials"]]
    assert 1 < len(tried) <= 1 + 3 + 3
    assert len(set(tried)) == len(tried)
    assert not any(down == "exact" and up == "int8" for up, down in tried)

    stopped = run_with_stops(table, tmp_path / "stopped", [2, 99])
    assert stopped["adapter_sha256"] == straight["adapter_sha256"]
    file = tmp_path / "config.toml"
    file.write_text(toml_of(table))
    shown = CliRunner().invoke(app, ["plan", str(file)])
    assert f'downlink.name = "{chosen["name"]}"' in shown.output


def test_a_limit_of_both_directions_has_a_coded_downlink(table: Table, tmp_path: Path) -> None:
    """What a site sends and receives together stays below it, and uses it."""
    limit = 6000
    budget = {"total_bytes": limit, "trial_rounds": 2, "trial_sites": 2, "r": [1, 2]}
    result = run_table(table | {"budget": budget}, tmp_path / "run")
    choice = result["setup"]["budget"]
    rows = read_run(tmp_path / "run")["metrics"]
    moved = {
        site: sum(row["bytes"][site][f"{way} train"] for row in rows for way in ("up", "down"))
        for site in rows[0]["bytes"]
    }
    assert max(moved.values()) <= choice["up_bytes"] + choice["down_bytes"] <= limit
    assert max(moved.values()) > 0.9 * limit
    assert choice["chosen"]["downlink"] is not None
    words = f"{choice['up_bytes'] + choice['down_bytes']:,} B of 6,000 B in both directions"
    assert words in choice["why"]
    tried = {(row["codec"], row["downlink"]) for row in choice["trials"]}
    assert {"trellis", "powersgd"} <= {up for up, _ in tried}
    assert {"trellis", "powersgd"} <= {down for _, down in tried}
    pairs = [
        (row["r"], row["target_modules"], row["codec"], row["downlink"]) for row in choice["trials"]
    ]
    assert len(set(pairs)) == len(pairs)
    begun: dict[Any, set[Any]] = {}
    for *adapter, up, down in pairs:
        begun.setdefault(tuple(adapter), set()).add((up, down))
    both = {("trellis", "trellis"), ("powersgd", "powersgd")}
    for ways in begun.values():  # each adapter begins with what fits exactly, or with both
        assert both <= ways or not both & ways
    assert any(both <= ways for ways in begun.values())


def test_a_cohort_below_all_sites_is_counted_as_all_of_them(timed: Table) -> None:
    """A site may take part in each round, and what it receives then has headers."""
    codecs = {"codec": {"name": "int8"}, "downlink": {"name": "int8"}}
    found = []
    for fraction in (1.0, 0.5):
        table = timed | codecs | {"method": {"name": "fedavg", "fraction": fraction}}
        costs = costs_of(table, run_s=None, total_bytes=10**9)
        pool = ModelPool(costs.config.model, costs.config.adapter)
        each = costs.first(Adapter(None, None, None), pool, [Pair(None, None)])
        assert each is not None
        found.append((each.up_bytes, each.down_bytes))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", METHODS)
def test_the_settings_of_all_sites_are_those_of_a_whole_cohort(name: str) -> None:
    kind = METHODS[name].config
    drawn = {"fraction": 0.5} if "fraction" in kind.model_fields else {}
    settings = kind.model_validate({"name": name, **drawn})
    assert settings.cohort(8) == (4 if drawn else 8)
    assert settings.with_all_sites().cohort(8) == 8


def test_each_limit_of_bytes_bounds_the_run(timed: Table) -> None:
    """Of two limits the tighter one decides."""
    config = parse(timed, "test")
    pool = ModelPool(config.model, config.adapter)
    found = {}
    for name, limits in {
        "up": {"up_bytes": 20_000, "total_bytes": 10**6},
        "both": {"up_bytes": 10**6, "total_bytes": 20_000},
    }.items():
        costs = costs_of(timed, run_s=None, codecs=["trellis"], downlinks=["trellis"], **limits)
        found[name] = costs.first(Adapter(None, None, None), pool, [Pair("trellis", "trellis")])
    up, both = found["up"], found["both"]
    assert up is not None
    assert both is not None
    assert 19_000 < up.up_bytes <= 20_000
    assert 19_000 < both.up_bytes + both.down_bytes <= 20_000


def test_only_a_limit_that_counts_downloads_opens_the_downlink(timed: Table) -> None:
    assert Open.of(parse(timed | {"budget": {"total_bytes": 3000}}, "test")).downlink
    assert not Open.of(parse(timed | {"budget": {"up_bytes": 3000}}, "test")).downlink
    limited = timed | {"budget": {"run_s": 99.0}}
    assert Open.of(parse(limited, "test")).downlink
    assert not Open.of(parse(limited | {"downlink": {"name": "int8"}}, "test")).downlink


def test_open_is_what_the_configuration_does_not_set(table: Table) -> None:
    assert Open.of(parse(table, "test")) == Open(
        target_modules=True, r=True, max_steps=False, rounds=False, codec=True, downlink=False
    )
    fixed = table | {"lora": table["lora"] | {"r": 2}, "codec": {"name": "int8"}}
    assert Open.of(parse(fixed | {"budget": {"up_bytes": 3000}}, "test")) == Open(
        target_modules=True, r=False, max_steps=False, rounds=False, codec=False, downlink=False
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": {}}, "a budget needs one of the three"),
        ({"budget": {"run_s": 10.0}}, "budget.run_s: no line is known"),
        ({"budget": BUDGET | {"downlinks": ["int8"]}}, "downlinks: without effect"),
        ({"budget": BUDGET | {"target_modules": ["q_proj++v_proj"]}}, "has an empty name or one"),
        (
            {"budget": BUDGET | {"target_modules": ["q_proj+q_proj"]}},
            "has an empty name or one twice",
        ),
        ({"budget": BUDGET | {"r": [2, 2]}}, "budget.r: a number stands twice"),
        ({"budget": BUDGET | {"max_steps": [4, 4]}}, "budget.max_steps: a number stands twice"),
        ({"codec": {"name": "auto"}}, "the budget chooses the codec"),
        ({"codec": {"name": "klt"}}, "'klt' is learned"),
        ({"codec": {"name": "trellis", "snr_db": 8.0}}, "the rate follows the noise"),
        ({"codec": {"name": "trellis", "noise_ratio": 0.2}}, "the rate follows the noise"),
        ({"method": {"name": "fedpipe"}}, "plans the ranks of every site itself"),
        ({"method": {"name": "flglm"}}, "sends hidden states"),
        ({"method": {"name": "fedcybgd"}}, "tunes blocks of weights"),
        ({"method": {"name": "ecolora"}}, "shares no adapter of one layout"),
        ({"method": {"name": "cgfedllm"}}, "more than the budget counts"),
        ({"tune": "full", "lora": {}}, "all weights are tuned"),
        ({"rounds": 1}, "one round leaves nothing to try"),
    ],
)
def test_what_cannot_be_chosen_is_refused(table: Table, change: Table, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(table | change, "test")


def test_candidates_of_what_is_set_are_refused(table: Table, tmp_path: Path) -> None:
    fixed = table | {"lora": table["lora"] | {"r": 2}}
    with pytest.raises(ConfigError, match=r"budget\.r: without effect, because lora\.r is set"):
        run_table(fixed, tmp_path / "run")


FIXED = {"name": "trellis", "rate": 5.3}
SMALL = {"budget": BUDGET | {"up_bytes": 300}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": BUDGET | {"up_bytes": 100}}, "budget.up_bytes=100: no adapter of 4 tried"),
        (
            SMALL | {"codec": FIXED},
            "the codec that is set, 'trellis' at rate=5.3, needs more with each of",
        ),
        (
            SMALL | {"codec": FIXED},
            "raise codec.rate, remove [codec] so that the budget chooses it",
        ),
        (
            SMALL | {"codec": {"name": "int8"}},
            "rounds; remove [codec] so that the budget chooses it",
        ),
        ({"data": None}, "data.public_source: a budget makes its trials on public text"),
        (
            {
                "budget": {"total_bytes": 300},
                "lora": {"r": 2, "target_modules": "attention"},
                "codec": {"name": "int8"},
                "downlink": {"name": "int8"},
            },
            "remove [downlink], which is set too, so that the budget chooses it",
        ),
    ],
)
def test_check_and_run_refuse_alike(
    table: Table, change: Table, message: str, tmp_path: Path
) -> None:
    """What does not fit is named with its remedy, before anything is trained."""
    if "data" in change:
        change = {"data": {k: v for k, v in table["data"].items() if k != "public_source"}}
    config = parse(table | change, "test")
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan(config)
    with pytest.raises(ConfigError, match=re.escape(message)):
        list(execute(config, tmp_path / "run"))


def test_check_shows_the_first_adapter_that_fits(table: Table) -> None:
    """The default rank needs more with this codec, and the run would choose another."""
    shown = []
    for up_bytes in (3000, 10**6):
        budget = BUDGET | {"up_bytes": up_bytes, "r": [1, 8]}
        shown += plan(parse(table | {"budget": budget, "codec": FIXED}, "test"))["notes"]
    ranks = re.findall(r"the figures here are those of (rank \d+ on \S+)", " ".join(shown))
    assert ranks == ["rank 1 on attention", "rank 8 on all-linear"]


def test_trials_have_as_many_sites_as_a_round(table: Table) -> None:
    unset = {name: value for name, value in BUDGET.items() if name != "trial_sites"}
    sites = plan(parse(table, "test"))["sites"]
    for budget, expected in ((unset, len(sites)), (BUDGET, 2)):
        notes = " ".join(plan(parse(table | {"budget": budget}, "test"))["notes"])
        assert f"on {expected} simulated sites" in notes

    settings = BudgetConfig(up_bytes=1)
    assert [settings.simulated_sites(cohort) for cohort in (1, 3, 8, 40)] == [2, 3, 8, 8]


def test_candidates_that_the_model_does_not_have_are_named(table: Table, tmp_path: Path) -> None:
    budget = BUDGET | {"target_modules": ["foo"]}
    with pytest.raises(ConfigError, match=r"no candidate can be built; rank \d+ on foo: lora"):
        run_table(table | {"budget": budget}, tmp_path / "run")


def test_a_damaged_choice_is_refused(table: Table) -> None:
    config: RunConfig = parse(table, "test")
    for damaged in ({}, {"chosen": 3}, {"chosen": {"r": "two", "codec": {"name": "int8"}}}):
        with pytest.raises(CheckpointError, match=r"^budget\.json.*; restore it from a copy"):
            settle(config, damaged)
