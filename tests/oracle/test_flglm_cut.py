"""A cut that is chosen is the cut in numbers, and checkpointing changes no weight."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fluvial.data import Example, SiteTexts
from fluvial.errors import ConfigError, PrivacyError
from fluvial.methods.flglm.leakage.meter import Leakage, Reading
from fluvial.methods.flglm.server import FlGlmServer
from fluvial.methods.traffic import Traffic
from fluvial.models.pool import ModelPool
from fluvial.report.show import run_tables
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import parse
from fluvial.runs.opening import given, texts_of
from fluvial.runs.plan import plan
from fluvial.runs.run import execute
from fluvial.storage.run_files import read_run
from tests.oracle.test_flglm import flglm
from tests.support.models import UNMEASURED, four_layers
from tests.support.runs import run_table

Table = dict[str, Any]


@pytest.fixture
def table(run_config: Table, tmp_path: Path) -> Table:
    """A run over three sites on a model of four layers."""
    return run_config | {
        "rounds": 1,
        "model": {"name_or_path": str(four_layers(tmp_path / "model"))},
    }


def rows(table: Table, **method: Any) -> dict[str, str]:
    planned = plan(parse(table | {"method": {"name": "flglm", **method}}, "test"))
    return {row["what"]: row["value"] for row in planned["rows"]}


def server_mb(table: Table, front: int) -> float:
    """Return the predicted memory of the server, 10^6 bytes."""
    words = rows(table, front=front)["all of it in training, server"]
    return int(words.split()[0].replace(",", "")) / 1e6


def test_a_chosen_cut_trains_as_the_same_cut_in_numbers(table: Table, tmp_path: Path) -> None:
    """A server with room for one layer leaves the front two, here, in `check` and when resumed."""
    between = (server_mb(table, 1) + server_mb(table, 2)) / 2
    auto = {"front": "auto", "back": "auto", "server_memory_mb": between}
    found = rows(table, **auto)
    assert "refused: server_memory_mb" in found["cut 1 + 1"]
    assert "cut 2 + 1, chosen" in found
    assert found["cut"].startswith("2 layers and the embedding")

    chosen = flglm(table, tmp_path / "auto", **auto)
    number = flglm(table, tmp_path / "number", front=2)
    assert chosen["adapter_sha256"] == number["adapter_sha256"]
    assert chosen["bytes"] == number["bytes"]

    config = parse(table | {"method": UNMEASURED | auto}, "test")
    *_, again = execute(config, tmp_path / "auto", resume=True)
    assert again.values["adapter_sha256"] == chosen["adapter_sha256"]


def test_a_bound_that_no_cut_keeps_is_refused_before_the_run(table: Table) -> None:
    with pytest.raises(ConfigError, match="site_memory_mb: it needs"):
        rows(table, front="auto", site_memory_mb=0.01)
    with pytest.raises(ConfigError, match="leakage.most: a server read 100%"):
        rows(table, leakage={"most": 0.95})


@pytest.mark.parametrize("method", [{"mode": "hierarchical", "sync_steps": 2}, {}])
def test_bytes_have_a_range_where_the_data_is_elsewhere(
    table: Table, method: dict[str, Any]
) -> None:
    """The range holds those of every site; its upper end is that of sequences of full length."""
    train = table["train"] | {"max_steps": 5}
    config = parse(table | {"train": train, "method": {"name": "flglm", **method}}, "test")
    pool = ModelPool(config.model, config.adapter)
    texts = texts_of(config, pool)
    split = config.entry

    def traffic(known: SiteTexts | None) -> Traffic:
        facts = given(config, pool.layout, pool.outline.base, 3, known)
        return split.plan(config.method, facts).forecast().traffic(1)

    here = traffic(texts)
    elsewhere = traffic(None)
    for exact, around in ((here.up, elsewhere.up), (here.down, elsewhere.down)):
        assert 0 < around.least <= exact.least <= exact.most <= around.most

    full = Example([0] * config.data.max_length, [0] * config.data.max_length)
    alike = {"site": [full] * config.train.logical_batch}
    facts = replace(given(config, pool.layout, pool.outline.base, 3), examples=lambda: alike)
    assert split.plan(config.method, facts).forecast().traffic(1).up.most == elsewhere.up.most


def bounded(table: Table, **leakage: Any) -> Table:
    """Return a run whose noise keeps a bound by measures elsewhere."""
    noise = {"clip": 1e3, "multiplier": 0.3}
    settings = {"most": 0.945, "texts": 2, "tokens": 4, **leakage}
    return table | {"method": {"name": "flglm", "noise": noise, "leakage": settings}}


def audits(monkeypatch: pytest.MonkeyPatch, shares: list[float]) -> list[int]:
    """Let the meter read these shares, one after another; return the rounds in which it does."""
    rounds: list[int] = []

    def audit(_self: Any, _fleet: Any, round: int, which: str = "final") -> Leakage:
        rounds.append(0 if which == "base" else round)
        reading = Reading("exact causal search", shares[len(rounds) - 1], 0.0, 0.0, 0.0)
        return Leakage(1, 10, 0, (reading,))

    monkeypatch.setattr(FlGlmServer, "_leakage", audit)
    return rounds


def test_a_base_that_leaks_more_than_promised_is_refused_before_training(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = audits(monkeypatch, [0.96])
    with pytest.raises(PrivacyError, match=r"before round 1: .*96 %.*most=0.945 allows less"):
        run_table(bounded(table), tmp_path / "run")

    assert rounds == [0]
    assert RunFolder(tmp_path / "run").metrics() == []


def test_a_round_after_which_more_leaks_is_recorded_and_stops_the_run(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, the round is made again."""
    table = table | {"rounds": 3}
    rounds = audits(monkeypatch, [0.5, 0.5, 0.96, 0.96])
    config = parse(bounded(table, every=1), "test")
    for resume in (False, True):
        with pytest.raises(PrivacyError, match="round 2: .*96 %"):
            list(execute(config, tmp_path / "run", resume=resume))

        first, last = RunFolder(tmp_path / "run").metrics()
        assert "stopped" not in first
        assert last["round"] == 2
        assert last["leakage"] == 0.96
        assert "most=0.945 allows less" in last["stopped"]
        assert last["bytes_up"] > 0

    assert rounds == [0, 1, 2, 2]
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(run_tables(read_run(tmp_path / "run")))
    assert "Stopped: round 2: the server could read 96 %" in console.export_text()


def test_a_model_that_leaks_too_much_at_the_end_is_written_and_says_so(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = audits(monkeypatch, [0.5, 0.96])
    found = run_table(bounded(table), tmp_path / "run")["leakage"]
    assert rounds == [0, 1]
    assert found["within"] is False
    assert "BEYOND method.leakage.most=0.945" in found["sentence"]


def test_the_end_of_a_run_says_whether_its_bound_was_kept(table: Table, tmp_path: Path) -> None:
    """The meter itself, which reads some tokens of this model at this noise."""
    result = run_table(bounded(table, most=1.0), tmp_path / "run")
    found = result["leakage"]
    assert found["within"] is True
    assert "within method.leakage.most=1" in found["sentence"]
    assert 0 < result["setup"]["leakage"] <= 1
    for way in ("up", "down"):
        assert result["bytes"]["setup"] == 0
        assert result["bytes"]["by_kind"][f"{way} leakage"] > 0


@pytest.mark.parametrize("mode", ["hierarchical", "client-batch"])
def test_checkpointing_repeats_the_same_dropout(table: Table, tmp_path: Path, mode: str) -> None:
    """Its backward pass comes when dropout is off again; the weights are those without it."""
    table = table | {"lora": {"r": 4, "lora_dropout": 0.3, "target_modules": "attention"}}
    usual = flglm(table, tmp_path / "usual", mode=mode)
    less = table | {"train": table["train"] | {"gradient_checkpointing": True}}
    checkpointed = flglm(less, tmp_path / "checkpointed", mode=mode)
    assert checkpointed["adapter_sha256"] == usual["adapter_sha256"]
