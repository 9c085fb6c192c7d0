"""A site without room for the base in the run's own format takes part in a smaller one."""

import math
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fluvial.data import SiteTexts
from fluvial.federation import sites
from fluvial.methods.fedpipe import measure
from fluvial.methods.fedpipe.planner.plan import SitePlan
from fluvial.methods.fedpipe.planner.profile import Profile
from fluvial.methods.fedpipe.site_configuration import SiteConfiguration
from fluvial.models.pool import ModelPool
from fluvial.models.quantisation import FLOAT, Quantisation
from fluvial.models.quantised import QuantisedLinear
from fluvial.models.states import initial_state
from fluvial.report.site_plans import plan_lines
from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.site_process.process import JOIN, SiteProcess
from fluvial.training import evaluate
from fluvial.training.train import collate
from fluvial.wire.payload import Payload
from tests.support.runs import run_table
from tests.support.site_process import SITE, header, site_file

Table = dict[str, Any]


def table(run_config: Table, site: str, memory_mb: float, **changes: Any) -> Table:
    """A run over float32 or nf4; the base takes 121 kB and 59 kB, and its sequences 130 kB."""
    planner = {"ranks": [2, 4], "batches": [1, 2], "formats": ["float32", "nf4"]}
    method = {
        "name": "fedpipe",
        "probe_steps": 2,
        "probe_rank": 2,
        "planner": planner,
        "budgets": [{"site": site, "memory_mb": memory_mb}],
    }
    lora = {"r": 4, "target_modules": "all-linear"}
    return run_config | {"rounds": 1, "lora": lora, "method": method} | changes


def test_a_site_with_room_for_nf4_alone_takes_part(
    run_config: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains and measures over nf4 and says so; the others over float32. Its predicted memory is
    what autograd saves by its plan."""
    heldout: list[bool] = []

    def watched(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        heldout.append(any(isinstance(module, QuantisedLinear) for module in model.modules()))
        return usual(model, *arguments, **options)

    usual = evaluate.heldout
    monkeypatch.setattr(sites, "heldout", watched)
    settings = table(run_config, "north", 0.2)
    result = run_table(settings, tmp_path / "run")
    setup = result["setup"]
    assert setup["measured_in"] == {"north": "nf4"}
    assert {site: plan["format"] for site, plan in setup["plans"].items()} == {
        "north": "nf4",
        "south": "float32",
        "west": "float32",
    }
    assert sorted(heldout) == [False] * 4 + [True] * 2  # the base and the final model
    assert math.isfinite(result["heldout"]["final"]["loss"])
    assert "held-out measures are of the base in nf4" in "\n".join(plan_lines(setup))

    config = parse(settings, "test")
    pool = ModelPool(config.model, config.adapter)
    plan = SitePlan.from_json(setup["plans"]["north"])
    used = set().union(*(each["ranks"] for each in setup["plans"].values()))
    assignment = SiteConfiguration.of(plan, pool.assignment(1), used).assignment
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    longest = max(texts.load("north").train, key=lambda example: len(example.input_ids))
    state = initial_state(assignment.layout, 1)
    with pool.model(state, trainable="A and B", assignment=assignment) as model:
        peaks = measure.peak_bytes(model, collate([longest] * plan.setting.batch, 0))
    measured = peaks[plan.setting.checkpointing]
    assert plan.prediction.memory_bytes == pytest.approx(measured, rel=0.1)
    assert measured <= 200_000


def test_the_run_s_own_base_is_never_loaded_where_it_has_no_room(
    run_config: Table, tmp_path: Path
) -> None:
    data = run_config["data"] | {"max_length": 8}
    settings = table(run_config, SITE, 0.118, data=data)
    settings["method"]["planner"]["ranks"] = [1]
    process = SiteProcess(site_file(tmp_path))
    process.answer(header(task=JOIN, round=0), Payload(values={"config": settings}).to_bytes())

    messages = {
        "profile": Payload(),
        "probe": Payload(values={"number": 0}),
        "evaluate": Payload(values={"which": "base", "generate": 0}),
    }
    for seq, (task, message) in enumerate(messages.items(), start=2):
        answer = process.answer(header(task=task, round=0, seq=seq), message.to_bytes())
        if task == "profile":
            assert Profile.from_values(Payload.from_bytes(answer.data).values).format == "nf4"

    (pool,) = process._pools.values()
    bases = pool._bases.items()
    loaded = [quantisation for (_, quantisation), base in bases if "_model" in vars(base)]
    assert loaded == [Quantisation("nf4")]
    assert pool.outline.assignment.quantisation == FLOAT


def test_a_site_without_room_for_the_smallest_format_is_refused(
    run_config: Table, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for memory_mb, words in (
        (0.16, "a pass of 1 x 32 tokens over the base in format nf4 needs"),
        (0.05, "the base in format nf4 needs 58.8 kB"),
    ):
        skipping = table(run_config, "north", memory_mb, fleet={"on_failure": "skip"})
        setup = next(execute(parse(skipping, "test"), tmp_path / f"{memory_mb}"))
        assert sorted(setup.values["plans"]) == ["south", "west"]
        assert f"site 'north' failed: {words}" in caplog.text
