"""Predictions that follow from the run's settings: its downlink, its factors, its limits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluvial.federation.sites import Site, train_locally
from fluvial.federation.store import StateStore
from fluvial.methods.fedpipe import measure, tasks
from fluvial.methods.fedpipe.planner.formats import FORMATS
from fluvial.methods.fedpipe.planner.memory import MemoryPoint
from fluvial.methods.fedpipe.planner.profile import Peak
from fluvial.models.pool import ModelPool
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import merge, parse
from fluvial.runs.opening import site_of, texts_of
from fluvial.runs.plan import plan as check
from fluvial.runs.site_plans import site_plans
from fluvial.runs.timed_plan import timed
from fluvial.training.train import collate
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named
from tests.support.planner import models
from tests.support.runs import run_table

Table = dict[str, Any]
WAYS = ("bytes_up", "bytes_down")
METHOD: Table = {
    "name": "fedpipe",
    "planner": {"selection": "all", "ranks": [4], "batches": [4]},
    "budgets": [{"site": site, "tokens_s": 1000.0} for site in ("north", "south", "west")],
}


def figures_of(table: Table, folder: Path) -> tuple[Table, Table]:
    """The predicted bytes of one site, and the mean of those of the sites in round 2."""
    run_table(table | {"compare": []}, folder)
    first, second = RunFolder(folder).metrics()
    predicted = {way: first["predicted"]["north"][way]["predicted"] for way in WAYS}
    return predicted, {way: second[way] / 3 for way in WAYS}


@pytest.mark.parametrize(
    "changes",
    [
        {"downlink": {"name": "int8"}},
        {"method": {"factors": "B", "aggregation": {"mode": "ffa"}}},
    ],
)
def test_bytes_of_both_ways_are_those_that_are_sent(
    changes: Table, run_config: Table, tmp_path: Path
) -> None:
    """An adapter is coded on its way down; under "ffa" B alone goes up."""
    table = run_config | {"method": METHOD}
    predicted, sent = figures_of(merge(table, changes), tmp_path / "run")
    for way in WAYS:  # headers are a large share of so small an adapter
        assert predicted[way] == pytest.approx(sent[way], rel=0.3), way
    plain, _ = figures_of(table, tmp_path / "plain")
    way = "bytes_down" if "downlink" in changes else "bytes_up"
    assert predicted[way] < 0.7 * plain[way]


def test_peaks_below_the_base_predict_no_less_than_the_base() -> None:
    """They contradict the base's bytes, and a plan with negative memory would fit anywhere."""
    model = models().memory
    points = [MemoryPoint(batch, 64, False, FORMATS["nf4"], 0, batch) for batch in (1, 2)]
    fitted = model.calibrated(points)
    total = fitted.total(FORMATS["nf4"], 1, 64, checkpointing=False, lora=1000)
    assert total >= fitted.base(FORMATS["nf4"]) + 16_000


@pytest.mark.parametrize(
    ("choice", "recomputed", "batch"), [("choose", True, 4), ("never", False, 1)]
)
def test_a_probe_recomputes_layers_where_only_such_a_pass_fits(
    choice: str,
    recomputed: bool,
    batch: int,
    run_config: Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner = {"checkpointing": choice}
    table = run_config | {"method": {"name": "fedpipe", "probe_steps": 2, "planner": planner}}
    config = parse(table, "test")
    pool = ModelPool(config.model, config.adapter)
    site = site_of(config, "north", pool, texts_of(config, pool), StateStore(tmp_path / "sites"))
    longest = max(len(example.input_ids) for example in site.load().train)
    room = longest - 1  # without checkpointing, and several sequences with it
    profile = replace(
        measure.measured(site, config.method),  # type: ignore[arg-type]
        memory_bytes=100 * room,
        peaks=tuple(
            Peak(n, longest, checkpointing, each * n * longest)
            for checkpointing, each in ((False, 100), (True, 10))
            for n in (1, 2)
        ),
    )
    site.keep(tasks.PROFILE, Payload(values=profile.to_values()))
    seen = []

    def watched(site: Site, *given: Any, **options: Any) -> Any:
        seen.append((options["settings"].gradient_checkpointing, site.assigned.batch))  # type: ignore[union-attr]
        return train_locally(site, *given, **options)

    monkeypatch.setattr(tasks, "train_locally", watched)
    tasks.probe(site, Payload(values={"number": 0}))
    assert seen == [(recomputed, batch)]


@pytest.mark.parametrize("memory_mb", [0.5, 0.7, 1.0])
def test_a_probe_keeps_within_the_memory_of_its_site(
    memory_mb: float, run_config: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapter is larger than that of the profile, in weights, optimizer and activations."""
    lora = {"r": 4, "target_modules": "all-linear"}
    method = {
        "name": "fedpipe",
        "probe_steps": 2,
        "planner": {"ranks": [2, 4]},
        "budgets": [{"site": "north", "memory_mb": memory_mb, "tokens_s": 1000}],
    }
    config = parse(run_config | {"lora": lora, "method": method}, "test")
    pool = ModelPool(config.model, config.adapter)
    site = site_of(config, "north", pool, texts_of(config, pool), StateStore(tmp_path / "sites"))
    examples = site.load().train
    longest = max(examples, key=lambda example: len(example.input_ids))
    seen = []

    def watched(site: Site, start: Named, *given: Any, **options: Any) -> Any:
        with pool.model(start, trainable="A and B", assignment=site.assigned) as model:
            rows = collate([longest] * site.assigned.batch, 0)  # type: ignore[union-attr]
            seen.append(measure.peak_bytes(model, rows)[options["settings"].gradient_checkpointing])
        return train_locally(site, start, *given, **options)

    monkeypatch.setattr(tasks, "train_locally", watched)
    tasks.profile(site, Payload())
    answer = tasks.probe(site, Payload(values={"number": 0}))
    assert seen[0] <= 1.02 * memory_mb * 10**6
    assert answer.tensors["spectrum"].shape[1] == 8


def test_an_error_in_a_plan_names_no_log_that_is_gone(
    run_config: Table, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(site: Site, config: Any) -> Any:
        if site.name == "north":
            raise ValueError("this machine has no clock")
        return measure.measured(site, config)

    monkeypatch.setattr(tasks, "measured", broken)
    planned = site_plans(parse(run_config | {"method": METHOD}, "test"))
    reason = planned["sites"][0]["refused"]
    assert "in the log of the site's process" in reason
    assert "errors.log" not in reason + caplog.text
    assert "this machine has no clock" in caplog.text


def test_a_check_with_times_says_whose_steps_they_are(run_config: Table) -> None:
    config = parse(run_config | {"method": METHOD}, "test")
    notes = timed(config, check(config))["notes"]
    assert any("the plan of a site has others" in note for note in notes)
