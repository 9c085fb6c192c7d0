"""The start of an adapter: sites make it from the seed, and one that makes another is sent it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fluvial.errors import WireError
from fluvial.exchange import downlink, start
from fluvial.exchange.downlink import Downlink
from fluvial.exchange.gathering import START
from fluvial.models.states import digest, initial_state, no_change
from fluvial.runs.checkpoint import RunFolder
from fluvial.seeds import derive
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named
from tests.support.runs import run_table, run_with_stops

Table = dict[str, Any]
LAYOUT = Layout((("q.lora_A.weight", (4, 32)), ("q.lora_B.weight", (32, 4))))
FEDAVG: Table = {"method": {"name": "fedavg"}}
TGAP: Table = {"source": "sites", "rounds": 3}
COVARIANCE: Table = {"source": "sites-covariance", "reading": "local", "rounds": 3}
LEARNED: Table = {"codec": {"name": "klt", "rate": 8}}


def test_a_digest_is_that_of_names_shapes_and_values() -> None:
    state = initial_state(LAYOUT, 1)
    name = "q.lora_A.weight"
    others = [
        initial_state(LAYOUT, 2),
        {**state, name: state[name].T.contiguous()},
        {each.replace("q", "k"): tensor for each, tensor in state.items()},
        {**state, "q.lora_B.weight": torch.full((32, 4), 1e-30)},
    ]
    assert len({digest(state), *map(digest, others)}) == 5
    assert digest({**state, "q.lora_B.weight": no_change((32, 4))}) == digest(state)
    assert digest(dict(reversed(state.items()))) == digest(state)
    assert digest({name: state[name].bfloat16()}) != digest({name: state[name]})


def test_only_the_start_is_left_out_and_only_for_sites_that_make_it() -> None:
    begun = initial_state(LAYOUT, 1)
    down = Downlink(None, 1, begun)
    down.advance({name: tensor.clone() for name, tensor in begun.items()}, 1)
    assert down.message("a", {"round": 1}).values == {"round": 1, START: digest(begun)}
    assert not down.message("a", {"round": 1}).tensors
    down.forget(["b"])
    assert down.message("b", {"round": 1}).tensors
    assert not down.message("a", {"round": 1}).tensors

    down.advance(initial_state(LAYOUT, 2), 2)
    assert down.message("a", {"round": 2}).tensors
    resumed = Downlink(None, 1, begun)
    resumed.advance(initial_state(LAYOUT, 2), 1)
    assert resumed.message("a", {"round": 1}).tensors, "another adapter than the start"


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (Payload(values={"round": 3, START: "0" * 32}), "only round 1 begins with a start"),
        (Payload({"x": torch.ones(3)}, {"round": 1, START: "0" * 32}), "has no tensors"),
        (Payload(values={"round": 1, START: "F" * 32}), "no digest of 32"),
        (Payload(values={"round": 1, START: ""}), "no digest of 32"),
    ],
)
def test_a_start_out_of_its_place_is_refused(message: Payload, why: str) -> None:
    site: Any = SimpleNamespace(name="north", seed=1, layout=LAYOUT, downlink=None)
    with pytest.raises(WireError, match=why):
        downlink.receive(site, message)


CASES: dict[str, Table] = {
    "fedavg": FEDAVG,
    "fedavg, B": {"method": {"name": "fedavg", "factors": "B"}},
    "fedavg, svd": {"method": {"name": "fedavg", "aggregation": {"mode": "svd"}}},
    "fedsa": {"method": {"name": "fedsa"}, "evaluate": {}},
    "fedsb": {"method": {"name": "fedsb"}},
    "fedpipe, half the rank": {
        "method": {
            "name": "fedpipe",
            "planner": {"selection": "all", "ranks": [2], "batches": [4]},
            "budgets": [{"site": site, "tokens_s": 1e3} for site in ("north", "south", "west")],
        }
    },
    "central": {"method": {"name": "central"}},
    "all weights": {**FEDAVG, "tune": "full"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_that_of_a_run_that_sends_the_start(
    name: str, run_config: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = run_config | CASES[name]
    if "tune" in table:
        del table["lora"]
    short = run_table(table, tmp_path / "short")
    monkeypatch.setattr(downlink, "digest", lambda _: object())  # no adapter is the start
    whole = run_table(table, tmp_path / "whole")
    for key in ("adapter_sha256", "model_sha256", "heldout"):
        assert short.get(key) == whole.get(key), key
    firsts = [RunFolder(tmp_path / each).metrics()[0] for each in ("short", "whole")]
    sizes = [sum(row["down train"] for row in first["bytes"].values()) for first in firsts]
    assert sizes[0] <= firsts[0]["sites"] * 200 < sizes[1]
    assert firsts[0]["loss"] == firsts[1]["loss"]
    assert not any("sent_start" in first for first in firsts)


def other_torch(seed: int) -> Callable[[Layout, int], Named]:
    """`initial_state` of another version of torch."""
    return lambda layout, own: initial_state(layout, derive(own, "torch", seed))


@pytest.mark.parametrize("down", [None, {"name": "int8"}])
@pytest.mark.parametrize("stops", [(99,), (1, 1, 99)], ids=["straight", "resumed"])
def test_a_site_that_makes_another_start_is_sent_it_once(
    down: Table | None,
    stops: tuple[int, ...],
    run_config: Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = run_config | FEDAVG | {"rounds": 3} | ({} if down is None else {"downlink": down})
    honest = run_table(table, tmp_path / "honest")
    for module in (start, downlink):
        monkeypatch.setattr(module, "initial_state", other_torch(1))
    other = run_with_stops(table, tmp_path / "other", stops)
    assert other["adapter_sha256"] == honest["adapter_sha256"]
    assert "the adapter made here from the seed is not the server's" in caplog.text
    assert "makes another adapter from the seed, and is sent the server's" in caplog.text

    plain, sent = (RunFolder(tmp_path / each).metrics() for each in ("honest", "other"))
    assert [record.get("sent_start") for record in sent] == [["north", "south", "west"], None, None]
    assert sent[0]["bytes_down"] > plain[0]["bytes_down"] + 3 * 4096
    assert [record["bytes_down"] for record in sent[1:]] == [
        record["bytes_down"] for record in plain[1:]
    ]


@pytest.mark.parametrize("tgap", [TGAP, COVARIANCE], ids=["sites", "covariance"])
def test_the_start_is_not_sent_before_round_1_either(
    tgap: Table, run_config: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = run_config | LEARNED | {"rounds": 1, "method": {"name": "fedavg", "tgap": tgap}}
    short = run_table(table, tmp_path / "short")
    monkeypatch.setattr(start, "initial_state", other_torch(1))
    whole = run_table(table, tmp_path / "whole")
    assert short["adapter_sha256"] == whole["adapter_sha256"]
    sizes = [each["bytes"]["by_kind"]["down snapshot"] for each in (short, whole)]
    assert sizes[0] < sizes[1] - 3 * 4096
