"""A cut that is chosen is the cut in numbers, and checkpointing changes no weight."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import Example, SiteTexts
from fluvial.errors import ConfigError
from fluvial.methods.traffic import Traffic
from fluvial.models.pool import ModelPool
from fluvial.runs.config import parse
from fluvial.runs.opening import given, texts_of
from fluvial.runs.plan import plan
from fluvial.runs.run import execute
from tests.oracle.test_flglm import flglm
from tests.support.models import four_layers
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

    config = parse(table | {"method": {"name": "flglm", **auto}}, "test")
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


def test_a_run_that_leaks_more_than_promised_stops_or_says_so(table: Table, tmp_path: Path) -> None:
    """By measures elsewhere, this noise keeps the bound; on this model the meter sees more."""
    noise = {"clip": 1e3, "multiplier": 0.3}
    method = {"name": "flglm", "noise": noise, "leakage": {"most": 0.945, "texts": 2, "tokens": 4}}
    table = table | {"method": method}
    found = run_table(table, tmp_path / "end")["leakage"]
    assert found["within"] == (found["accuracy"] <= 0.945)
    words = "within" if found["within"] else "BEYOND"
    assert f"{words} method.leakage.most=0.945" in found["sentence"]


@pytest.mark.parametrize("mode", ["hierarchical", "client-batch"])
def test_checkpointing_repeats_the_same_dropout(table: Table, tmp_path: Path, mode: str) -> None:
    """Its backward pass comes when dropout is off again; the weights are those without it."""
    table = table | {"lora": {"r": 4, "lora_dropout": 0.3}}
    usual = flglm(table, tmp_path / "usual", mode=mode)
    less = table | {"train": table["train"] | {"gradient_checkpointing": True}}
    checkpointed = flglm(less, tmp_path / "checkpointed", mode=mode)
    assert checkpointed["adapter_sha256"] == usual["adapter_sha256"]
