"""Data, export and report of a run of FedCyBGD."""

import json

import pytest
import torch

from fluvial.storage.run_files import read_run
from fluvial.training.evaluate import heldout
from tests.support.fedcybgd import (
    FORMS,
    ONCE,
    VALUES,
    Seen,
    Stage,
    differ,
)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 10])
def test_sites_of_unlike_data(alpha: float, stage: Stage) -> None:
    table = stage.table(4, rounds=1)
    table["data"]["partition"] = {
        "by": "dirichlet",
        "column": "client",
        "sites": 4,
        "alpha": alpha,
        "min_records": 5,
    }
    played = stage.play(table)
    assert [record["sites"] for record in played.rounds] == [4]
    assert stage.loss(table, played.state) < stage.loss(table, stage.oracle(table).start)


@pytest.mark.parametrize("form", ["stale-subset", "proxy"])
def test_what_is_exported_and_measured_is_the_servers_store(
    form: str, stage: Stage, watch: list[Seen]
) -> None:
    """In the released code it was the last client's mixture of old and new blocks."""
    from transformers import AutoModelForCausalLM

    played = stage.play(stage.table(4, FORMS[form]), to="result")
    model = AutoModelForCausalLM.from_pretrained(played.folder / "model")
    exported = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert not differ(exported, played.run.pool.weights(played.state))
    last = {name: tensor for name, tensor in watch[-1].before.items() if name in exported}
    others = last.keys() - watch[-1].trained
    assert any(
        last[name].shape != exported[name].shape or not torch.equal(last[name], exported[name])
        for name in others
    )
    shown = read_run(played.folder)["result"]["heldout_by_site"]
    texts = stage.oracle(stage.table(4)).texts

    for site, row in shown.items():
        measured = heldout(model, texts.load(site).heldout, pad_token_id=0)
        assert (row["final"]["loss"], row["final"]["accuracy"]) == (
            measured.loss,
            measured.accuracy,
        )


def test_the_report_of_a_run_has_its_schedule_and_its_conflicts(stage: Stage) -> None:
    played = stage.play(stage.table(5, {"order": "latin"}, codec={"name": "int8"}, train=ONCE))
    lines = [
        json.loads(line) for line in (played.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == played.rounds

    for cycle, line in enumerate(lines):
        assert [row["block"] for row in line["visits"]] == [
            f"layer {(client + cycle) % 4}" for client in range(5)
        ]
        assert [row["block"] for row in line["conflicts"]] == [f"layer {cycle}"]
        for row in line["visits"]:
            assert row.keys() == {"visit", "site", "block", "loss", "norm", "bytes", "share"}

    assert played.run.setup["blocks"] == [
        {"name": f"layer {block}", "values": VALUES} for block in range(4)
    ]
